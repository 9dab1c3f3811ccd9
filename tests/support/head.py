"""A real Ray head of our own: its ports, its folder, its token, gone with the test."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llem_ray.core.ports import reserve_port

TOKEN = "a-token-of-the-tests-that-is-long-enough"
DEADLINE_S = 90


@dataclass(frozen=True, kw_only=True)
class Head:
    address: str
    """HOST:PORT."""
    jobs_address: str
    token_file: Path
    agent_port: int
    """Of the dashboard agent, on 127.0.0.1."""


@contextlib.contextmanager
def ray_head(*, dashboard: bool) -> Iterator[Head]:
    """A head with one CPU that demands ``TOKEN``. Never `ray stop`: it would end every Ray of this machine."""
    folder = Path(tempfile.mkdtemp(prefix="llem-head-", dir="/tmp"))
    (folder / "token").write_text(TOKEN + "\n")
    port, jobs_port, client_port, agent_port = (reserve_port() for _ in range(4))
    address = _own_address()
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += [f"--node-ip-address={address}", f"--temp-dir={folder}", "--num-cpus=1", "--object-store-memory=80000000"]
    command += [f"--ray-client-server-port={client_port}", f"--include-dashboard={dashboard}", f"--dashboard-port={jobs_port}"]
    command += [f"--dashboard-agent-listen-port={agent_port}"]  # with a port that is taken no job is ever run
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    log = folder / "start.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        _wait_for(process, log)
        yield Head(
            address=f"{address}:{port}",
            jobs_address=f"http://127.0.0.1:{jobs_port}",
            token_file=folder / "token",
            agent_port=agent_port,
        )
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def _own_address() -> str:
    """The address that Ray would choose; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
