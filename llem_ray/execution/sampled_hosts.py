"""What is known of every host that was sampled: its devices, their samples, its clock."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from llem_ray.core.power import Calibration, Device, DeviceState, SamplerInfo, Trace
from llem_ray.core.units import ns_from_s
from llem_ray.energy.estimator import edge_margin_s
from llem_ray.execution.clocks import ClockTable
from llem_ray.power.traces import TraceBuffer


@dataclass(slots=True)
class SampledHost:
    """What is known of a host that was ever sampled."""

    buffer: TraceBuffer
    infos: dict[str, SamplerInfo]
    devices: tuple[Device, ...] = ()
    of_device: dict[str, SamplerInfo] = field(default_factory=dict)
    margins_s: dict[str, float] = field(default_factory=dict)
    """By UUID, once asked for."""
    samples_per_s: float = 0.0

    def take(self, key: str, info: SamplerInfo) -> None:
        """Learn what a sampler of the host reads; one of the same key takes the place of the one before."""
        self.infos[key] = info
        self.devices = tuple(device for known in self.infos.values() for device in known.devices)
        self.of_device = {device.uuid: known for known in reversed(self.infos.values()) for device in known.devices}
        self.margins_s = {}
        self.samples_per_s = sum(
            1.0 / known.periods_s.get(device.uuid, 1.0 / known.sample_hz)
            for known in self.infos.values()
            for device in known.devices
            if device.method != "unavailable"
        )


class SampledHosts:
    """Answers from any thread; what is known comes from whoever fetches it.

    Args:
        own_host: Stable id of the run driver's host.
        sample_hz: Polls per second, where a sampler does not say.
    """

    def __init__(self, own_host: str, sample_hz: float) -> None:
        self._sample_hz = sample_hz
        self._lock = threading.RLock()
        self._known: dict[str, SampledHost] = {}
        self._generations: dict[str, int] = {}
        self._restarted_ns: dict[str, int] = {}
        self.clocks = ClockTable(own_host)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Every host that was ever sampled in this session."""
        with self._lock:
            return tuple(self._known)

    def generation(self, host: str) -> int:
        """Counts the restarts of a host, whose clock and counters begin anew each time."""
        return self._generations.get(host, 0)

    def restarted_ns(self, host: str) -> int | None:
        """When the latest restart of a host was noticed, on the run driver's clock; None when there was none."""
        return self._restarted_ns.get(host)

    def devices(self, host: str) -> tuple[Device, ...]:
        """Devices that the host's samplers read."""
        known = self._known.get(host)
        return known.devices if known else ()

    def hostname(self, host: str) -> str:
        """Name of a host for people."""
        known = self._known.get(host)
        return next((info.hostname for info in known.infos.values()), host) if known else host

    def _info(self, host: str, uuid: str) -> SamplerInfo | None:
        known = self._known.get(host)
        return known.of_device.get(uuid) if known else None

    def calibration(self, host: str, device: Device) -> Calibration:
        """What calibration found, or nothing known."""
        info = self._info(host, device.uuid)
        known = info.calibrations.get(device.uuid) if info else None
        return known or Calibration(
            device_uuid=device.uuid, tick_period_s=None, has_instant=False, has_average=False, lag_s=0.0, call_s=0.0
        )

    def period_s(self, host: str, device: Device) -> float:
        """Time between two polls of the device."""
        info = self._info(host, device.uuid)
        return (info.periods_s if info else {}).get(device.uuid, 1.0 / self._sample_hz)

    def margin_s(self, host: str, device: Device) -> float:
        """How much of the trace around an edge makes the estimate there final."""
        known = self._known.get(host)
        margins_s = known.margins_s if known else {}
        if device.uuid not in margins_s:
            margins_s[device.uuid] = edge_margin_s(self.calibration(host, device), self.period_s(host, device), device.method)
        return margins_s[device.uuid]

    def reach_s(self, host: str) -> float:
        """The largest margin of the host's devices."""
        return max((self.margin_s(host, device) for device in self.devices(host)), default=0.0)

    def trace(self, host: str, uuid: str, begin_ns: int, end_ns: int) -> Trace:
        """Samples of one device; times on its host's clock."""
        return self._known[host].buffer.trace(uuid, begin_ns, end_ns)

    def states(self, host: str, uuid: str, begin_ns: int, end_ns: int) -> tuple[DeviceState, ...]:
        """Slow-lane readings of one device."""
        return self._known[host].buffer.states(uuid, begin_ns, end_ns)

    def errors(self, host: str, uuid: str, begin_ns: int, end_ns: int) -> tuple[tuple[int, str], ...]:
        """(t_ns, why) of the device's samples that lack a reading."""
        return self._known[host].buffer.errors(uuid, begin_ns, end_ns)

    def last_ns(self, host: str, uuid: str) -> int | None:
        """Time of the newest sample of one device, on its host's clock; None before the first."""
        return self._known[host].buffer.last_ns(uuid)

    def is_sampled_until(self, t_ns: int, hosts: Collection[str] | None = None) -> bool:
        """Every device of the hosts has been sampled far enough past ``t_ns`` of our clock for an edge there to be final."""
        for host in self.hosts if hosts is None else hosts:
            host_ns = self.clocks.to_host(host, t_ns)
            if host_ns is None or host not in self._known:
                return False
            if any(final_ns is None or final_ns < host_ns for final_ns in self._final_ns(host)):
                return False
        return True

    def sampled_until(self, host: str) -> int | None:
        """Up to when edges on a host are final, on our clock; None when that is not known, or nothing is sampled there."""
        finals_ns = list(self._final_ns(host))
        known_ns = [final_ns for final_ns in finals_ns if final_ns is not None]
        return self.clocks.to_own(host, min(known_ns)) if known_ns and len(known_ns) == len(finals_ns) else None

    def _final_ns(self, host: str) -> Iterator[int | None]:
        """Up to when edges are final for each of the host's devices, on its clock; None for one that was not sampled yet."""
        buffer = self._known[host].buffer
        for device in self.devices(host):
            if device.method != "unavailable":
                last_ns = buffer.last_ns(device.uuid)
                # An estimate is held up to half-way to its neighbour: one reading beyond the edge settles it.
                margin_s = 0.0 if device.method == "estimated_model" else self.margin_s(host, device)
                yield None if last_ns is None else last_ns - ns_from_s(margin_s)

    def trim(self, host: str, before_ns: int) -> None:
        """Forget samples of a host, older than ``before_ns`` of its clock, that nobody needs any more."""
        self._known[host].buffer.trim(before_ns)
