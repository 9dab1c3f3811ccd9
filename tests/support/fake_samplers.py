"""Samplers and clusters that do what a test says: for the run driver's side of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llem_ray.core.errors import EngineDied
from llem_ray.core.power import Calibration, Device, DeviceState, SampleBatch, SamplerInfo
from llem_ray.core.units import NS_PER_S
from llem_ray.execution.calls import Fetched, Node, SamplerSettings
from llem_ray.execution.meter import Meter
from llem_ray.testing.clock import VirtualClock

SETTINGS = SamplerSettings(run="run", sources="auto", sample_hz=20.0)


class Answer:
    """A call that is answered at once, with a value or an error."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def result(self, timeout_s: float) -> Any:
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer


class Never(Answer):
    """A call that is not answered."""

    def __init__(self) -> None:
        super().__init__(TimeoutError("not yet"))


@dataclass
class FakeSampler:
    """A sampler of one host."""

    clock: VirtualClock
    host_id: str
    uuids: tuple[str, ...]
    offset_s: float = 0.0
    """Its clock less the run driver's."""
    error: BaseException | None = None
    """What everything raises; it is dead, or cannot be reached."""
    silent: bool = False
    """Nothing is answered."""
    living: tuple[int, ...] = ()
    batches: list[SampleBatch] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)
    skipped: tuple[str, ...] = ()
    epoch: int = 0

    def _answer(self, make: Callable[[], Any]) -> Answer:
        if self.silent:
            return Never()
        return Answer(self.error or make())

    def host(self) -> Answer:
        return self._answer(lambda: self.host_id)

    def describe(self, skip: Sequence[str] = (), min_epoch: int = 1) -> Answer:
        self.skipped, self.epoch = tuple(skip), max(self.epoch, min_epoch)
        return self._answer(self._info)

    def _info(self) -> SamplerInfo:
        devices = tuple(gpu(uuid, index) for index, uuid in enumerate(self.uuids) if uuid not in self.skipped)
        return SamplerInfo(
            node=self.host_id,
            hostname=self.host_id,
            pid=1,
            epoch=self.epoch,
            sample_hz=20.0,
            devices=devices,
            calibrations={uuid: calibration(uuid) for uuid in self.uuids},
            unavailable={},
            host={},
            periods_s=dict.fromkeys(self.uuids, 0.05),
        )

    def fetch(self, after_seq: int, epoch: int) -> Answer:
        now_ns = self._now_ns()
        wanted = tuple(batch for batch in self.batches if batch.seq > after_seq)
        return self._answer(lambda: Fetched(batches=wanted, received_ns=now_ns, replied_ns=now_ns))

    def probe(self) -> Answer:
        now_ns = self._now_ns()
        return self._answer(lambda: (now_ns, now_ns))

    def alive(self, pids: Sequence[int]) -> Answer:
        return self._answer(lambda: tuple(pid for pid in pids if pid in self.living))

    def close(self, *, force: bool = False) -> None:
        self.closed.append(force)

    def _now_ns(self) -> int:
        return self.clock.monotonic_ns() + round(self.offset_s * NS_PER_S)

    def sample(
        self, seq: int, t_s: Sequence[float], memory_bytes: int | None = None, power_w: float = 100.0, *, counter: bool = False
    ) -> None:
        """Add a batch: every GPU at these times of the run driver's clock."""
        times = np.array([round((t + self.offset_s) * NS_PER_S) for t in t_s], np.int64)
        many = len(self.uuids)
        energy_mj = (times - times[0]) / NS_PER_S * power_w * 1e3 if counter else np.full(len(times), np.nan)
        states = tuple(
            DeviceState(device_uuid=uuid, t_ns=int(t_ns), memory_used_bytes=memory_bytes) for uuid in self.uuids for t_ns in times
        )
        self.batches.append(
            SampleBatch(
                node=self.host_id,
                epoch=self.epoch,
                seq=seq,
                devices=self.uuids,
                device=np.repeat(np.arange(many, dtype=np.int32), len(times)),
                t_ns=np.tile(times, many),
                hw_ns=np.zeros(many * len(times), np.int64),
                power_mw=np.full(many * len(times), power_w * 1e3),
                power_avg_mw=np.full(many * len(times), np.nan),
                energy_mj=np.tile(energy_mj, many),
                states=states,
            )
        )


def gpu(uuid: str, index: int = 0) -> Device:
    return Device(uuid=uuid, name=uuid, source="nvml", scope="gpu", method="measured_counter", sensor_rel=0.0, index=index)


def calibration(uuid: str) -> Calibration:
    return Calibration(device_uuid=uuid, tick_period_s=0.1, has_instant=True, has_average=False, lag_s=0.0, call_s=0.0)


class FakeCluster:
    """An executor with nodes and, for each, the samplers that it will have, one after the other."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.members: dict[str, Node] = {}
        self.samplers: dict[str, list[FakeSampler]] = {}
        self.opened: list[str] = []
        self.held: list[tuple[str, str]] = []

    def add(self, node_id: str, *samplers: FakeSampler, gpus: int = 0, elsewhere: int = 0) -> Node:
        node = Node(node_id=node_id, hostname=node_id, address="10.0.0.1", gpus=gpus, gpus_elsewhere=elsewhere)
        self.members[node_id] = node
        self.samplers[node_id] = list(samplers)
        return node

    def sampler(self, host: str, *uuids: str, **more: Any) -> FakeSampler:
        return FakeSampler(self.clock, host, uuids, **more)

    def nodes(self) -> tuple[Node, ...]:
        return tuple(self.members.values())

    def open_sampler(self, node: Node, settings: SamplerSettings) -> FakeSampler:
        self.opened.append(node.node_id)
        left = self.samplers[node.node_id]
        return left.pop(0) if left else FakeSampler(self.clock, "?", (), error=EngineDied("no more"))

    def quarantine(self, node_id: str, gpu_uuid: str) -> None:
        self.held.append((node_id, gpu_uuid))

    def wait(self, calls: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        self.clock.sleep_until_ns(self.clock.monotonic_ns() + round(timeout_s * NS_PER_S))
        return [call for call in calls if not isinstance(call, Never)]

    def meter(self) -> Meter:
        executor: Any = self
        return Meter(executor, SETTINGS, self.clock, "own", lambda info: None)
