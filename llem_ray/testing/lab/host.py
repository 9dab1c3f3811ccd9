"""A host of a running lab."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from llem_ray.testing.lab.machine import Entered, Machine, Process
from llem_ray.testing.lab.ray_node import OBJECT_STORE_BYTES
from llem_ray.testing.lab.spec import HostSpec
from llem_ray.testing.nvml import Scenario


class Host:
    """A host of a running lab."""

    def __init__(self, spec: HostSpec, *, number: int, ip: str, folder: Path, scenario: Scenario, environment: Mapping[str, str]):
        self.spec = spec
        self.name = spec.name
        self.ip = ip
        self.folder = folder
        self.scenario = scenario
        """What its fake NVML pretends; its clock is CLOCK_REALTIME."""
        self.environment: Mapping[str, str] = MappingProxyType(dict(environment))
        """Environment of everything on this host."""
        self.number = number
        self._machine: Machine | None = None
        self.ray: Entered | None = None
        self.ray_starts = 0
        self._boots = 0

    @property
    def host_id(self) -> str:
        """Its LLEM_RAY_HOST_ID, which stays the same when it restarts."""
        return self.environment["LLEM_RAY_HOST_ID"]

    @property
    def alive(self) -> bool:
        """Whether it is switched on."""
        return self._machine is not None and self._machine.alive

    @property
    def pid(self) -> int:
        """Its init process, as the creator of the lab sees it.

        Raises:
            RuntimeError: It is switched off.
        """
        return self.machine.pid

    @property
    def raylet_alive(self) -> bool:
        """Whether a raylet runs on it."""
        return any(process.name == "raylet" for process in self.processes())

    def processes(self) -> tuple[Process, ...]:
        """What runs on it; nothing when it is switched off."""
        return self._machine.processes() if self._machine is not None else ()

    @property
    def machine(self) -> Machine:
        """Its namespaces.

        Raises:
            RuntimeError: It is switched off.
        """
        if self._machine is None or not self._machine.alive:
            raise RuntimeError(f"{self.name} is switched off")
        return self._machine

    def boot(self, lab: str, hosts_file: Path, monotonic_offset_s: int) -> None:
        """Switch it on, with an empty /tmp/ray and no network yet."""
        self._boots += 1
        scratch = self.folder / f"tmp-ray-{self._boots}"
        scratch.mkdir()
        shm_bytes = OBJECT_STORE_BYTES + 64 * 2**20
        mounts = (
            ("--bind", str(scratch), "/tmp/ray"),  # noqa: S108
            ("-t", "tmpfs", "-o", f"size={shm_bytes}", "tmpfs", "/dev/shm"),  # noqa: S108
            ("--bind", str(hosts_file), "/etc/hosts"),
        )
        log = self.folder / "init.log"
        self._machine = Machine(lab, log=log, hostname=self.name, mounts=mounts, monotonic_offset_s=monotonic_offset_s)

    def off(self) -> None:
        """Switch it off; harmless where it is."""
        if self._machine is not None:
            self._machine.kill()

    @property
    def ray_log(self) -> Path:
        """What its latest ``ray start`` says."""
        return self.folder / f"ray-{self.ray_starts}.log"
