"""A push that changes deploy.py or deploy.ini is deployed by the new version, or refused."""

from __future__ import annotations

from tests.lab import PROJECT, LabTest, with_setting

TOOL = (PROJECT / "deploy.py").read_text()


def marked(marker: str) -> str:
    """A deploy.py that says so when it starts."""
    return f"{TOOL[: TOOL.rindex('if __name__ ==')]}print('{marker}', flush=True)\nraise SystemExit(main())\n"


class SelfUpdate(LabTest):
    def test_the_new_tool_deploys_its_own_push(self) -> None:
        self.lab.push({"app": "two", "deploy.py": marked("the new tool")})
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertEqual(
            [run.stdout.count(each) for each in ("starting over", "the new tool")], [1, 1]
        )
        self.assertEqual(self.lab.results(), ["live", "live"])
        self.assertNotIn("cut off", run.stdout)
        self.assert_only_good_releases()

    def test_new_settings_hold_for_their_own_push(self) -> None:
        settings = (self.lab.author / "deploy.ini").read_text()
        settings = with_setting(settings, "static", "before", "echo the new setting")
        self.lab.push({"app": "two", "deploy.ini": settings})
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertEqual(
            [run.stdout.count(each) for each in ("starting over", "| the new setting")], [1, 1]
        )
        self.assertEqual(self.lab.results(), ["live", "live"])

    def test_the_arguments_are_kept(self) -> None:
        self.lab.push({"app": "two", "deploy.py": marked("the new tool")})
        run = self.lab.deploy("-c", "deploy.ini", "deploy", "--if-changed")
        self.assert_deployed(run, "two")
        self.assertIn("the new tool", run.stdout)
        self.lab.deploy("--if-changed")
        self.assertEqual(self.lab.results(), ["live", "live"])

    def test_the_log_tells_of_both(self) -> None:
        self.lab.push({"app": "two", "deploy.py": marked("the new tool")})
        run = self.lab.deploy()
        self.assertIn("starting over", self.lab.log())
        self.assertIn(run.stdout.splitlines()[-1], self.lab.log())

    def test_nobody_gets_in_between(self) -> None:
        self.lab.push({"app": "two", "deploy.py": marked("the new tool")})
        self.lab.block_git("fetch")
        self.lab.script("services", "block services")
        first = self.lab.blocked("pull")
        waiting = self.lab.start("--wait", "60")
        self.lab.await_waiting(waiting)
        self.lab.unblock("pull")
        self.lab.await_blocked("services", first)
        self.assert_sentence(self.lab.deploy(), 75, [f"process {first.pid}", "at services"])
        self.assertIsNone(waiting.poll())
        self.lab.script("services", "")
        self.lab.unblock("services")
        for process in (first, waiting):
            self.assert_status(self.lab.end(process), 0)
        self.assertEqual(self.lab.results(), ["live"] * 3)


class RefusedUpdate(LabTest):
    """What could never pull what mends it is not let in."""

    def refused(self, files: dict[str, str | None], *lines: str) -> None:
        before = {name: (self.lab.author / name).read_text() for name in files}
        self.lab.push({"app": "two", **files})
        with self.nothing_touched():
            run = self.lab.deploy()
        self.assert_failed(
            run, "the deploy.py or the settings file of this revision does not work", status=78
        )
        for line in lines:
            self.assertIn(line, run.stdout)
        self.lab.push({"app": "three", **before})
        self.assert_deployed(self.lab.deploy(), "three")

    def test_a_syntax_error_in_the_tool(self) -> None:
        self.refused({"deploy.py": TOOL + "\ndef\n"}, "SyntaxError")

    def test_a_mistake_in_the_settings(self) -> None:
        ini = (self.lab.author / "deploy.ini").read_text()
        self.refused(
            {"deploy.ini": ini + "[halth]\n"}, "[halth] is not a section; did you mean health?"
        )

    def test_settings_that_are_gone(self) -> None:
        self.refused({"deploy.ini": None})

    def test_a_tool_that_is_gone(self) -> None:
        self.refused({"deploy.py": None})
