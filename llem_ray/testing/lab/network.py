"""The lab's network: a bridge in a namespace of its own, so that the machine's interfaces have no part in it."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Final

from llem_ray.testing.lab.machine import Machine

MAX_HOSTS: Final = 200


class Switch:
    """Connects hosts; each host is a number from 1 on, which gives its address."""

    def __init__(self, lab: str, log: Path) -> None:
        # The bridge is unreachable from outside: equal networks of two labs do no harm, different ones are easier to tell apart.
        self._net = secrets.randbelow(256)
        self._machine = Machine(lab, log=log)
        try:
            self._ip("link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0", "link set br0 up")
        except BaseException:
            self._machine.kill()
            raise

    def address(self, number: int) -> str:
        """The IP address of a host."""
        return f"10.77.{self._net}.{number}"

    def connect(self, number: int, machine: Machine) -> None:
        """Give a machine ``eth0`` with its address, and no route out."""
        self.disconnect(number)
        mac = f"02:4c:4d:{self._net:02x}:00:{number:02x}"  # the same after a restart: neighbours remember it
        self._ip(
            f"link add p{number} type veth peer name eth0 address {mac} netns {machine.pid}",
            f"link set p{number} master br0 up",
        )
        lines = ("link set lo up", "link set eth0 up", f"addr add {self.address(number)}/24 dev eth0")
        machine.in_network("ip", "-batch", "-", text="\n".join(lines) + "\n")

    def disconnect(self, number: int) -> None:
        """Remove a host's port where there is one; the kernel is slow to do so after the host's end."""
        with contextlib.suppress(RuntimeError):
            self._ip(f"link del p{number}")

    def cut(self, number: int) -> None:
        """Pull a host's cable."""
        self._ip(f"link set p{number} down")

    def heal(self, number: int) -> None:
        """Plug it in again."""
        self._ip(f"link set p{number} up")

    def close(self) -> None:
        """Remove the network."""
        self._machine.kill()

    def _ip(self, *lines: str) -> None:
        self._machine.in_network("ip", "-batch", "-", text="\n".join(lines) + "\n")
