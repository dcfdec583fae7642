"""`sudo python3 deploy.py setup` in place of an installation that runs in the checkout, as a script left it."""

from __future__ import annotations

import unittest

from tests.server.site import CHECKOUT, SETUP, WORKSPACE, SiteCase, Watch, record

# The files of the server with owner, mode and size, and what systemd has of the site.
STATE = r"""
find /etc ! -type d -printf '%p %u:%g %m %s %l\n' | sort
stat --format='%n %a' /home/ubuntu
systemctl is-active gunicorn gunicorn.socket gunicorn-standby
"""


class TakeoverTest(SiteCase):
    """The site goes on, is refused for a moment when the socket takes its port, and is a release from then on."""

    def setUp(self) -> None:
        """Install as the original script's server is: in the checkout, which gunicorn itself runs in."""
        self.boot_site().serve_in_place()

    def test_takeover(self) -> None:
        """A set-up that fails at its end puts all back; the next one loses requests for a moment only."""
        site, before = self.site, self.state()
        compose = site.read(f"{CHECKOUT}/docker-compose.yml")
        site.put(f"{CHECKOUT}/docker-compose.yml", "no compose file", user="ubuntu")
        run = site.operate(SETUP)
        self.assertEqual(run.status, 1, run.text)
        said = "FAILED: .* deploy .*docker compose .*; what it had changed was put back.*; mend"
        self.assertRegex(run.last, said)
        site.await_page()  # the old unit has started before it listens
        self.assertEqual((site.version(), self.state()), ("1", before))
        site.put(f"{CHECKOUT}/docker-compose.yml", compose, user="ubuntu")
        with site.watched("/") as watch:
            watch.run = run = site.operate(SETUP)
            site.await_rest()
        record(watch.told("takeover"))
        self.assertEqual((run.status, site.late()), (0, "1 1"), run.text)
        self.assertEqual(site.http(site.style()).status, 200)
        at = "readlink /proc/$(systemctl show --value --property=MainPID gunicorn)/cwd"
        self.assertEqual(site.run(at).stdout.strip(), f"{WORKSPACE}/releases/{site.current()}")
        self.refused_for_a_moment(watch)

    def state(self) -> list[str]:
        """Return the state of all that a set-up may change."""
        return self.site.run(STATE, check=False).stdout.splitlines()

    def refused_for_a_moment(self, watch: Watch) -> None:
        """See that requests were lost only between the end of the old server and its start behind the socket."""
        stopped = watch.run.when("systemctl stop gunicorn.socket gunicorn")
        behind = watch.run.when("systemctl start gunicorn")
        record(f"takeover: refused for {behind - stopped:.2f} s at most")
        self.assertLess(behind, watch.run.ended)
        slack = 1.0  # the two lines come here through ssh
        early = [one for one in watch.lost if one.began + one.seconds < stopped - slack]
        late = [one for one in watch.lost if one.began > behind + slack]
        self.assertEqual((early, late), ([], []))


if __name__ == "__main__":
    unittest.main()
