"""A network of its own that machines are plugged into: what stands in it sees them, and they see one another."""

from __future__ import annotations

import subprocess
from typing import Self

from tests.server.machine import Machine, await_network, dies_with_us


class Network:
    """A bridge in a network namespace; a context manager. Nothing of it touches this computer's network."""

    def __init__(self, *addresses: str) -> None:
        """Make it, with these addresses (10.9.0.1/24) of its own."""
        self._process = subprocess.Popen(
            dies_with_us("unshare", "--net", "sleep", "infinity"), stdin=subprocess.DEVNULL
        )
        await_network(self._process.pid)
        self._plugs = 0
        self._ip("link set lo up")
        self._ip("link add lan type bridge")
        self._ip("link set lan up")
        for address in addresses:
            self._ip(f"address add {address} dev lan")

    @property
    def path(self) -> str:
        """The file of the namespace."""
        return f"/proc/{self._process.pid}/ns/net"

    def inside(self, *command: str) -> list[str]:
        """Return the command line that runs a program of this computer in the network."""
        return ["nsenter", f"--net={self.path}", "--", *command]

    def _ip(self, words: str) -> None:
        """Change the network."""
        subprocess.run(self.inside("ip", *words.split()), check=True, timeout=10)

    def plug(self, machine: Machine, address: str) -> None:
        """Give a machine that is on a card in this network."""
        self._plugs += 1
        port = f"port{self._plugs}"
        self._ip(f"link add {port} master lan type veth peer name lan0 netns {machine.pid}")
        self._ip(f"link set {port} up")
        machine.run(f"ip address add {address} dev lan0 && ip link set lan0 up")

    def __enter__(self) -> Self:
        """Use it for a block."""
        return self

    def __exit__(self, *failure: object) -> None:
        """End it, and every card in it."""
        self.close()

    def close(self) -> None:
        """End it, and every card in it."""
        self._process.kill()
        self._process.wait()
