"""Nodes of a pretended cluster: hosts with clocks of their own, and samplers of GPUs whose energy is known exactly.

Nobody runs the samplers: what they would have read is computed when it is fetched.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import numpy as np

from llem_ray import __version__
from llem_ray.core.errors import EngineDied, PowerError
from llem_ray.core.power import Calibration, Device, Float64, SampleBatch, SamplerInfo, Scope
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.execution.calls import Call, Fetched, Node, SamplerSettings
from llem_ray.testing.loads import Segment, SegmentLoad

T = TypeVar("T")

TICK_S: Final = 0.1
POLL_S: Final = 0.047
"""Not in step with the ticks."""
INSTANT_S: Final = 0.025
AVERAGE_S: Final = 1.0


def swinging(mean_w: float, swing_w: float, period_s: float, *, length_s: float = 900.0) -> SegmentLoad:
    """A triangle of power around a mean for ``length_s`` from now on, on this host's clock; constant outside."""
    begin_s, half_s = time.monotonic(), period_s / 2
    turns = range(round(length_s / half_s))
    return SegmentLoad(Segment(begin_s + turn * half_s, mean_w + (swing_w if turn % 2 else -swing_w), "linear") for turn in turns)


@dataclass(frozen=True, kw_only=True, slots=True)
class PretendDevice:
    """A device and its true power, as a function of this process's clock in s."""

    uuid: str
    load: SegmentLoad
    scope: Scope = "gpu"
    source: str = "nvml"
    tick_phase_s: float = 0.0
    """When its counter ticks: at this plus multiples of 0.1 s."""
    base_mj: float = 5e9
    """What its counter showed at time 0 of ``load``."""
    memory_bytes: int | None = None
    """All memory of a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretendHost:
    """A machine from one boot to the next."""

    name: str
    """Its stable id, and its host name."""
    devices: tuple[PretendDevice, ...] = ()
    offset_s: float = 0.0
    """Its clock less ours, when this object is made."""
    drift_ppm: float = 0.0
    """How much faster than ours its clock is."""
    made_ns: int = field(default_factory=time.monotonic_ns)

    @property
    def gpus(self) -> tuple[PretendDevice, ...]:
        """Those of its devices that are GPUs."""
        return tuple(device for device in self.devices if device.scope == "gpu")

    def to_host(self, ours_ns: int) -> int:
        """Our clock to its clock."""
        return ours_ns + ns_from_s(self.offset_s) + round((ours_ns - self.made_ns) * self.drift_ppm * 1e-6)

    def to_ours(self, host_ns: int) -> int:
        """Its clock to ours."""
        since_ns = host_ns - self.made_ns - ns_from_s(self.offset_s)
        return self.made_ns + since_ns - round(since_ns * self.drift_ppm * 1e-6 / (1 + self.drift_ppm * 1e-6))

    def monotonic_ns(self) -> int:
        """Now, on its clock."""
        return self.to_host(time.monotonic_ns())

    def sleep_until_ns(self, t_ns: int) -> None:
        """Return once its clock shows ``t_ns``."""
        while (left_ns := t_ns - self.monotonic_ns()) > 0:
            time.sleep(left_ns / NS_PER_S)

    def true_j(self, uuid: str, begin_ns: int, end_ns: int) -> float:
        """What a device really spent between two times of the host's clock, J."""
        load = next(device.load for device in self.devices if device.uuid == uuid)
        return load.energy_j(self.to_ours(begin_ns) / NS_PER_S, self.to_ours(end_ns) / NS_PER_S)


class PretendCall(Generic[T]):
    """An answer that comes, or does not."""

    def __init__(self) -> None:
        self.future: futures.Future[T] = futures.Future()

    def result(self, timeout_s: float) -> T:
        """As Call.result."""
        return self.future.result(timeout_s)

    def answer(self, function: Callable[[], T]) -> None:
        """Answer with what the function returns or raises, unless there is an answer already."""
        try:
            value = function()
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            self.fail(error)
        else:
            with contextlib.suppress(futures.InvalidStateError):
                self.future.set_result(value)

    def fail(self, error: Exception) -> None:
        """The other side is gone, or raised."""
        with contextlib.suppress(futures.InvalidStateError):
            self.future.set_exception(error)


class PretendNode:
    """A host, or a part of it, as the scheduler knows it from its join to its end."""

    def __init__(self, node: Node, host: PretendHost, uptime_s: float) -> None:
        self.node, self.host = node, host
        self.up_ns = time.monotonic_ns() - ns_from_s(uptime_s)
        self.alive, self.silent = True, False
        self.pids: set[int] = set()
        self._lock = threading.Lock()
        self._open: list[tuple[PretendCall[Any], Callable[[], Any] | None]] = []

    @property
    def error(self) -> EngineDied:
        """What calls of a dead node raise."""
        return EngineDied(f"node {self.node.node_id} died")

    def ask(self, function: Callable[[], T], *, patient: bool = False) -> PretendCall[T]:
        """A question that the node answers at once, while it lives and is not silent; ``patient``: somebody else answers it."""
        call: PretendCall[T] = PretendCall()
        with self._lock:
            if not self.alive:
                call.fail(self.error)
                return call
            if self.silent or patient:
                self._open = [(other, work) for other, work in self._open if not other.future.done()]
                self._open.append((call, None if patient else function))
                return call
        call.answer(function)
        return call

    def hush(self, *, silent: bool) -> None:
        """Stop answering, or answer again, also what was asked meanwhile."""
        with self._lock:
            self.silent = silent
            waiting = [] if silent else [(call, work) for call, work in self._open if work is not None]
        for call, work in waiting:
            if work is not None:
                call.answer(work)

    def die(self) -> None:
        """From now on everything that was or is asked fails."""
        with self._lock:
            self.alive = False
            waiting, self._open = self._open, []
        for call, _ in waiting:
            call.fail(self.error)


class PretendSampler:
    """What polling the node every 47 ms would have read, from 2 s before the first question on, or from the node's start."""

    def __init__(self, node: PretendNode, settings: SamplerSettings) -> None:
        self._node, self._settings = node, settings
        self._devices: tuple[PretendDevice, ...] = ()
        self._epoch, self._seq = 0, 0
        self._kept: list[SampleBatch] = []
        self._next = 0
        """Number of the next poll; poll n is at n * POLL_S of our clock."""

    def host(self) -> Call[str]:
        """The host's id."""
        return self._node.ask(lambda: self._node.host.name)

    def describe(self, skip: Sequence[str] = (), min_epoch: int = 1) -> Call[SamplerInfo]:
        """Its devices, without those that others read."""
        return self._node.ask(lambda: self._describe(skip, min_epoch))

    def fetch(self, after_seq: int, epoch: int) -> Call[Fetched]:
        """What would have been polled since the last fetch."""
        return self._node.ask(lambda: self._fetch(after_seq, epoch))

    def probe(self) -> Call[tuple[int, int]]:
        """The host's clock."""
        host = self._node.host
        return self._node.ask(lambda: (host.monotonic_ns(), host.monotonic_ns()))

    def alive(self, pids: Sequence[int]) -> Call[tuple[int, ...]]:
        """Those of the pids that a gang of the node has now, and this process."""
        return self._node.ask(lambda: tuple(pid for pid in pids if pid in self._node.pids or pid == os.getpid()))

    def close(self, *, force: bool = False) -> None:
        """Nothing runs."""

    def _describe(self, skip: Sequence[str], min_epoch: int) -> SamplerInfo:
        host, wanted = self._node.host, self._settings.sources
        known = {device.source for device in host.devices}
        if not isinstance(wanted, str) and (unknown := set(wanted) - known) and host.devices:
            raise PowerError(f"{host.name} has no power source {', '.join(sorted(unknown))}, only {', '.join(sorted(known))}")
        if not self._epoch:
            self._epoch = min_epoch
            self._devices = tuple(device for device in host.devices if device.uuid not in skip)
            first_s = max(time.monotonic() - 2.0, self._node.up_ns / NS_PER_S)
            self._next = int(first_s / POLL_S) + 1
        return SamplerInfo(
            node=host.name,
            hostname=host.name,
            pid=os.getpid(),
            epoch=self._epoch,
            sample_hz=self._settings.sample_hz,
            devices=tuple(_device(device, index) for index, device in enumerate(self._devices)),
            calibrations={device.uuid: _calibration(device.uuid) for device in self._devices},
            unavailable={},
            host={"llem_ray": __version__},
            periods_s={device.uuid: POLL_S for device in self._devices},
        )

    def _fetch(self, after_seq: int, epoch: int) -> Fetched:
        received_ns = self._node.host.monotonic_ns()
        polls = np.arange(self._next, int(time.monotonic() / POLL_S) + 1)
        if epoch == self._epoch:
            self._kept = [batch for batch in self._kept if batch.seq > after_seq]
        if len(polls) and self._devices:
            self._next = int(polls[-1]) + 1
            self._seq += 1
            self._kept.append(self._batch(polls.astype(np.float64) * POLL_S))
        return Fetched(batches=tuple(self._kept), received_ns=received_ns, replied_ns=self._node.host.monotonic_ns())

    def _batch(self, t_s: Float64) -> SampleBatch:
        """Rows in polling order: all devices at each time."""
        columns = [_readings(device, t_s) for device in self._devices]
        power_mw, power_avg_mw, energy_mj = (np.stack(column, axis=1).ravel() for column in zip(*columns, strict=True))
        count, host = len(self._devices), self._node.host
        t_ns = np.array([host.to_host(round(t * NS_PER_S)) for t in t_s.tolist()], dtype=np.int64)
        return SampleBatch(
            node=host.name,
            epoch=self._epoch,
            seq=self._seq,
            devices=tuple(device.uuid for device in self._devices),
            device=np.tile(np.arange(count, dtype=np.int32), len(t_s)),
            t_ns=np.repeat(t_ns, count),
            hw_ns=np.full(count * len(t_s), 50_000, dtype=np.int64),
            power_mw=power_mw,
            power_avg_mw=power_avg_mw,
            energy_mj=energy_mj,
        )


def _device(device: PretendDevice, index: int) -> Device:
    return Device(
        uuid=device.uuid,
        name=f"Pretend {device.scope}",
        source=device.source,
        scope=device.scope,
        method="measured_counter",
        index=index,
        counter_quantum_mj=1.0,
        power_limit_mw=700_000.0,
        memory_bytes=device.memory_bytes,
    )


def _calibration(uuid: str) -> Calibration:
    return Calibration(device_uuid=uuid, tick_period_s=TICK_S, has_instant=True, has_average=True, lag_s=0.0, call_s=1e-4)


def _readings(device: PretendDevice, t_s: Float64) -> tuple[Float64, Float64, Float64]:
    """Instant power, averaged power and counter at each time, as they were renewed at the last tick."""
    tick_s = np.floor((t_s - device.tick_phase_s) / TICK_S) * TICK_S + device.tick_phase_s
    total_j = device.load.cumulative_j(tick_s)
    instant_w = (total_j - device.load.cumulative_j(tick_s - INSTANT_S)) / INSTANT_S
    average_w = (total_j - device.load.cumulative_j(tick_s - AVERAGE_S)) / AVERAGE_S
    return np.round(instant_w * 1e3), np.round(average_w * 1e3), np.floor(device.base_mj + total_j * 1e3)
