"""The run driver's side of the samplers: fetches what they measured and keeps it until every window is accounted for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llem_ray.core.clock import Clock
from llem_ray.core.errors import EngineDied, HangError, LlemRayError
from llem_ray.core.power import Calibration, Device, DeviceState, SampleBatch, SamplerInfo, Trace
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.energy.estimator import edge_margin_s
from llem_ray.execution.calls import Executor, Sampler
from llem_ray.power.traces import TraceBuffer

LOG = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
FETCH_TIMEOUT_S = 10.0
SILENT_FETCHES = 3
"""A sampler that does not answer so often is taken for dead."""


@dataclass(slots=True)
class _Node:
    sampler: Sampler
    info: SamplerInfo
    buffer: TraceBuffer = field(default_factory=TraceBuffer)
    after_seq: int = 0
    silent: int = 0
    """Fetches in a row that were not answered."""


class Meter:
    """All samplers of a run.

    Args:
        executor: Where samplers are started.
        sources: Names of power sources, or ``auto``.
        sample_hz: Polls per second.
        clock: The run driver's clock.
        on_sampler: Told of every sampler that starts, again too.
    """

    def __init__(
        self,
        executor: Executor,
        sources: Sequence[str] | str,
        sample_hz: float,
        clock: Clock,
        on_sampler: Callable[[SamplerInfo], None],
    ) -> None:
        self._on_sampler = on_sampler
        self._executor = executor
        self._sources = sources
        self._sample_hz = sample_hz
        self._clock = clock
        self._nodes: dict[str, _Node] = {}

    def open(self) -> tuple[SamplerInfo, ...]:
        """Start the samplers and wait until they poll.

        Raises:
            PowerError: A source asked for by name cannot work.
            HangError: A sampler did not start in time.
        """
        for sampler in self._executor.open_samplers(self._sources, self._sample_hz, 1):
            self._adopt(sampler)
        return self.infos

    @property
    def infos(self) -> tuple[SamplerInfo, ...]:
        """What each sampler said of its node, in the order they were opened."""
        return tuple(node.info for node in self._nodes.values())

    def pump(self) -> list[SampleBatch]:
        """Fetch everything sampled so far. A sampler that died is started anew with the next epoch."""
        fetched: list[SampleBatch] = []
        for name, node in list(self._nodes.items()):
            try:
                batches = node.sampler.fetch(node.after_seq).result(FETCH_TIMEOUT_S)
            except EngineDied as error:
                LOG.warning("the sampler of %s died and is started anew: %s", name, error)
                self._restart(name, node)
                continue
            except TimeoutError:
                node.silent += 1
                LOG.warning("the sampler of %s did not answer within %s s", name, FETCH_TIMEOUT_S)
                if node.silent >= SILENT_FETCHES:
                    self._restart(name, node)
                continue
            node.silent = 0
            for batch in batches:
                node.buffer.append(batch)
                node.after_seq = max(node.after_seq, batch.seq)
            fetched.extend(batches)
        return fetched

    def devices(self, node: str) -> tuple[Device, ...]:
        """Devices that the node's sampler reads."""
        return self._nodes[node].info.devices if node in self._nodes else ()

    def calibration(self, node: str, device: Device) -> Calibration:
        """What calibration found, or nothing known."""
        known = self._nodes[node].info.calibrations.get(device.uuid)
        return known or Calibration(
            device_uuid=device.uuid, tick_period_s=None, has_instant=False, has_average=False, lag_s=0.0, call_s=0.0
        )

    def period_s(self, node: str, device: Device) -> float:
        """Time between two polls of the device."""
        return self._nodes[node].info.periods_s.get(device.uuid, 1.0 / self._sample_hz)

    def margin_s(self, node: str, device: Device) -> float:
        """How much of the trace around an edge makes the estimate there final."""
        return edge_margin_s(self.calibration(node, device), self.period_s(node, device), device.method)

    def trace(self, node: str, uuid: str, begin_ns: int, end_ns: int) -> Trace:
        """Samples of one device."""
        return self._nodes[node].buffer.trace(uuid, begin_ns, end_ns)

    def states(self, node: str, uuid: str, begin_ns: int, end_ns: int) -> tuple[DeviceState, ...]:
        """Slow-lane readings of one device."""
        return self._nodes[node].buffer.states(uuid, begin_ns, end_ns)

    def errors(self, node: str, uuid: str, begin_ns: int, end_ns: int) -> tuple[tuple[int, str], ...]:
        """(t_ns, why) of the device's samples that lack a reading."""
        return self._nodes[node].buffer.errors(uuid, begin_ns, end_ns)

    def is_sampled_until(self, t_ns: int) -> bool:
        """Every device has been sampled far enough past ``t_ns`` for an edge there to be final."""
        for name, node in self._nodes.items():
            for device in node.info.devices:
                last_ns = node.buffer.last_ns(device.uuid)
                # An estimate is held up to half-way to its neighbour: one reading beyond the edge settles it.
                margin_s = 0.0 if device.method == "estimated_model" else self.margin_s(name, device)
                if device.method != "unavailable" and (last_ns is None or last_ns < t_ns + ns_from_s(margin_s)):
                    return False
        return True

    def latest_power_w(self) -> tuple[float | None, bool]:
        """Sum of the newest instant power of all measuring devices, or of the estimates where nothing measures (True)."""
        measured: list[float] = []
        estimated: list[float] = []
        now_ns = self._clock.monotonic_ns()
        for node in self._nodes.values():
            for device in node.info.devices:
                power_mw = node.buffer.trace(device.uuid, now_ns - 3 * NS_PER_S, now_ns).power_mw
                if len(power_mw) and power_mw[-1] == power_mw[-1]:
                    (estimated if device.method == "estimated_model" else measured).append(power_mw[-1] / 1e3)
        return (sum(measured or estimated) if measured or estimated else None), not measured

    def trim(self, before_ns: int) -> None:
        """Forget samples that nobody needs any more."""
        for node in self._nodes.values():
            node.buffer.trim(before_ns)

    def close(self) -> None:
        """Stop the samplers, and log what trouble they had."""
        for name, node in self._nodes.items():
            try:
                for note in node.sampler.describe().result(FETCH_TIMEOUT_S).notes:
                    LOG.warning("the sampler of %s: %s", name, note)
            except (LlemRayError, TimeoutError) as error:
                LOG.warning("the sampler of %s gave no last word: %s", name, error)
            node.sampler.close()

    def _adopt(self, sampler: Sampler) -> _Node:
        try:
            info = sampler.describe().result(START_TIMEOUT_S)
        except LlemRayError:
            sampler.close()
            raise
        except TimeoutError as error:
            sampler.close()
            raise HangError(f"the power sampler did not start within {START_TIMEOUT_S:g} s") from error
        node = _Node(sampler, info)
        if info.node in self._nodes:
            node.buffer = self._nodes[info.node].buffer
        self._nodes[info.node] = node
        self._on_sampler(info)
        return node

    def _restart(self, name: str, node: _Node) -> None:
        node.sampler.close()
        try:
            for sampler in self._executor.open_samplers(self._sources, self._sample_hz, node.info.epoch + 1):
                self._adopt(sampler)
        except LlemRayError as error:
            LOG.error("the sampler of %s could not be started anew: %s", name, error)  # noqa: TRY400 - the text says it all
