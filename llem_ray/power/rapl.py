"""Energy of CPU packages and their DRAM from RAPL, through Linux's powercap files (Intel and AMD)."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.errors import PowerPermissionDenied, SourceUnavailable
from llem_ray.core.power import Device, DeviceState, PowerSample, Scope
from llem_ray.core.units import ns_from_s

POWERCAP_ROOT: Final = Path("/sys/class/powercap")
PROBE_S: Final = 1.0
"""A counter that stands still while the CPU is busy for this long does not work."""

UJ_PER_MJ: Final = 1000.0
PERMISSION_HINT: Final = (
    "reading RAPL needs root: run `sudo chmod -R a+r /sys/class/powercap/intel-rapl*` once per boot, "
    "or give the process CAP_DAC_READ_SEARCH"
)
_BUSYWORK: Final = bytes(4 << 20)
_ZONE_FAMILIES: Final = ("intel-rapl", "intel-rapl-mmio")
"""In order of preference: the second mirrors the first on some client chips. AMD uses the first, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Zone:
    """One energy counter of powercap."""

    name: str
    """``package-0``, or ``package-0:dram``."""
    scope: Scope
    path: Path
    range_uj: int
    """Largest value of the counter; it wraps to 0 after it."""


class RaplSource:
    """CPU packages and DRAM, and nothing that they contain or that contains them (core, uncore, psys).

    Devices are ``rapl:package-0``, ``rapl:package-0:dram`` and so on, with an energy counter in mJ whose wraps are undone
    (d = (e1 - e0) mod (range + 1), which holds as long as it is read at least once a wrap: 22 min at 200 W).
    A counter that does not move in a busy second is listed as ``unavailable``: masked counters read as a constant.

    Args:
        root: Powercap folder; ``LLEM_RAY_POWERCAP_ROOT`` if set, else /sys/class/powercap. In a container: where the host's
            /sys/devices/virtual/powercap is mounted; the first consists of links into that, which lead nowhere elsewhere.
        clock: Clock that stamps the samples.
        probe_s: How long to keep the CPU busy while a counter stands still.

    Raises:
        SourceUnavailable: There is no RAPL here, or none of its counters moves.
        PowerPermissionDenied: This user may not read it.
    """

    name = "rapl"
    max_hz = 500.0
    lag_s = 0.001
    """The hardware refreshes its counters about every ms."""

    def __init__(self, root: Path | None = None, *, clock: Clock | None = None, probe_s: float = PROBE_S) -> None:
        self._clock = clock or SystemClock()
        self._root = root or Path(os.environ.get("LLEM_RAY_POWERCAP_ROOT") or POWERCAP_ROOT)
        zones = find_zones(self._root)
        self._counters: list[_Counter] = []
        try:
            for zone in zones:
                self._counters.append(_Counter(zone))
            moving = self._find_moving(probe_s)
        except BaseException:
            self.close()
            raise
        self._reasons = {
            counter.zone.name: f"counter stood still for {probe_s:g} s of a busy CPU: masked or not implemented"
            for counter in self._counters
            if counter.zone.name not in moving
        }
        if not moving:
            self.close()
            raise SourceUnavailable(f"RAPL: {next(iter(self._reasons.values()))} (all of {', '.join(self._reasons)})")

    def devices(self) -> tuple[Device, ...]:
        """Packages and their DRAM, in the order of the powercap files."""
        return tuple(
            Device(
                uuid=f"{self.name}:{counter.zone.name}",
                name=f"RAPL {counter.zone.name}",
                source=self.name,
                scope=counter.zone.scope,
                method="unavailable" if counter.zone.name in self._reasons else "measured_counter",
                index=i,
                counter_quantum_mj=1 / UJ_PER_MJ,
                reason=self._reasons.get(counter.zone.name),
            )
            for i, counter in enumerate(self._counters)
        )

    def read(self) -> Sequence[PowerSample]:
        """One sample a zone: the unwrapped counter, no instant power."""
        return [self._read_one(counter) for counter in self._counters]

    def read_states(self) -> Sequence[DeviceState]:
        """None: RAPL has no slow readings."""
        return ()

    def close(self) -> None:
        """Close the counters' files; may be called more than once."""
        for counter in self._counters:
            counter.close()

    def _read_one(self, counter: _Counter) -> PowerSample:
        energy_mj, error = None, self._reasons.get(counter.zone.name)
        before_ns = self._clock.monotonic_ns()
        if error is None:
            try:
                energy_mj = counter.read_uj() / UJ_PER_MJ
            except (OSError, ValueError) as failure:
                error = f"{counter.zone.path}: {failure}"
        after_ns = self._clock.monotonic_ns()
        return PowerSample(
            t_ns=(before_ns + after_ns) // 2,
            hw_ns=(after_ns - before_ns + 1) // 2,
            device_uuid=f"{self.name}:{counter.zone.name}",
            power_mw=None,
            power_avg_mw=None,
            energy_mj=energy_mj,
            error=error,
        )

    def _find_moving(self, probe_s: float) -> set[str]:
        """Names of the zones whose counter moved; keeps the CPU busy until all have, or for ``probe_s``."""
        first = {counter.zone.name: counter.read_uj() for counter in self._counters}
        moving: set[str] = set()
        end_ns = time.monotonic_ns() + ns_from_s(probe_s)
        while len(moving) < len(first):
            hashlib.sha256(_BUSYWORK)  # keeps the CPU busy without holding up the other threads of this process
            moving |= {counter.zone.name for counter in self._counters if counter.read_uj() != first[counter.zone.name]}
            if time.monotonic_ns() >= end_ns:
                break
        return moving


class _Counter:
    """An open energy file and the sum of what was counted since the first read."""

    def __init__(self, zone: Zone) -> None:
        self.zone = zone
        try:
            self._fd: int | None = os.open(zone.path, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise PowerPermissionDenied(f"RAPL: {zone.path} may not be read", PERMISSION_HINT) from error
        self._register: int | None = None
        self._total_uj = 0

    def read_uj(self) -> int:
        if self._fd is None:
            raise OSError("counter is closed")
        register = int(os.pread(self._fd, 64, 0))
        if self._register is None:
            self._total_uj = register
        else:
            self._total_uj += (register - self._register) % (self.zone.range_uj + 1)
        self._register = register
        return self._total_uj

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def find_zones(root: Path) -> tuple[Zone, ...]:
    """Packages and their DRAM under a powercap folder, each once.

    Raises:
        SourceUnavailable: There are none.
        PowerPermissionDenied: Their description may not be read.
    """
    zones: dict[str, Zone] = {}
    try:
        for family in _ZONE_FAMILIES:
            for zone in _family_zones(root, family):
                zones.setdefault(zone.name, zone)
    except PermissionError as error:
        raise PowerPermissionDenied(f"RAPL: {error.filename} may not be read", PERMISSION_HINT) from error
    except (OSError, ValueError) as error:
        raise SourceUnavailable(f"RAPL: {root} is not understood: {error}") from error
    if not zones:
        raise SourceUnavailable(
            f"RAPL: no CPU package under {root}",
            "virtual machines have none; in a container, mount the host's /sys/devices/virtual/powercap, "
            "and set LLEM_RAY_POWERCAP_ROOT to where it is mounted",
        )
    return tuple(zones.values())


def _family_zones(root: Path, family: str) -> Iterator[Zone]:
    folders = _zone_folders(root, family)
    names = {key: (folder / "name").read_text().strip() for key, folder in folders.items()}
    for key, name in names.items():
        if len(key) == 1 and name.startswith("package"):
            yield _zone(folders[key], name, "cpu_package")
            for sub_key, sub_name in names.items():
                if len(sub_key) == 2 and sub_key[:1] == key and sub_name == "dram":
                    yield _zone(folders[sub_key], f"{name}:dram", "dram")


def _zone_folders(root: Path, family: str) -> Mapping[tuple[int, ...], Path]:
    """(package,) or (package, subzone) -> the zone's folder, in numeric order.

    They lie beside each other in /sys/class/powercap, and below the family and the package in /sys/devices/virtual/powercap.
    """
    zones = f"{family}:*"
    paths = [*root.glob(zones), *root.glob(f"{family}/{zones}"), *root.glob(f"{family}/{zones}/{zones}")]
    return dict(sorted((tuple(int(part) for part in path.name.split(":")[1:]), path) for path in paths))


def _zone(folder: Path, name: str, scope: Scope) -> Zone:
    range_uj = int((folder / "max_energy_range_uj").read_text())
    return Zone(name=name, scope=scope, path=folder / "energy_uj", range_uj=range_uj)
