"""`.env`: an accepted line has one value, systemd's too; a refused one says how to write it.

And of its values, those that are secrets are never shown, however they are quoted.
"""

from __future__ import annotations

import base64
import json
import random
import shlex
import subprocess
import tempfile
import unittest
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import deploy
from tests.speaking import speaking

# Values that may be written plainly, and between quotes of either kind.
PLAIN = (
    *("", "plain", "two words", "a=b==", "=", "a#b", "`id`", "-", ";", "x&y;z|w<>()*?[]{}~!%^"),
    *("größe €", "e\u0301", "postgres://u:p@localhost:5432/db?x=1", "export", "x" * 100_000),
)
# Those that need quotes of either kind, or of one.
EITHER = ("  two  words ", " ", "#b", "a #b", "日本語 🐍", "\u00a0")
SINGLE = ("p$X-w", "${HOME}", "$(id)", "pa$$wd", r"C:\new", r"a\\b", 'say "hi"', '{"a": 1}')
DOUBLE = ("it's", "it's #1", "'")

# (part of the advice, *lines)
BAD = (
    ("save the file as UTF-8 without one", "\ufeffA=b"),
    (r"ends as Windows ends lines: sed -i 's/\r$//'", "A=b\r", "\r", "# c\r"),
    ("is not NAME=value", "A", "1A=b", "A-B=c", "A.B=c", "Ä=b", "=b", "; c", " # c", "\t", "A''=c"),
    ("no space before the name or around =, no export, no colon", " A=b", "\tA=b", "A =b", "A: b"),
    ("no export", "export A=b"),
    (
        "write A='…'",
        "A=a$b",
        'A="a$b"',
        "A=${X}",
        "A=$(id)",
        r"A=a\b",
        r'A="a\n"',
        "A=\\",
        r'A="\\"',
    ),
    ("no way of writing it is safe", r"A='a\'", "A='\\'"),
    ("write A='…'", "A=foo # c", "A=#foo", 'A=say "hi"', "A=a'b'", "A= b", "A=b ", "A=\u00a0b"),
    ('A="…" when it holds a \'', "A=it's"),
    ("begins or ends with a space: remove it", "A= b", "A=b "),
    ("holds a quote", "A=b'"),
    ("must end with the quote", "A='b", "A='", 'A="', "A='b\"", "A='b' ", "A='b' # c", "A='b'c"),
    ("no other '", "A='b''c'"),
    ('no other "', 'A="b"c"', 'A="a\\"b"'),
    ("holds a control character", "A=a\tb", "A=foo\t# c", "A='a\x00b'", "A=\x1b[0m", "A='a\x7f'"),
    ("a control character", "A='a\rb'", "A='a\x0bb'", "A=\ufdd0", "A=a\uffff", "A='\U0001fffe'"),
    ("hides the next line", "# c \\", "# c \\\\"),
)

NASTY = "AB_=='\"\\ #;$`\t\r\x00\x0b\x7f\u00a0\u0085\u2028\ufeff\ufffe\U0001ffffé€0:{}()exportx"
WHITESPACE, NEWLINES = " \t\n\r", "\n\r"


class Invalid(Exception):
    """What systemd does not read."""


def encodable(text: str) -> bool:
    """systemd takes no surrogates and none of Unicode's noncharacters."""
    return not any(
        0xD800 <= ord(c) <= 0xDFFF or 0xFDD0 <= ord(c) <= 0xFDEF or ord(c) & 0xFFFE == 0xFFFE
        for c in text
    )


def systemd(text: str) -> dict[str, str]:
    """What systemd reads in an EnvironmentFile, by the states that systemd.exec(5) describes."""
    if "\0" in text:
        raise Invalid("systemd reads no file with a null byte")
    found: dict[str, str] = {}
    state, key, value = "before the key", "", ""
    kept = 0  # characters of the value that are not stripped
    for c in text + "\n":
        if state == "before the key":
            if c in "#;":
                state = "comment"
            elif c not in WHITESPACE:
                state, key, value, kept = "key", c, "", 0
        elif state == "key":
            if c in NEWLINES:
                state = "before the key"
            elif c == "=":
                state = "before the value"
            else:
                key += c
        elif state in ("before the value", "value") and c in NEWLINES:
            name = key.rstrip(WHITESPACE)
            value = value[:kept]
            if not encodable(name + value):
                raise Invalid("systemd ignores what is not UTF-8")
            found[name] = value
            state = "before the key"
        elif state == "before the value" and c in "'\"":
            state = c
        elif state in ("before the value", "value"):
            if c == "\\":
                state = "escape"
            elif state == "value" or c not in WHITESPACE:
                state = "value"
                value += c
                kept = len(value) if c not in WHITESPACE else kept
        elif state == "escape":
            state = "value"
            value += "" if c in NEWLINES else c
            kept = len(value)
        elif state == "'":
            value += "" if c == "'" else c
            state, kept = ("before the value" if c == "'" else state), len(value)
        elif state == '"':
            value += "" if c in '"\\' else c
            state = {'"': "before the value", "\\": "escape in quotes"}.get(c, state)
            kept = len(value)
        elif state == "escape in quotes":
            value += c if c in '"\\`$' else "" if c == "\n" else f"\\{c}"
            state, kept = '"', len(value)
        elif state == "comment":
            state = "before the key" if c in NEWLINES else state
            state = "escape in a comment" if c == "\\" else state
        else:
            state = "comment"
    if state not in ("before the key", "comment", "key"):
        raise Invalid(f"the file ends in the state {state!r}")
    return found


class EnvTest(unittest.TestCase):
    def setUp(self) -> None:
        self.path = Path(self.enterContext(tempfile.TemporaryDirectory()), ".env")

    def read(self, text: str | bytes, mode: int = 0o600) -> dict[str, str]:
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        self.path.chmod(mode)
        return deploy.read_env(self.path)

    def refusal(self, text: str | bytes, mode: int = 0o600) -> deploy.Failure:
        with self.assertRaises(deploy.Failure) as caught:
            self.read(text, mode)
        self.assertEqual(caught.exception.status, deploy.MISTAKE)
        return caught.exception


def good_lines() -> Iterator[tuple[str, str]]:
    """A line for each good value in each way of writing it, and the value."""
    for quote, *groups in (("", PLAIN), ("'", PLAIN, EITHER, SINGLE), ('"', PLAIN, EITHER, DOUBLE)):
        for value in (each for group in groups for each in group):
            yield f"A={quote}{value}{quote}", value


class LinesTest(EnvTest):
    def test_good_lines_have_exact_values_which_systemd_reads_too(self) -> None:
        for line, value in good_lines():
            with self.subTest(line=line[:60]):
                self.assertEqual(self.read(f"{line}\n"), {"A": value})
                self.assertEqual(self.read(line), {"A": value}, "without a newline at the end")
                self.assertEqual(systemd(f"{line}\n"), {"A": value})

    def test_bad_lines_have_their_number_and_the_way_to_write_them(self) -> None:
        for advice, *lines in BAD:
            for line in lines:
                with self.subTest(line=line):
                    first = line.startswith("\ufeff")
                    failure = self.refusal(f"{line}\n" if first else f"\n# fine\n{line}\nZ=1\n")
                    self.assertEqual(len(failure.details), 1, failure.details)
                    start = f"{self.path}, line {1 if first else 3}: "
                    self.assertTrue(failure.details[0].startswith(start), failure.details)
                    self.assertIn(advice, failure.details[0])

    def test_lines_that_say_nothing(self) -> None:
        self.assertEqual(self.read(""), {})
        self.assertEqual(self.read("\n\n   \n#\n# A=b\n#A='\n# größe $X \" ' \n\n"), {})

    def test_values_keep_their_order_and_their_newline_is_not_part_of_them(self) -> None:
        values = self.read("B=1\n_A1=2\na=3\n")
        self.assertEqual(list(values.items()), [("B", "1"), ("_A1", "2"), ("a", "3")])

    def test_every_mistake_in_one_go(self) -> None:
        failure = self.refusal("A=1\nexport B=2\n\nC='x\nA=3\nD=a$b\nD=4\nE=5\n")
        numbers = [line.split(": ")[0].split(" ")[-1] for line in failure.details]
        self.assertEqual(numbers, ["2", "4", "5", "6", "7"])
        self.assertIn("5 mistakes", failure.what)
        self.assertIn("A is set a second time", failure.details[2])
        self.assertIn("D is set a second time", failure.details[4])

    def test_no_refusal_shows_a_value(self) -> None:
        for line in (
            *("hunter2", "PASS: hunter2", "export PASS=hunter2", "PASS= hunter2", "PASS=hunter2$"),
            *("PASS='hunter2", "PASS=hunter2 # c", "PASS=hunter2\\", "PASS=hunter2\r"),
            *("PASS=hunter2\x07", " PASS=hunter2", "PASS=1\nPASS=hunter2"),
        ):
            with self.subTest(line=line):
                failure = self.refusal(f"{line}\n")
                said = " ".join((failure.what, failure.remedy, *failure.details))
                self.assertNotIn("hunter2", said)


class FileTest(EnvTest):
    def test_one_that_others_may_read_is_refused_with_the_chmod_that_mends_it(self) -> None:
        for mode in (0o604, 0o644, 0o666, 0o602, 0o601):
            failure = self.refusal("A=1\n", mode)
            self.assertEqual(failure.remedy, f"chmod 600 {self.path}")
        for mode in (0o600, 0o400, 0o640, 0o660):
            self.assertEqual(self.read("A=1\n", mode), {"A": "1"})

    def test_one_that_is_not_there_or_not_a_file(self) -> None:
        with self.assertRaises(deploy.Failure) as caught:
            deploy.read_env(self.path)
        self.assertEqual(caught.exception.status, deploy.MISTAKE)
        self.assertIn(str(self.path), caught.exception.what)
        self.assertIn("NAME=value", caught.exception.remedy)
        with self.assertRaises(deploy.Failure) as caught:
            deploy.read_env(self.path.parent)
        self.assertEqual(caught.exception.status, deploy.MISTAKE)
        self.assertIn("Is a directory", caught.exception.what)

    def test_one_that_is_not_utf_8(self) -> None:
        failure = self.refusal(b"A=1\n# fine\nB=gr\xf6\xdfe\nC=3\n")
        self.assertEqual(
            failure.details, (f"{self.path}, line 3: is not UTF-8: save the file as UTF-8",)
        )


class SystemdTest(EnvTest):
    def test_the_reference_reads_as_systemd_does(self) -> None:
        """What was measured of systemd 252 and 257, and what systemd.exec(5) says."""
        for text, value in (
            ("A=p$X-w", "p$X-w"),
            ("A='p${X}w'", "p${X}w"),
            (r'A="a\nb"', r"a\nb"),
            (r"A=a\b", "ab"),
            ("A=foo # c", "foo # c"),
            ("A = foo", "foo"),
            ("A=foo bar", "foo bar"),
            ("A=x&y", "x&y"),
            ("A=foo\r", "foo"),
            ("A=a\\\nb", "ab"),
            ("A='a\nb'", "a\nb"),
            ("A='a'\"b\"c ", "abc"),
            ('A="a\\"b\\$\\`\\\\c\\\nd"', 'a"b$`\\cd'),
            ("A='a ' ", "a "),
            ("# x\\\ny\nA=1", "1"),
        ):
            with self.subTest(text=text):
                self.assertEqual(systemd(text), {"A": value})
        self.assertEqual(systemd("A: foo\n; c\n# \\\nB=1\n"), {})
        self.assertEqual(systemd("# c\rB=1\n"), {"B": "1"})

    def agree(self, text: str) -> bool:
        """Whether the text is accepted; then systemd reads the same."""
        values: dict[str, str] = {}
        try:
            for line in text.split("\n"):
                deploy.read_assignment(line, values)
        except ValueError:
            return False
        try:
            read = systemd(text)
        except Invalid as error:
            self.fail(f"{text!r} is accepted, but {error}")
        self.assertEqual(values, read, repr(text))
        return True

    def test_random_values_that_are_accepted_are_read_alike(self) -> None:
        dice = random.Random(20260101)
        accepted = 0
        for _ in range(20_000):
            value = "".join(dice.choices(NASTY, k=dice.randrange(8)))
            quote = dice.choice(("", "'", '"'))
            accepted += self.agree(f"A={quote}{value}{quote}")
        self.assertGreater(accepted, 1000)

    def test_random_files_that_are_accepted_are_read_alike(self) -> None:
        dice = random.Random(20260102)
        accepted = 0
        for _ in range(20_000):
            lines = []
            for _ in range(dice.randrange(1, 4)):
                lines.append(dice.choice(("", "#", "A=", "B='", 'C="', "D", " ", ";")))
                lines[-1] += "".join(dice.choices(NASTY, k=dice.randrange(5)))
                lines[-1] += dice.choice(("", "", "'", '"'))
            accepted += self.agree("\n".join(lines))
        self.assertGreater(accepted, 1000)

    def test_comments_that_would_say_something_to_systemd(self) -> None:
        for text in ("# a\rB=1", "# a\\", "# a\\\nB=1", "# \0\nB=1", "#\\\r\nB=1"):
            with self.subTest(text=text):
                self.agree(text)


class SecretsTest(unittest.TestCase):
    def test_values_by_the_name_of_their_variable(self) -> None:
        for name in (
            *("SECRET_KEY", "DEFAULT_DB_PASSWORD", "db_passwd", "API_TOKEN", "AWS_ACCESS_KEY_ID"),
            *("PGPWD", "CREDENTIALS", "PrivateKey", "HASH_SALT", "SENTRY_DSN", "SLACK_WEBHOOK"),
            *("BASIC_AUTH", "DB_PW", "PW"),
        ):
            with self.subTest(name=name):
                self.assertEqual(deploy.secrets_in({name: "a-value"}), {"a-value"})

    def test_what_is_no_secret(self) -> None:
        for line in (
            *("DEBUG=True", "USE_AUTH=True", "SECRET_KEY=", "KEEP_TOKENS=0", "DB_USER=gforms"),
            *("DB_HOST=localhost", "DB_PORT=5432", "ALLOWED_HOSTS=gforms.example.org"),
            *(
                "TITLE=a plain and quite long sentence",
                "SITE_URL=http://localhost/path?x=1",
                "PWA_NAME=forms",
            ),
            *("STATIC_ROOT=/srv/gforms1/static/files", "NUMBER=12345678901234567890"),
        ):
            with self.subTest(line=line):
                name, _, value = line.partition("=")
                self.assertEqual(deploy.secrets_in({name: value}), set())

    def test_a_random_look(self) -> None:
        self.assertEqual(deploy.secrets_in({"X": "9f86d081884c7d65"}), {"9f86d081884c7d65"})
        self.assertEqual(deploy.secrets_in({"X": "9f86d081884c7d6"}), set())

    def test_in_urls(self) -> None:
        for url, *secrets in (
            ("redis://:pw@h", "pw"),
            ("amqp://u:p@ss@h/v", "p@ss"),
            ("amqp://u:p/ss@h/v", "p/ss"),
            ("amqp://u:p:ss@h/v", "p:ss"),
            ("amqp://u:p%40ss@h", "p%40ss", "p@ss"),
            ("postgres://user:s3cr3t@db:5432/x amqp://u:other@mq/", "s3cr3t", "other"),
            ("origin https://ghp_0123456789@github.com/x.git", "ghp_0123456789"),
            ("https://ghp_0123456789:@github.com/x.git", "ghp_0123456789"),
            ("ssh://git@github.com/x.git",),
            ("git@github.com:x.git",),
            ("https://h/x?x=1&signature=0a1b2c3d#top", "0a1b2c3d"),
            ("https://h/x?a=1&sig=0a%2Fb%2Fc", "0a%2Fb%2Fc", "0a/b/c"),
            ("so?sig=abcdefgh", "abcdefgh"),
            ("so?sig=abcde",),
            ("Protocol=https;AccountKey=a+b/c==;Suffix=net", "a+b/c=="),
            ("host=localhost password=secretly dbname=x", "secretly"),
        ):
            with self.subTest(url=url):
                self.assertEqual(deploy.secrets_in_url(url), set(secrets))
                self.assertEqual(deploy.secrets_in({"X": url}), set(secrets))

    def test_the_path_of_a_webhook_also_without_its_host(self) -> None:
        hook = "https://hooks.example.com/"
        self.assertEqual(deploy.secrets_in({"DEPLOY_WEBHOOK": hook}), {hook})
        secrets = deploy.secrets_in({"DEPLOY_WEBHOOK": f"{hook}services/T0/B0/x"})
        self.assertEqual(secrets, {f"{hook}services/T0/B0/x", "services/T0/B0/x"})


class RedactorTest(unittest.TestCase):
    def masked(self, text: str, *secrets: str) -> str:
        """What is left of a text, as the user reads it."""
        with speaking() as said:
            deploy.redactor.hide(secrets)
            masked = deploy.redactor.mask(text)
            deploy.say(text, "label")
        self.assertEqual(said.getvalue(), f"label    {masked}\n")
        return masked

    def test_without_secrets_nothing_changes(self) -> None:
        self.assertEqual(self.masked("a b c"), "a b c")
        self.assertEqual(self.masked("a b c", ""), "a b c")

    def test_long_ones_anywhere(self) -> None:
        masked = self.masked("xcorrect-horse-y correct-horse-", "correct-horse-")
        self.assertEqual(masked, "x***y ***")

    def test_short_ones_only_as_whole_words(self) -> None:
        text = "postgres PASSWORD=postgres, u:postgres@h postgresql mypostgres"
        masked = "*** PASSWORD=***, u:***@h postgresql mypostgres"
        self.assertEqual(self.masked(text, "postgres"), masked)

    def test_short_ones_behind_what_is_escaped(self) -> None:
        text = repr("password:\nhunter22") + urllib.parse.quote(" =hunter22")
        self.assertNotIn("hunter22", self.masked(text, "hunter22"))
        self.assertIn("nhunter22", self.masked("nhunter22", "hunter22"))

    def test_the_longest_first(self) -> None:
        masked = self.masked("abcdefghijkl abcdefghi", "abcdefghi", "abcdefghijkl")
        self.assertEqual(masked, "*** ***")

    def test_each_that_was_ever_to_be_hidden(self) -> None:
        redactor = deploy.Redactor()
        redactor.hide({"correct-horse"})
        redactor.hide({"battery-staple"})
        self.assertEqual(redactor.mask("battery-staple of a correct-horse"), "*** of a ***")

    def test_as_other_programs_quote_them(self) -> None:
        for secret in (
            *(
                'it\'s "so" \\ secret',
                'größe\\und"länge',
                "a+b/c=d&e f?g#h",
                "x&k2<q(9>long",
                "ключ-и-замок",
            ),
            *("tab\\tnew\\nline", "日本語の🐍ですね 4711"),
        ):
            for form in (
                *(secret, repr(secret), ascii(secret), str(secret.encode()), f"x{secret}y"),
                *(json.dumps(secret), json.dumps(secret, ensure_ascii=False), shlex.quote(secret)),
                *(urllib.parse.quote(secret), urllib.parse.quote(secret, safe="")),
                urllib.parse.quote_plus(secret),
                json.dumps(secret).replace("/", r"\/"),  # as PHP does it; and Go:
                json.dumps(secret)
                .replace("&", r"\u0026")
                .replace("<", r"\u003c")
                .replace(">", r"\u003e"),
                subprocess.check_output(("bash", "-c", 'printf %q "$0"', secret), text=True),
            ):
                with self.subTest(secret=secret, form=form):
                    masked = self.masked(f"<{form}>", secret)
                    self.assertIn("***", masked)
                    self.assertLessEqual(len(masked), len("<x'***'yb>"), masked)

    def test_in_base64_whatever_stands_before_and_after_it(self) -> None:
        for secret in ("hunter22", "größe\\und", "?>?>?>?>correct-horse"):
            for before in ("", "u", "me", "user:"):
                for encode in (base64.b64encode, base64.urlsafe_b64encode):
                    text = encode(f"{before}{secret}@db".encode()).decode()
                    with self.subTest(text=text):
                        self.assertIn("***", self.masked(f"Basic {text}", secret))

    def test_a_line_of_a_key_that_has_several(self) -> None:
        key = r"-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC\nshort"
        hidden = deploy.secrets_in({"KEY": key})
        self.assertIn("MIIEvQIBADANBgkqhkiG9w0BAQEFAASC", hidden)
        self.assertNotIn("short", hidden)

    def test_one_that_cannot_be_encoded_is_no_error(self) -> None:
        self.assertEqual(self.masked("<a\udc80b-c-d-e-f>", "a\udc80b-c-d-e-f"), "<***>")

    def test_a_pattern_is_no_expression(self) -> None:
        self.assertEqual(self.masked("aaaaaaaaaaaa .*.*.*.*.*", ".*.*.*.*.*"), "aaaaaaaaaaaa ***")
