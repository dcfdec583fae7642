"""The workspace: which releases there are, which of them is live, what is kept, and the history."""
from __future__ import annotations

import json
import os
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import deploy


class WorkspaceTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()
        self.workspace = deploy.Workspace(self.folder / ".deploy")
        self.workspace.make()

    def release(self, name: str, result: str = "live") -> Path:
        """A release with its line in the history."""
        path: Path = self.workspace.releases / name
        path.mkdir(exist_ok=True)
        self.workspace.record({"release": name, "result": result})
        return path

    def names(self, *releases: Path | None) -> list[str]:
        return [each.name if each else "" for each in releases]


class MakeTest(WorkspaceTest):
    def test_it_may_be_made_again_and_git_ignores_it(self) -> None:
        self.workspace.make()
        for folder in (self.workspace.releases, self.workspace.venvs, self.workspace.backups, self.workspace.logs):
            self.assertTrue(folder.is_dir())
        self.assertEqual((self.workspace.root / ".gitignore").read_text(encoding="utf-8"), "*\n")


class HistoryTest(WorkspaceTest):
    def test_there_is_none_yet(self) -> None:
        self.assertEqual(self.workspace.history(), [])
        self.assertEqual(self.workspace.went_live(), [])
        self.assertEqual(self.workspace.entry(None), {})

    def test_what_is_recorded_is_read(self) -> None:
        entries: list[dict[str, object]] = [
            {"release": "1", "subject": "größer\nund \u2028 besser", "steps": {"env": 0.1}}, {"release": "2"}]
        for entry in entries:
            self.workspace.record(entry)
        self.assertEqual(self.workspace.history(), entries)
        self.assertEqual(len(self.workspace.history_file.read_bytes().splitlines()), 2)
        self.assertEqual(self.workspace.history_file.stat().st_mode & 0o777, 0o600)

    def test_a_torn_line_is_passed_over_wherever_it_was_torn(self) -> None:
        whole = json.dumps({"release": "2", "result": "live", "subject": "größe"}, ensure_ascii=False).encode()
        for cut in range(1, len(whole)):
            self.workspace.history_file.write_bytes(b'{"release": "1"}\n' + whole[:cut])
            self.assertEqual(self.workspace.history(), [{"release": "1"}])
            self.workspace.record({"release": "3"})
            self.assertEqual(self.workspace.history(), [{"release": "1"}, {"release": "3"}], whole[:cut])

    def test_a_whole_line_without_its_newline_counts(self) -> None:
        self.workspace.history_file.write_bytes(b'{"release": "1"}')
        self.workspace.record({"release": "2"})
        self.assertEqual(self.workspace.history(), [{"release": "1"}, {"release": "2"}])

    def test_a_block_of_null_bytes_is_passed_over(self) -> None:
        self.workspace.history_file.write_bytes(b'{"release": "1"}\n' + b"\0" * 100)
        self.workspace.record({"release": "2"})
        self.assertEqual(self.workspace.history(), [{"release": "1"}, {"release": "2"}])

    def test_it_is_on_disk_when_record_returns(self) -> None:
        flushed: list[bytes] = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            flushed.append(self.workspace.history_file.read_bytes())

        with mock.patch.object(os, "fsync", fsync):
            self.workspace.record({"release": "1"})
        self.assertEqual(flushed, [b'{"release": "1"}\n'])

    def test_the_last_line_that_made_a_release_live(self) -> None:
        first = self.release("1")
        self.workspace.record({"release": "1", "result": "failed", "by": "a"})
        self.workspace.record({"release": "1", "result": "live", "by": "b"})
        self.workspace.record({"release": "1", "result": "interrupted", "by": "c"})
        self.assertEqual(self.workspace.entry(first)["by"], "b")
        self.assertEqual(self.workspace.entry(self.workspace.releases / "2"), {})


class LinksTest(WorkspaceTest):
    def test_nothing_is_live_yet(self) -> None:
        self.assertIsNone(self.workspace.live())
        self.assertIsNone(self.workspace.linked(self.workspace.previous))

    def test_the_live_one(self) -> None:
        release = self.release("1")
        deploy.point(self.workspace.current, release)
        self.assertEqual(self.workspace.live(), release)
        self.assertEqual(os.readlink(self.workspace.current), "releases/1")
        self.assertTrue(self.workspace.current.samefile(release))

    def test_a_link_to_a_release_that_is_gone(self) -> None:
        release = self.release("1")
        deploy.point(self.workspace.current, release)
        release.rmdir()
        self.assertIsNone(self.workspace.live())

    def test_a_folder_in_the_place_of_the_link(self) -> None:
        self.workspace.current.mkdir()
        self.assertIsNone(self.workspace.live())


class KeptTest(WorkspaceTest):
    def test_only_what_was_once_healthy_and_is_still_there_counts(self) -> None:
        self.release("1")
        self.release("2", "failed")
        self.release("3").rmdir()
        self.release("4", "interrupted")
        self.release("5", "cut off")
        self.release("6")
        self.release("1")
        self.assertEqual(self.names(*self.workspace.healthy()), ["1", "6"])

    def test_the_earlier_one(self) -> None:
        for name, result in (("1", "live"), ("2", "live"), ("3", "failed"), ("4", "live"), ("5", "live")):
            self.release(name, result)
        at = self.workspace.releases
        self.assertEqual(self.names(*(self.workspace.earlier(at / name) for name in "12345")), ["", "1", "2", "2", "4"])
        self.assertIsNone(self.workspace.earlier(None))

    def test_after_going_back_the_earlier_one_is_earlier_still(self) -> None:
        for name in ("1", "2", "3", "2"):
            self.release(name)
        self.assertEqual(self.names(self.workspace.earlier(self.workspace.releases / "2")), ["1"])

    def test_the_newest_the_live_one_and_the_one_before_it_are_kept(self) -> None:
        made = [self.release(name) for name in "12345"]
        self.release("6", "failed")
        self.assertEqual({each.name for each in self.workspace.kept(2)}, {"4", "5"})
        deploy.point(self.workspace.current, made[1])
        deploy.point(self.workspace.previous, made[0])
        self.assertEqual({each.name for each in self.workspace.kept(2)}, {"1", "2", "4", "5"})
        self.assertEqual({each.name for each in self.workspace.kept(99)}, {"1", "2", "3", "4", "5"})

    def test_nothing_is_kept_of_nothing(self) -> None:
        self.assertEqual(self.workspace.kept(5), set())


class PointTest(WorkspaceTest):
    def test_there_is_a_target_at_every_instant(self) -> None:
        first, second = self.release("1"), self.release("2")
        link = self.workspace.current
        deploy.point(link, first)
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
                deploy.point(link, (first, second)[turn % 2])
        finally:
            stop.set()
            watching.join()
        self.assertEqual(missing, [])
        self.assertEqual(seen, {"releases/1", "releases/2"})

    def test_the_link_is_never_taken_away(self) -> None:
        """What is done to the link's own name is one rename."""
        first, second = self.release("1"), self.release("2")
        link = self.workspace.current
        deploy.point(link, first)
        real, renamed = os.replace, []

        def replace(source: Path, target: Path) -> None:
            self.assertEqual(os.readlink(target), "releases/1")
            renamed.append(Path(target))
            real(source, target)

        with mock.patch.object(os, "replace", replace):
            deploy.point(link, second)
        self.assertEqual(renamed, [link])
        self.assertEqual(os.readlink(link), "releases/2")

    def test_what_a_cut_off_one_left_is_no_obstacle(self) -> None:
        first, second = self.release("1"), self.release("2")
        deploy.point(self.workspace.current, first)
        with mock.patch.object(os, "replace", side_effect=KeyboardInterrupt), self.assertRaises(KeyboardInterrupt):
            deploy.point(self.workspace.current, second)
        self.assertEqual(self.workspace.live(), first)
        deploy.point(self.workspace.current, second)
        self.assertEqual(self.workspace.live(), second)
        names = {each.name for each in self.workspace.root.iterdir()}
        self.assertEqual(names, {"releases", "venvs", "backups", "logs", "history.jsonl", ".gitignore", "current"})

    def test_it_still_points_there_when_the_checkout_was_moved(self) -> None:
        deploy.point(self.workspace.current, self.release("1"))
        moved = self.workspace.root.rename(self.folder / "moved")
        self.assertEqual(deploy.Workspace(moved).live(), moved / "releases" / "1")
        self.assertTrue((moved / "current").is_dir())


class ShareTest(WorkspaceTest):
    def setUp(self) -> None:
        super().setUp()
        self.made = self.release("1")

    def share(self, name: str) -> Path:
        deploy.share(self.folder / name, self.made / name, folder=name.endswith("/"))
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
