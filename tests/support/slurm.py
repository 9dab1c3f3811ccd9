"""A Slurm of a few lines: sbatch, srun and scontrol whose nodes are the hosts of a lab."""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llem_ray.testing.lab import Lab

SCONTROL = """#!/bin/sh
[ "$1 $2" = "show hostnames" ] || exit 1
echo "$3" | tr , '\\n'
"""

SRUN = """#!{python}
# Asks the test to run the command on a node; passes signals on, and its exit code back.
import array, json, os, signal, socket, sys

options = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[1 + next(i for i, word in enumerate(sys.argv[1:]) if not word.startswith("--")):]
asked = {{"options": options, "command": command, "env": dict(os.environ), "cwd": os.getcwd()}}
with socket.socket(socket.AF_UNIX) as link:
    link.connect({address!r})
    link.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2]))])
    link.sendall(json.dumps(asked).encode() + b"\\n")
    signal.signal(signal.SIGTERM, lambda *_: link.sendall(b"TERM\\n"))
    sys.exit(int(link.makefile().readline() or 1))
"""


class FakeSlurm:
    """Runs batch scripts on the first node of an allocation, and their `srun` on the others.

    Args:
        lab: Its hosts, without Ray, are the nodes.
        folder: For its commands and socket; its path must be short.
        deaf: Nodes on which `srun` never starts anything.
    """

    def __init__(self, lab: Lab, folder: Path, deaf: Sequence[str] = ()) -> None:
        self._lab, self._deaf = lab, set(deaf)
        self._bin = folder / "bin"
        self._bin.mkdir(parents=True)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(folder / "s"))
        self._server.listen()
        for name, text in (("scontrol", SCONTROL), ("srun", SRUN.format(python=sys.executable, address=str(folder / "s")))):
            (self._bin / name).write_text(text)
            (self._bin / name).chmod(0o755)
        self.steps: list[list[str]] = []
        """Options of every `srun`."""
        threading.Thread(target=self._accept, daemon=True).start()

    def sbatch(
        self, script: Path, *arguments: object, nodes: Sequence[str], job: int, cwd: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a batch script on the first node; it sees the variables that Slurm sets."""
        first = self._lab.hosts[nodes[0]]
        path = f"{self._bin}{os.pathsep}{first.environment['PATH']}"
        given = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": ",".join(nodes), "SLURM_SUBMIT_DIR": str(cwd), "PATH": path}
        given |= {"SLURM_CPUS_ON_NODE": "4", **(env or {})}
        command = ["bash", str(script), *map(str, arguments)]
        return self._lab.popen(nodes[0], command, env=given, cwd=Path("/"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self._server.accept()
                threading.Thread(target=self._step, args=(link,), daemon=True).start()

    def _step(self, link: socket.socket) -> None:
        _, ancillary, *_ = link.recvmsg(1, 64)
        fds = array.array("i", ancillary[0][2])
        lines = link.makefile()
        asked: dict[str, Any] = json.loads(lines.readline())
        self.steps.append(asked["options"])
        (node,) = (option.partition("=")[2] for option in asked["options"] if option.startswith("--nodelist="))
        if node in self._deaf:
            lines.readline()
            link.sendall(b"143\n")
            return
        # What differs between the hosts, such as their GPUs, is the node's own; the rest goes with the step.
        here = self._lab.hosts[node].environment
        own = {name for host in self._lab.hosts.values() for name, value in host.environment.items() if here.get(name) != value}
        env = {name: value for name, value in asked["env"].items() if name not in own}
        process = self._lab.popen(node, asked["command"], env=env, cwd=Path(asked["cwd"]), stdout=fds[0], stderr=fds[1])
        for fd in fds:
            os.close(fd)
        threading.Thread(target=self._relay, args=(lines, process), daemon=True).start()
        code = process.wait()
        with contextlib.suppress(OSError):
            link.sendall(f"{code}\n".encode())

    @staticmethod
    def _relay(lines: Any, process: subprocess.Popen[str]) -> None:
        for line in lines:
            if line == "TERM\n" and process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """No more steps."""
        self._server.close()
