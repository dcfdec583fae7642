"""`.env`: each accepted line has one value, the one that systemd reads too; each refused one says how to write it."""
from __future__ import annotations

import contextlib
import io
import json
import os
import random
import tempfile
import unittest
import urllib.parse
from pathlib import Path

import deploy

# (line, value)
GOOD = (
    ("A=", ""), ("A=''", ""), ('A=""', ""),
    ("A=plain", "plain"), ("A='plain'", "plain"), ('A="plain"', "plain"),
    ("A=two words", "two words"), ("A='  two  words '", "  two  words "), ('A=" "', " "), ("A=' '", " "),
    ("A=a=b==", "a=b=="), ("A==", "="), ("A='='", "="),
    ("A=a#b", "a#b"), ("A='#b'", "#b"), ('A="a #b"', "a #b"), ("A='a # b'", "a # b"),
    ("A='p$X-w'", "p$X-w"), ("A='${HOME}'", "${HOME}"), ("A='$(id)'", "$(id)"), ("A='pa$$wd'", "pa$$wd"),
    (r"A='a\nb'", r"a\nb"), (r"A='C:\new'", r"C:\new"), (r"A='a\\b'", r"a\\b"),
    ("A=\"it's\"", "it's"), ("A='say \"hi\"'", 'say "hi"'), ("A=`id`", "`id`"), ('A="`id`"', "`id`"),
    ("A=x&y;z|w<>()*?[]{}~!%^", "x&y;z|w<>()*?[]{}~!%^"), ("A=;", ";"), ("A=-", "-"),
    ("A=größe €", "größe €"), ("A='日本語 🐍'", "日本語 🐍"), ("A=e\u0301", "e\u0301"),
    ("A=postgres://u:p@localhost:5432/db?x=1", "postgres://u:p@localhost:5432/db?x=1"),
    ("A=export", "export"), ("A=" + "x" * 100_000, "x" * 100_000), ("A='{\"a\": 1}'", '{"a": 1}'),
)

# (line, part of the advice)
BAD = (
    ("\ufeffA=b", "byte order mark: save the file as UTF-8 without one"),
    ("A=b\r", r"sed -i 's/\r$//'"), ("\r", r"sed -i 's/\r$//'"), ("# c\r", r"sed -i 's/\r$//'"),
    ("A", "NAME=value"), ("A: b", "no colon"), ("export A=b", "no export"), (" A=b", "no space before the name"),
    ("A =b", "around ="), ("\tA=b", "no space before the name"), ("1A=b", "NAME=value"), ("A-B=c", "NAME=value"),
    ("A.B=c", "NAME=value"), ("Ä=b", "NAME=value"), ("=b", "NAME=value"), ("; a comment", "NAME=value"),
    (" # a comment", "NAME=value"), ("\t", "NAME=value"), ("A'B'=c", "NAME=value"),
    ("A=a$b", "write A='…'"), ('A="a$b"', "write A='…'"), ("A=${X}", "write A='…'"), ("A=$(id)", "write A='…'"),
    (r"A=a\b", "write A='…'"), (r'A="a\nb"', "write A='…'"), ("A=\\", "write A='…'"), (r'A="a\\"', "write A='…'"),
    (r"A='a\'", "no way of writing it is safe"), ("A='\\'", "no way of writing it is safe"),
    ("A=foo # c", "write A='…'"), ("A=foo\t# c", "control character"), ("A=#foo", "write A='…'"),
    ("A=it's", "A=\"…\" when it holds a '"), ('A=say "hi"', "write A='…'"), ("A=a'b'", "write A='…'"),
    ("A= b", "remove it, or write A='…'"), ("A=b ", "remove it, or write A='…'"), ("A=\u00a0b", "write A='…'"),
    ("A='b", "must end with the quote"), ("A=b'", "holds a quote"), ("A='", "must end with the quote"),
    ('A="', "must end with the quote"), ("A='b\"", "must end with the quote"), ("A='b' ", "must end with the quote"),
    ("A='b' # c", "must end with the quote"), ("A='b'c", "must end with the quote"), ("A='b''c'", "no other '"),
    ('A="b"c"', 'no other "'), ("A=\"a\\\"b\"", 'no other "'),
    ("A=a\tb", "control character"), ("A='a\x00b'", "control character"), ("A=\x1b[0m", "control character"),
    ("A='a\x7f'", "control character"), ("A='a\rb'", "control character"), ("A='a\x0bb'", "control character"),
    ("A=\ufdd0", "control character"), ("A=a\uffff", "control character"), ("A='a\U0001fffe'", "control character"),
    ("# c \\", "hides the next line"), ("# c \\\\", "hides the next line"),
)

NASTY = "AB_=='\"\\ #;$`\t\r\x00\x0b\x7f\u00a0\u0085\u2028\ufeff\ufffe\U0001ffffé€0:{}()exportx"
WHITESPACE, NEWLINES = " \t\n\r", "\n\r"


class Invalid(Exception):
    """What systemd does not read."""


def encodable(text: str) -> bool:
    """systemd takes no surrogates and none of Unicode's noncharacters."""
    return not any(0xD800 <= ord(c) <= 0xDFFF or 0xFDD0 <= ord(c) <= 0xFDEF or ord(c) & 0xFFFE == 0xFFFE for c in text)


def systemd(text: str) -> dict[str, str]:
    """What systemd reads in an EnvironmentFile, by the states that systemd.exec(5) describes."""
    if "\0" in text:
        raise Invalid("systemd reads no file with a null byte")
    found: dict[str, str] = {}
    state, key, value, kept = "before the key", "", "", 0  # `kept`: characters of the value that are not stripped
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
            state, kept = {'"': "before the value", "\\": "escape in quotes"}.get(c, state), len(value)
        elif state == "escape in quotes":
            value += c if c in '"\\`$' else "" if c == "\n" else f"\\{c}"
            state, kept = '"', len(value)
        elif state == "comment":
            state = "escape in a comment" if c == "\\" else "before the key" if c in NEWLINES else state
        else:
            state = "comment"
    if state not in ("before the key", "comment", "key"):
        raise Invalid(f"the file ends in the state {state!r}")
    return found


class EnvTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name) / ".env"

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


class LinesTest(EnvTest):
    def test_good_lines_have_exact_values(self) -> None:
        for line, value in GOOD:
            with self.subTest(line=line[:60]):
                self.assertEqual(self.read(f"{line}\n"), {"A": value})
                self.assertEqual(self.read(line), {"A": value}, "without a newline at the end")

    def test_systemd_reads_the_good_lines_alike(self) -> None:
        for line, value in GOOD:
            with self.subTest(line=line[:60]):
                self.assertEqual(systemd(f"{line}\n"), {"A": value})

    def test_bad_lines_have_their_number_and_the_way_to_write_them(self) -> None:
        for line, advice in BAD:
            with self.subTest(line=line):
                failure = self.refusal(f"{line}\n" if line.startswith("\ufeff") else f"\n# fine\n{line}\nZ=1\n")
                at = 1 if line.startswith("\ufeff") else 3
                self.assertEqual(len(failure.details), 1, failure.details)
                self.assertTrue(failure.details[0].startswith(f"{self.path}, line {at}: "), failure.details)
                self.assertIn(advice, failure.details[0])

    def test_lines_that_say_nothing(self) -> None:
        self.assertEqual(self.read(""), {})
        self.assertEqual(self.read("\n\n   \n#\n# A=b\n#A='\n# größe $X \" ' \n\n"), {})

    def test_values_keep_their_order_and_their_newline_is_not_part_of_them(self) -> None:
        self.assertEqual(list(self.read("B=1\n_A1=2\na=3\n").items()), [("B", "1"), ("_A1", "2"), ("a", "3")])

    def test_every_mistake_in_one_go(self) -> None:
        failure = self.refusal("A=1\nexport B=2\n\nC='x\nA=3\nD=a$b\nD=4\nE=5\n")
        self.assertEqual([line.split(": ")[0].rsplit(" ", 1)[1] for line in failure.details], ["2", "4", "5", "6", "7"])
        self.assertIn("5 mistakes", failure.what)
        self.assertIn("A is set a second time", failure.details[2])
        self.assertIn("D is set a second time", failure.details[4])

    def test_no_refusal_shows_a_value(self) -> None:
        for line in ("hunter2", "PASS: hunter2", "export PASS=hunter2", "PASS= hunter2", "PASS=hunter2$",
                     "PASS='hunter2", "PASS=hunter2 # c", "PASS=hunter2\\", "PASS=hunter2\r", "PASS=hunter2\x07",
                     " PASS=hunter2"):
            with self.subTest(line=line):
                failure = self.refusal(f"{line}\n")
                self.assertNotIn("hunter2", " ".join((failure.what, failure.remedy, *failure.details)))


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
        self.assertIn("line 3: not UTF-8", failure.what)


class SystemdTest(EnvTest):
    def test_the_reference_reads_as_systemd_does(self) -> None:
        """What was measured of systemd 252 and 257, and what systemd.exec(5) says."""
        for text, value in (("A=p$X-w", "p$X-w"), ("A='p${X}w'", "p${X}w"), (r'A="a\nb"', r"a\nb"), (r"A=a\b", "ab"),
                            ("A=foo # c", "foo # c"), ("A = foo", "foo"), ("A=foo bar", "foo bar"), ("A=x&y", "x&y"),
                            ("A=foo\r", "foo"), ("A=a\\\nb", "ab"), ("A='a\nb'", "a\nb"), ("A='a'\"b\"c ", "abc"),
                            ('A="a\\"b\\$\\`\\\\c\\\nd"', 'a"b$`\\cd'), ("A='a ' ", "a "), ("# x\\\ny\nA=1", "1")):
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
            lines = ["".join((dice.choice(("", "#", "A=", "B='", 'C="', "D", " ", ";")),
                              *dice.choices(NASTY, k=dice.randrange(5)), dice.choice(("", "", "'", '"'))))
                     for _ in range(dice.randrange(1, 4))]
            accepted += self.agree("\n".join(lines))
        self.assertGreater(accepted, 1000)

    def test_comments_that_would_say_something_to_systemd(self) -> None:
        for text in ("# a\rB=1", "# a\\", "# a\\\nB=1", "# \0\nB=1", "#\\\r\nB=1"):
            with self.subTest(text=text):
                self.agree(text)


class SecretsTest(unittest.TestCase):
    def test_values_by_the_name_of_their_variable(self) -> None:
        for name in ("SECRET_KEY", "DEFAULT_DB_PASSWORD", "db_passwd", "API_TOKEN", "AWS_ACCESS_KEY_ID", "PGPWD",
                     "CREDENTIALS", "PrivateKey", "HASH_SALT", "SENTRY_DSN", "SLACK_WEBHOOK"):
            with self.subTest(name=name):
                self.assertEqual(deploy.secrets_in({name: "a-value"}), {"a-value"})

    def test_what_is_no_secret(self) -> None:
        for name, value in (("DEBUG", "True"), ("USE_AUTH", "True"), ("SECRET_KEY", ""), ("KEEP_TOKENS", "0"),
                            ("DEFAULT_DB_USER", "gforms"), ("DEFAULT_DB_HOST", "localhost"), ("DB_PORT", "5432"),
                            ("ALLOWED_HOSTS", "gforms.example.org"), ("TITLE", "a plain and quite long sentence"),
                            ("SITE_URL", "http://localhost/path"), ("NUMBER", "12345678901234567890")):
            with self.subTest(name=name):
                self.assertEqual(deploy.secrets_in({name: value}), set())

    def test_a_random_look(self) -> None:
        self.assertEqual(deploy.secrets_in({"X": "9f86d081884c7d65"}), {"9f86d081884c7d65"})
        self.assertEqual(deploy.secrets_in({"X": "9f86d081884c7d6"}), set())

    def test_passwords_in_urls(self) -> None:
        self.assertEqual(deploy.secrets_in({"X": "redis://:pw@h"}), {"pw"})
        self.assertIn("s3cr3t", deploy.secrets_in({"X": "postgres://user:s3cr3t@db:5432/x amqp://u:other@mq/"}))
        self.assertIn("other", deploy.secrets_in({"X": "postgres://user:s3cr3t@db:5432/x amqp://u:other@mq/"}))


class MaskTest(unittest.TestCase):
    def masked(self, text: str, *secrets: str) -> str:
        output = deploy.Output()
        output.hide(secrets)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            output.say(text, "label")
        found = said.getvalue()
        self.assertTrue(found.startswith("label ") and found.endswith("\n"), found)
        return found[9:-1]

    def test_without_secrets_nothing_changes(self) -> None:
        self.assertEqual(self.masked("a b c"), "a b c")

    def test_long_ones_anywhere(self) -> None:
        self.assertEqual(self.masked("xcorrect-horse-y correct-horse-", "correct-horse-"), "x***y ***")

    def test_short_ones_only_as_whole_words(self) -> None:
        self.assertEqual(self.masked("postgres PASSWORD=postgres, u:postgres@h postgresql mypostgres", "postgres"),
                         "*** PASSWORD=***, u:***@h postgresql mypostgres")

    def test_the_longest_first(self) -> None:
        self.assertEqual(self.masked("abcdefghijkl abcdefghi", "abcdefghi", "abcdefghijkl"), "*** ***")

    def test_as_other_programs_quote_them(self) -> None:
        for secret in ("it's \"so\" \\ secret", "größe-und-länge", "a+b/c=d&e f?g#h", "tab\\tnew\\nline",
                       "ключ-и-замок"):
            forms = (secret, repr(secret), json.dumps(secret), json.dumps(secret, ensure_ascii=False),
                     str(secret.encode()), urllib.parse.quote(secret, safe=""), f"x{secret}y")
            for form in forms:
                with self.subTest(secret=secret, form=form):
                    masked = self.masked(f"<{form}>", secret)
                    self.assertIn("***", masked)
                    self.assertLessEqual(len(masked), len("<x'***'yb>"), masked)

    def test_a_pattern_is_no_expression(self) -> None:
        self.assertEqual(self.masked("aaaaaaaaaaaa .*.*.*.*.*", ".*.*.*.*.*"), "aaaaaaaaaaaa ***")

    def test_what_is_said_is_masked_in_the_log_and_on_stdout(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            reading, writing = os.pipe()
            saved = os.dup(1)
            os.dup2(writing, 1)
            try:
                output = deploy.Output()
                output.hide({"correct-horse"})
                output.open_log(Path(folder) / "log")
                output.say("the password is correct-horse, or correct%2Dhorse")
            finally:
                os.dup2(saved, 1)
                for each in (saved, writing):
                    os.close(each)
            with open(reading, encoding="utf-8") as pipe:
                shown = pipe.read()
            log = (Path(folder) / "log").read_text(encoding="utf-8")
            self.assertIsNotNone(output.log)
            if output.log:
                output.log.close()
        for text in (shown, log):
            self.assertIn("the password is ***", text)
            self.assertNotIn("correct-horse", text)
