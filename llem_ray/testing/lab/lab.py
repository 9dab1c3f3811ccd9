"""The lab: boots hosts, wires them, starts Ray on them, breaks them, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

from llem_ray.testing.lab import machine as machines
from llem_ray.testing.lab.host import Host
from llem_ray.testing.lab.machine import END_S, Entered, Process, cleanup_stale, read_to_end, tail
from llem_ray.testing.lab.network import MAX_HOSTS, Switch
from llem_ray.testing.lab.ray_node import (
    FAST_HEALTH,
    GCS_PORT,
    JOBS_PORT,
    STARTED,
    host_environment,
    ray_command,
    start_command,
)
from llem_ray.testing.lab.spec import HostSpec
from llem_ray.testing.nvml import Scenario, build, default_cache

START_S: Final = 120.0
"""Deadline for a raylet to start, on a busy machine."""
_POLL_S: Final = 0.05
_DRIVER_NOT_LOADED: Final = 9


class Lab:
    """Hosts with namespaces of their own, as a context manager; the cluster is up when it is entered.

    The hosts reach each other, and nothing else; nothing else reaches them. They see the machine's file system, but
    have their own /tmp/ray, /dev/shm and HOME. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER is unset on them.

    Args:
        hosts: The hosts; their names differ.
        head: The one with the GCS; default: the first that joins. Without one that joins there is no Ray.
        folder: Where the lab puts its own folder, which it removes at the end.
        env: Environment variables of all hosts; those of a HostSpec go before.
        token: Ray's token; None: no authentication; by default a random one.
        fast_health: The head takes silent hosts for dead after about 10 s instead of a minute.
        dashboard: Run the dashboard, and with it the Jobs API, on the head.

    Raises:
        ValueError: The hosts cannot be a lab.
        RuntimeError: A host did not start; the text has the end of its log.
    """

    def __init__(
        self,
        hosts: Sequence[HostSpec],
        *,
        folder: Path,
        head: str | None = None,
        env: Mapping[str, str] | None = None,
        token: str | None = "",
        fast_health: bool = True,
        dashboard: bool = False,
    ) -> None:
        names = [spec.name for spec in hosts]
        if not 1 <= len(names) <= MAX_HOSTS or len(set(names)) != len(names):
            raise ValueError(f"a lab has 1 to {MAX_HOSTS} hosts of different names, not {names}")
        joining = [spec.name for spec in hosts if spec.joins]
        if head is not None and head not in joining:
            raise ValueError(f"the head must be a host that joins ({', '.join(joining) or 'there is none'}), not {head!r}")
        self.name = f"lab-{os.getpid()}-{secrets.token_hex(3)}"
        self.token = secrets.token_hex(32) if token == "" else token
        self.head = head or (joining[0] if joining else None)
        self._specs = tuple(hosts)
        self._folder = folder.resolve() / self.name
        self._env = dict(env or {})
        self._fast_health = fast_health
        self._dashboard = dashboard
        self._switch: Switch | None = None
        self._hosts: dict[str, Host] = {}
        self._entered: list[Entered] = []

    @staticmethod
    def why_not() -> str | None:
        """Why a lab cannot be had here, or None."""
        if ray_command() is None:
            return "a lab needs the ray command beside this interpreter"
        return machines.why_not()

    @property
    def hosts(self) -> Mapping[str, Host]:
        """The hosts by name."""
        return MappingProxyType(self._hosts)

    @property
    def address(self) -> str:
        """Address of the GCS, as drivers on the hosts use it."""
        return f"{self._head().ip}:{GCS_PORT}"

    @property
    def jobs_address(self) -> str:
        """URL of the Jobs API, as programs on the hosts use it.

        Raises:
            RuntimeError: The lab has no dashboard.
        """
        if not self._dashboard:
            raise RuntimeError("this lab has no Jobs API: it needs dashboard=True")
        return f"http://{self._head().ip}:{JOBS_PORT}"

    def __enter__(self) -> Self:
        try:
            self._set_up()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def run(
        self,
        host: str,
        command: Sequence[str],
        *,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host until it ends.

        Raises:
            TimeoutError: It took longer than ``timeout_s`` and was killed; the text has the end of its output.
            RuntimeError: The host is switched off.
        """
        process = self.popen(host, command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = read_to_end(process, timeout_s)
        return subprocess.CompletedProcess(list(command), process.returncode, out, err)

    def popen(
        self, host: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, **options: Any
    ) -> Entered:
        """Start a command on a host, in a session of its own; signals to what is returned reach the command.

        Args:
            host: The host's name.
            command: The command.
            env: Environment variables beside the host's.
            cwd: Its working directory; default: this process's.
            options: Further options of Popen.
        """
        target = self._hosts[host]
        options.setdefault("stdin", subprocess.DEVNULL)
        merged = {**target.environment, **(env or {})}
        process = target.machine.enter(command, env=merged, cwd=cwd or Path.cwd(), **options)
        self._entered = [known for known in self._entered if known.poll() is None] + [process]
        return process

    def pids(self, host: str) -> tuple[Process, ...]:
        """What runs on a host, with pids as this process sees them."""
        return self._hosts[host].processes()

    def kill_raylet(self, host: str) -> None:
        """SIGKILL the raylet. What ``ray start`` started beside it then ends, on the head also the GCS."""
        for process in self.pids(host):
            if process.name == "raylet":
                os.kill(process.pid, signal.SIGKILL)
        _await(lambda: not self._hosts[host].raylet_alive, END_S, f"{host}: the raylet's end")

    def start_raylet(self, host: str) -> None:
        """Start Ray on a host whose raylet is gone, and wait until it has joined.

        Raises:
            RuntimeError: A raylet runs there, or it did not start.
        """
        target = self._hosts[host]
        if target.raylet_alive:
            raise RuntimeError(f"{host} has a raylet")
        self._start_ray(target)
        self._await_ray(target)

    def kill_host(self, host: str, *, silent: bool = False) -> None:
        """Switch a host off: everything on it is killed at once.

        Args:
            host: The host's name.
            silent: Take it off the network first. Otherwise the kernel closes its connections, as that of a machine that is
                shut down does, and peers know at once.
        """
        target, switch = self._hosts[host], self._wired()
        if silent:
            switch.cut(target.number)
        there = [process for process in self._entered if process.machine is target.machine]
        target.off()
        switch.disconnect(target.number)
        _reap(there)

    def restart_host(self, host: str, *, monotonic_offset_s: int | None = None) -> None:
        """Switch a host on again, with the same address and host id and an empty /tmp/ray; its raylet joins as a new node.

        Args:
            host: The host's name; it is switched off first where it is on.
            monotonic_offset_s: A new shift of its clock; default: the old one.
        """
        target = self._hosts[host]
        if target.alive:
            self.kill_host(host)
        self._boot(target, target.spec.monotonic_offset_s if monotonic_offset_s is None else monotonic_offset_s)
        if target.spec.joins:
            self._start_ray(target)
            self._await_ray(target)

    def cut_link(self, host: str) -> None:
        """Pull a host's network cable."""
        self._wired().cut(self._hosts[host].number)

    def heal_link(self, host: str) -> None:
        """Plug a host's network cable in again."""
        self._wired().heal(self._hosts[host].number)

    def truth_j(self, host: str, uuid: str, begin_realtime_ns: int, end_realtime_ns: int) -> float:
        """True energy of one GPU between two stamps of CLOCK_REALTIME, J.

        Raises:
            KeyError: The host has no such GPU.
        """
        scenario = self._hosts[host].scenario
        return scenario.energy_j(uuid, scenario.seconds(begin_realtime_ns), scenario.seconds(end_realtime_ns))

    def _set_up(self) -> None:
        if reason := self.why_not():
            raise RuntimeError(reason)
        cleanup_stale()
        self._folder.mkdir(parents=True)
        self._switch = Switch(self.name, self._folder / "switch.log")
        library = build(default_cache()) if self._needs_nvml() else None
        origin_ns = time.time_ns()
        for number, spec in enumerate(self._specs, start=1):
            self._hosts[spec.name] = self._make(spec, number, library, origin_ns)
        lines = ["127.0.0.1 localhost", *(f"{host.ip} {host.name}" for host in self._hosts.values())]
        (self._folder / "hosts").write_text("\n".join(lines) + "\n", encoding="ascii")
        for host in self._hosts.values():
            self._boot(host, host.spec.monotonic_offset_s)
        if self.head is not None:
            self._start_cluster()

    def _start_cluster(self) -> None:
        head = self._head()
        self._start_ray(head)
        self._await_ray(head, ready=lambda: head.machine.listens(GCS_PORT))
        for host in self._joining():
            if host is not head:
                self._start_ray(host)
        for host in self._joining():
            self._await_ray(host)

    def _needs_nvml(self) -> bool:
        return _real_driver() or any(spec.gpus for spec in self._specs)

    def _make(self, spec: HostSpec, number: int, library: Path | None, origin_ns: int) -> Host:
        assert self._switch is not None
        folder = self._folder / spec.name
        home = folder / "home"
        home.mkdir(parents=True)
        # Where the machine has a real driver, a host without GPUs must not see its GPUs.
        scenario = Scenario(
            gpus=spec.gpus, clock="realtime", origin_ns=origin_ns, init_code=0 if spec.gpus else _DRIVER_NOT_LOADED
        )
        environment = host_environment(
            spec,
            host_id=f"{self.name}-{spec.name}",
            home=home,
            library=library if spec.gpus or _real_driver() else None,
            scenario=scenario.write(folder / "nvml.txt"),
            token=self.token,
            env=self._env,
        )
        ip = self._switch.address(number)
        return Host(spec, number=number, ip=ip, folder=folder, scenario=scenario, environment=environment)

    def _boot(self, host: Host, monotonic_offset_s: int) -> None:
        host.boot(self.name, self._folder / "hosts", monotonic_offset_s)
        self._wired().connect(host.number, host.machine)

    def _start_ray(self, host: Host) -> None:
        if host.ray is not None:
            _await(lambda: host.ray is None or host.ray.poll() is not None, START_S, f"{host.name}: the end of its old Ray")
        host.ray_starts += 1
        head = self._head()
        env = {"PYTHONUNBUFFERED": "1"} | (FAST_HEALTH if self._fast_health and host is head else {})
        command = start_command(host.spec, host.ip, head_ip=head.ip, dashboard=self._dashboard)
        with host.ray_log.open("wb") as log:
            host.ray = self.popen(host.name, command, env=env, stdout=log, stderr=subprocess.STDOUT)

    def _await_ray(self, host: Host, ready: Callable[[], bool] | None = None) -> None:
        log, deadline = host.ray_log, time.monotonic() + START_S
        ready = ready or (lambda: STARTED in log.read_text(encoding="utf-8", errors="replace"))
        while not ready():
            if host.ray is None or host.ray.poll() is not None:
                raise RuntimeError(f"{host.name}: `ray start` ended; the end of what it said:\n{tail(log)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{host.name}: Ray is not up after {START_S:g} s; the end of its log:\n{tail(log)}")
            time.sleep(_POLL_S)

    def _joining(self) -> Iterable[Host]:
        return [host for host in self._hosts.values() if host.spec.joins]

    def _head(self) -> Host:
        if self.head is None or self.head not in self._hosts:
            raise RuntimeError("this lab runs no Ray: it is not entered, or none of its hosts joins")
        return self._hosts[self.head]

    def _wired(self) -> Switch:
        if self._switch is None:
            raise RuntimeError("the lab is not entered")
        return self._switch

    def _close(self) -> None:
        with contextlib.ExitStack() as steps:  # runs all of them, the last first, whatever fails
            steps.callback(shutil.rmtree, self._folder, ignore_errors=True)
            if self._switch is not None:
                steps.callback(self._switch.close)
            steps.callback(_reap, self._entered)
            for host in self._hosts.values():
                steps.callback(host.off)


def _real_driver() -> bool:
    return Path("/proc/driver/nvidia").exists()


def _await(done: Callable[[], bool], deadline_s: float, what: str) -> None:
    deadline = time.monotonic() + deadline_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {deadline_s:g} s for {what}")
        time.sleep(_POLL_S)


def _reap(processes: Iterable[Entered]) -> None:
    """Collect the commands that died with a host."""
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
