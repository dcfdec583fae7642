"""Random `.env` files that are accepted, as systemd and Compose themselves read them."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import deploy
from tests import faults
from tests.server.bench import ServerCase

FILES = 300
UNIT = """[Service]
Type=oneshot
EnvironmentFile=/read/%i.env
ExecStart=/usr/bin/env -0
StandardOutput=file:/read/%i.systemd
"""
# Writes the files that it gets on its stdin, has both read them, and tells what they read.
READ = """
import json, pathlib, subprocess, sys
folder = pathlib.Path("/read")
texts = json.load(sys.stdin)
for at, text in enumerate(texts):
    (folder / f"{at}.env").write_bytes(text.encode())
services = {f"s{at}": {"image": "x", "env_file": f"/read/{at}.env"} for at in range(len(texts))}
(folder / "compose.json").write_text(json.dumps({"name": "read", "services": services}))
subprocess.run(["systemctl", "daemon-reload"], check=True)
subprocess.run(["systemctl", "start", *[f"read@{at}" for at in range(len(texts))]])
config = ["docker", "compose", "-f", "/read/compose.json", "config", "--format", "json"]
said = json.loads(subprocess.run(config, check=True, capture_output=True).stdout)["services"]
systemd = [(folder / f"{at}.systemd").read_bytes().decode().split("\\0") for at in range(len(texts))]
print(json.dumps([systemd, [said[f"s{at}"].get("environment") or {} for at in range(len(texts))]]))
"""


class ReadAlike(ServerCase):
    def test_what_is_accepted(self) -> None:
        accepted = faults.in_env(random.Random(20261124), faults.Row("accepted"), 10 * FILES)
        texts = [each.decode() for each in dict.fromkeys(accepted) if len(each) < 10_000][:FILES]
        self.assertEqual(len(texts), FILES)
        self.server.run("mkdir -p /read")
        self.server.put("/etc/systemd/system/read@.service", UNIT)
        self.server.put("/read/read.py", READ)
        said = self.server.run("python3 /read/read.py", stdin=json.dumps(texts), timeout=300)
        systemd, compose = json.loads(said.stdout)
        path = Path(self.enterContext(tempfile.TemporaryDirectory()), ".env")
        path.touch(0o600)
        for text, of_systemd, of_compose in zip(texts, systemd, compose, strict=True):
            with self.subTest(text):
                path.write_bytes(text.encode())
                values = deploy.read_env(path)
                there = dict(each.split("=", 1) for each in of_systemd if "=" in each)
                self.assertEqual({name: there.get(name) for name in values}, values, "systemd")
                shown = {name: value.replace("$", "$$") for name, value in values.items()}
                self.assertEqual(of_compose, shown, "Compose")
