"""`sudo python3 deploy.py setup` in place of an installation that runs in the checkout, as a script left it."""

from __future__ import annotations

import unittest

from tests.server.bench import require
from tests.server.site import CHECKOUT, SETUP, WORKSPACE, Site, SiteCase, Watch, record

UNIT = f"""\
[Unit]
Description=gunicorn daemon
After=network.target

[Service]
User=ubuntu
Group=www-data
WorkingDirectory={CHECKOUT}
EnvironmentFile={CHECKOUT}/.env
ExecStart={CHECKOUT}/.venv/bin/gunicorn --workers 3 --bind 127.0.0.1:8000 forms.wsgi:application
Restart=always

[Install]
WantedBy=multi-user.target
"""
NGINX = """\
server {
    listen 80;
    server_name gforms.example.com;
    location /static/ { alias /home/ubuntu/gforms/staticfiles/; }
    location / {
        proxy_pass http://127.0.0.1:8000;
        proxy_set_header Host $host;
    }
}
"""
INSTALL = """\
set -e
PIPENV_VENV_IN_PROJECT=1 pipenv install --deploy
docker compose up --detach --wait
set -a; . ./.env; set +a
.venv/bin/python manage.py migrate --noinput
.venv/bin/python manage.py collectstatic --noinput
"""
ENABLE = """\
set -e
chmod o+x /home/ubuntu
rm /etc/nginx/sites-enabled/default
ln -s ../sites-available/gforms /etc/nginx/sites-enabled/
nginx -t
systemctl reload nginx
systemctl daemon-reload
systemctl enable --now gunicorn
"""
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
        require()
        self.site = site = Site()
        self.addCleanup(site.close)
        site.boot()
        site.prepare()
        site.run(INSTALL, user="ubuntu", cwd=CHECKOUT, timeout=300)
        site.put("/etc/systemd/system/gunicorn.service", UNIT)
        site.put("/etc/nginx/sites-available/gforms", NGINX)
        site.run(ENABLE)
        site.await_page()

    def test_takeover(self) -> None:
        """A set-up that fails at its end puts all back; the next one loses requests for a moment only."""
        site, before = self.site, self.state()
        compose = site.read(f"{CHECKOUT}/docker-compose.yml")
        site.put(f"{CHECKOUT}/docker-compose.yml", "no compose file", user="ubuntu")
        run = site.operate(SETUP)
        self.assertEqual(run.status, 1, run.text)
        self.assertRegex(
            run.last,
            "FAILED: .* deploy .*docker compose .*; what it had changed was put back.*; mend",
        )
        site.await_page()  # the old unit has started before it listens
        self.assertEqual((site.version(), self.state()), ("1", before))
        site.put(f"{CHECKOUT}/docker-compose.yml", compose, user="ubuntu")
        with site.watched("/") as watch:
            watch.run = run = site.operate(SETUP)
            site.await_rest()
        record(watch.told("takeover"))
        self.assertEqual((run.status, site.late()), (0, "1 1"), run.text)
        self.assertEqual(site.http(site.style()).status, 200)
        place = site.run(
            "readlink /proc/$(systemctl show --value --property=MainPID gunicorn)/cwd"
        ).stdout.strip()
        self.assertEqual(place, f"{WORKSPACE}/releases/{site.current()}")
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
        self.assertEqual(
            (early, [one for one in watch.lost if one.began > behind + slack]), ([], [])
        )


if __name__ == "__main__":
    unittest.main()
