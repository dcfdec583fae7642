"""The history and the releases: which there are, which of them is live, and what is kept."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import deploy


def entry(release: str = "1", **changes: Any) -> deploy.Entry:
    """A line of the history that made a release live."""
    return deploy.Entry(**{"release": release, "command": "deploy", "result": "live", **changes})


class WorkspaceTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()
        self.workspace = self.folder / ".deploy"
        (self.workspace / "releases").mkdir(parents=True)
        self.history = deploy.History(self.workspace / "history.jsonl")
        self.releases = self.open(self.workspace)

    def open(self, workspace: Path) -> deploy.Releases:
        return deploy.Releases(workspace, self.history, ".", lambda: {"PATH": "/bin"})

    def release(self, name: str, result: str = "live", revision: str = "") -> Path:
        """A release with its line in the history; its revision is its name unless it is given."""
        path = self.releases.folder / name
        path.mkdir(exist_ok=True)
        self.history.record(
            entry(name, result=result, revision=revision or f"r{name}", message=os.urandom(4).hex())
        )
        return path


class HistoryTest(WorkspaceTest):
    def test_there_is_none_yet(self) -> None:
        self.assertEqual((self.history.entries(), self.history.went_live()), ([], []))
        self.assertEqual(self.history.last("1"), deploy.Entry())

    def test_what_is_recorded_is_read(self) -> None:
        entries = [
            entry(subject="größer\nund \u2028 besser", steps={"env": 0.1}, seconds=2.0),
            entry("2"),
        ]
        for each in entries:
            self.history.record(each)
        self.assertEqual(deploy.History(self.history.path).entries(), entries)
        self.assertEqual(len(self.history.path.read_bytes().splitlines()), 2)
        self.assertEqual(self.history.path.stat().st_mode & 0o777, 0o600)

    def test_it_is_recorded_once(self) -> None:
        for _ in range(2):
            self.history.record(entry())
        self.assertEqual(self.history.entries(), [entry()])

    def test_a_torn_line_is_passed_over_wherever_it_was_torn(self) -> None:
        whole = json.dumps(vars(entry("2", subject="größe")), ensure_ascii=False).encode()
        first = json.dumps(vars(entry("1"))).encode()
        for cut in range(1, len(whole), 7):
            self.history.path.write_bytes(first + b"\n" + whole[:cut])
            self.assertEqual(deploy.History(self.history.path).entries(), [entry("1")])
            self.history.record(entry("3"))
            self.assertEqual(self.history.entries(), [entry("1"), entry("3")], whole[:cut])

    def test_odd_lines_are_passed_over(self) -> None:
        good = {"command": "deploy", "result": "live", "release": "1"}
        odd: tuple[Any, ...] = (
            {}, [], 1, None, "x", {"a": 1},
            {**good, "seconds": 10**400}, {**good, "seconds": "1"}, {**good, "seconds": -1},
            {**good, "steps": []}, {**good, "steps": {"env": "x"}}, {**good, "steps": {"env": 1e400}},
            {**good, "release": 5}, {**good, "subject": None}, {**good, "message": ["x"]},
        )  # fmt: skip
        raw = [b"\0" * 100, b"\xff\xfe", b"9" * 400, b"[" * 100_000, b'{"command": "dep']
        lines = [*raw, *(json.dumps(each).encode() for each in odd), json.dumps(good).encode()]
        self.history.path.write_bytes(b"\n".join(lines))
        self.assertEqual(self.history.entries(), [entry("1")])

    def test_what_another_version_wrote_counts(self) -> None:
        self.history.path.write_text(
            '{"release": "1", "command": "deploy", "result": "live", "new": [1]}'
        )
        self.history.record(entry("2"))
        self.assertEqual(self.history.entries(), [entry("1"), entry("2")])

    def test_it_is_on_disk_when_record_returns(self) -> None:
        flushed: list[int] = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            flushed.append(len(self.history.path.read_bytes()))

        with mock.patch.object(os, "fsync", fsync):
            self.history.record(entry())
        self.assertEqual(flushed, [self.history.path.stat().st_size])

    def test_the_last_line_that_made_a_release_live(self) -> None:
        for result, by in (("live", "a"), ("failed", "b"), ("live", "c"), ("interrupted", "d")):
            self.history.record(entry(result=result, by=by))
        self.assertEqual((self.history.last("1").by, self.history.last("2").by), ("c", ""))

    def test_files_are_in_the_order_of_the_runs_though_the_clock_was_set_back(self) -> None:
        for started in ("20261124T100000Z", "20261124T090000Z"):
            self.history.record(entry(started=started))
        names = [
            "20261124T090000Z-b.dump",
            "20261124T080000Z.dump",
            "20261124T100000Z-a.dump",
            "20260101T000000Z",
        ]
        found = self.history.oldest_first(map(Path, names), "20261124T080000Z")
        self.assertEqual([path.name for path in found], [names[3], names[2], names[0], names[1]])


class LinksTest(WorkspaceTest):
    def live(self) -> str:
        live = self.releases.live()
        self.assertEqual(live.name if live else "", self.releases.live_name())
        return self.releases.live_name()

    def test_nothing_is_live_yet(self) -> None:
        self.assertEqual((self.live(), self.releases.linked(self.releases.previous)), ("", ""))

    def test_the_live_one_and_the_one_before(self) -> None:
        for name in "12":
            self.release(name)
        self.releases.switch("2", "1")
        self.assertEqual((self.live(), self.releases.linked(self.releases.previous)), ("2", "1"))
        self.assertEqual(os.readlink(self.releases.current), "releases/2")
        self.releases.switch("1", "")
        self.assertEqual((self.live(), self.releases.linked(self.releases.previous)), ("1", ""))

    def test_a_link_to_a_release_that_is_gone(self) -> None:
        self.release("1").rmdir()
        self.releases.switch("1", "")
        self.assertEqual(self.live(), "")

    def test_a_folder_in_the_place_of_the_link(self) -> None:
        self.releases.current.mkdir()
        self.assertEqual(self.live(), "")

    def test_what_its_commands_need(self) -> None:
        folder = self.release("1")
        opened = self.releases.open(folder)
        self.assertEqual((opened.name, opened.revision, opened.project), ("1", "r1", folder))
        self.assertEqual(opened.environment, {"PATH": "/bin"})
        (folder / ".venv").symlink_to("../../venvs/a")
        opened, venv = self.releases.open(folder), self.workspace / "venvs" / "a"
        self.assertEqual(opened.environment["VIRTUAL_ENV"], str(venv))
        self.assertEqual(opened.environment["PATH"], f"{venv}/bin:/bin")
        self.assertEqual(opened.plus({"A": "b"}).environment["A"], "b")
        self.assertNotIn("A", opened.environment)


class KeptTest(WorkspaceTest):
    def test_only_what_was_once_healthy_and_is_still_there_counts(self) -> None:
        for name, result in (
            ("1", "live"),
            ("2", "failed"),
            ("4", "interrupted"),
            ("5", "cut off"),
            ("6", "live"),
        ):
            self.release(name, result)
        self.release("3").rmdir()
        self.release("1")
        self.assertEqual(self.releases.healthy(), ["1", "6"])

    def back(self, live: str) -> str:
        """Where a rollback goes when this release is live."""
        self.releases.switch(live, "")
        try:
            return self.releases.to_go_back_to("").name
        except deploy.Failure as failure:
            self.assertIn("no earlier healthy release", failure.what)
            return ""

    def test_the_one_to_go_back_to(self) -> None:
        for name, result in (
            ("1", "live"),
            ("2", "live"),
            ("3", "failed"),
            ("4", "live"),
            ("5", "live"),
        ):
            self.release(name, result)
        self.assertEqual([self.back(name) for name in "1245"], ["", "1", "2", "4"])

    def test_after_going_back_it_is_earlier_still(self) -> None:
        for name in ("1", "2", "3", "2"):
            self.release(name)
        self.assertEqual(self.back("2"), "1")

    def test_it_is_of_another_revision(self) -> None:
        for name, revision in (("1", "a"), ("2", "b"), ("3", "b"), ("4", "b")):
            self.release(name, revision=revision)
        self.assertEqual(self.back("4"), "1")
        self.assertEqual(self.releases.to_go_back_to("3").name, "3", "unless it is named")

    def test_the_order_is_the_historys_and_not_that_of_the_names(self) -> None:
        for name in ("9", "8", "7"):
            self.release(name)
        self.assertEqual(self.back("7"), "8")

    def test_one_that_never_was_healthy_is_refused(self) -> None:
        self.release("1", "failed")
        with self.assertRaises(deploy.Failure):
            self.releases.to_go_back_to("1")

    def kept(self, count: int) -> set[str]:
        gone = {path.name for path in self.releases.past_keep(count)}
        return {path.name for path in self.releases.folder.iterdir()} - gone

    def test_the_newest_the_live_one_and_the_one_before_it_are_kept(self) -> None:
        for name in "12345":
            self.release(name)
        self.release("6", "failed")
        self.assertEqual(self.kept(2), {"4", "5"})
        self.releases.switch("2", "1")
        self.assertEqual(self.kept(2), {"1", "2", "4", "5"})
        self.assertEqual(self.kept(99), {"1", "2", "3", "4", "5"})


class PointTest(WorkspaceTest):
    def test_there_is_a_target_at_every_instant(self) -> None:
        first, second = self.release("1"), self.release("2")
        link = self.releases.current
        deploy._link_atomically(link, first)
        stop, seen = threading.Event(), set()
        missing: list[Exception] = []

        def watch() -> None:
            while not stop.is_set():
                try:
                    seen.add(os.readlink(link))
                except OSError as error:
                    missing.append(error)

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            for turn in range(200):
                deploy._link_atomically(link, (first, second)[turn % 2])
        finally:
            stop.set()
            watching.join()
        self.assertEqual(missing, [])
        self.assertEqual(seen, {"releases/1", "releases/2"})

    def test_the_link_is_never_taken_away(self) -> None:
        """What is done to the link's own name is one rename."""
        first, second = self.release("1"), self.release("2")
        link = self.releases.current
        deploy._link_atomically(link, first)
        real, renamed = os.replace, []

        def replace(source: Path, target: Path) -> None:
            self.assertEqual(os.readlink(target), "releases/1")
            renamed.append(Path(target))
            real(source, target)

        with mock.patch.object(os, "replace", replace):
            deploy._link_atomically(link, second)
        self.assertEqual(renamed, [link])
        self.assertEqual(os.readlink(link), "releases/2")

    def test_what_a_cut_off_one_left_is_no_obstacle(self) -> None:
        first, second = self.release("1"), self.release("2")
        deploy._link_atomically(self.releases.current, first)
        with (
            mock.patch.object(os, "replace", side_effect=KeyboardInterrupt),
            self.assertRaises(KeyboardInterrupt),
        ):
            deploy._link_atomically(self.releases.current, second)
        self.assertEqual(self.releases.live_name(), "1")
        deploy._link_atomically(self.releases.current, second)
        self.assertEqual(self.releases.live_name(), "2")
        names = {each.name for each in self.workspace.iterdir()}
        self.assertEqual(names, {"releases", "history.jsonl", "current"})

    def test_it_still_points_there_when_the_checkout_was_moved(self) -> None:
        deploy._link_atomically(self.releases.current, self.release("1"))
        moved = self.workspace.rename(self.folder / "moved")
        self.assertEqual(self.open(moved).live_name(), "1")
        self.assertTrue((moved / "current").is_dir())


class ShareTest(WorkspaceTest):
    def setUp(self) -> None:
        super().setUp()
        self.made = self.release("1")

    def share(self, name: str) -> Path:
        deploy.link_shared(self.folder, self.made, name)
        return self.made / name

    def test_a_file(self) -> None:
        (self.folder / ".env").write_text("A=1\n")
        link = self.share(".env")
        self.assertTrue(link.is_symlink())
        self.assertFalse(os.path.isabs(os.readlink(link)))
        self.assertEqual(link.read_text(), "A=1\n")

    def test_a_file_that_is_not_there_is_not_linked(self) -> None:
        self.assertFalse(os.path.lexists(self.share(".env")))

    def test_a_folder_is_made_where_there_is_none(self) -> None:
        link = self.share("media/photos/")
        (link / "a").write_text("b")
        self.assertEqual((self.folder / "media" / "photos" / "a").read_text(), "b")
        self.assertTrue((self.made / "media" / "photos").is_symlink())

    def test_what_git_has_there_gives_way_and_what_is_shared_stays(self) -> None:
        (self.folder / "media").mkdir()
        (self.folder / "media" / "kept").touch()
        (self.made / "media").mkdir()
        (self.made / "media" / "placeholder").touch()
        (self.folder / ".env").write_text("A=1\n")
        (self.made / ".env").write_text("A=2\n")
        self.assertEqual([each.name for each in self.share("media/").iterdir()], ["kept"])
        self.assertEqual(self.share(".env").read_text(), "A=1\n")

    def test_once_more_changes_nothing(self) -> None:
        (self.folder / "media").mkdir()
        (self.folder / "media" / "kept").touch()
        for _ in range(2):
            self.assertEqual([each.name for each in self.share("media/").iterdir()], ["kept"])
        (self.made / "other").mkdir()
        (self.made / "other" / "stays").touch()
        (self.made / "logs").symlink_to("other")
        self.share("logs/")
        self.assertTrue((self.made / "other" / "stays").exists())

    def test_a_link_of_the_repository_never_leads_it_out_of_the_release(self) -> None:
        (self.folder / "media").mkdir()
        outside = self.folder / "elsewhere" / "media"
        outside.mkdir(parents=True)
        (self.made / "sub").symlink_to(outside.parent)
        (self.folder / "sub").mkdir()
        with self.assertRaisesRegex(deploy.Failure, "leads out of the release"):
            self.share("sub/media/")
        self.assertTrue(outside.is_dir())


if __name__ == "__main__":
    unittest.main()
