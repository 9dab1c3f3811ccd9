"""The run driver's part in a warm-up: it has the samples, and tells the engine how steady its gang's power is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from llem_ray.core.errors import LlemRayError
from llem_ray.core.measure_spec import CV_BATCHES
from llem_ray.core.power import Float64, Int64
from llem_ray.core.units import ns_from_s
from llem_ray.energy.steadiness import PIECE_S, cut_pieces, piece_power_w, settle_s, variation
from llem_ray.execution.calls import Call, Gang, PowerSeen, TrialOrder, WarmupProgress
from llem_ray.execution.meter import Meter
from llem_ray.execution.placement import is_measured
from llem_ray.execution.records import GangRecord, HostDevice

ANSWER_S: Final = 0.05
"""An engine that takes longer is asked for its answer the next time."""


def why_no_power(record: GangRecord) -> str | None:
    """Why nothing can be said of the gang's power while it warms up; None where all of it is measured."""
    if not record.devices:
        return record.reason or "the gang has no device that is measured"
    unread = [item.device for item in record.devices if not is_measured(item.device) or item.device.shared]
    if unread:
        shared = "is shared with others" if unread[0].shared else "is not measured"
        return f"the power of {unread[0].name} {shared}"
    return None


class WarmupWatch:
    """One attempt's warm-up, seen from the run driver. Where its power does not matter it does nothing.

    Args:
        gang: Who warms up.
        record: Its devices.
        order: What it was asked for.
        meter: Where samples are.
    """

    def __init__(self, gang: Gang, record: GangRecord, order: TrialOrder, meter: Meter) -> None:
        self._gang, self._record, self._order, self._meter = gang, record, order, meter
        self._call: Call[WarmupProgress] | None = None
        self._seen: PowerSeen | None = None
        self._over = order.warmup.until_cv is None or order.no_power is not None

    def look(self) -> None:
        """Called now and then while the attempt runs: tell what is known, take how far the engine is. It waits for nobody."""
        if self._over:
            return
        try:
            if self._call is None:
                self._call = self._gang.tell_warmup(self._order.trial_id, self._order.attempt, self._seen)
            progress = self._call.result(ANSWER_S)
        except TimeoutError:
            return
        except LlemRayError:  # the attempt's own call says what became of the engine
            self._over = True
            return
        self._call, self._over = None, progress.over
        self._seen = power_seen(self._record, progress.marks, self._meter)


def power_seen(record: GangRecord, marks: Sequence[tuple[int, int]], meter: Meter) -> PowerSeen | None:
    """How steady the gang's power was in the latest stretches of its warm-up whose samples are there; None where it is not known.

    Args:
        record: The gang.
        marks: Batches that ran, and when that was on the clock of its leading host, ascending.
        meter: Where samples are.
    """
    until_ns = _known_until(record, meter)
    known = [mark for mark in marks if until_ns is not None and mark[1] <= until_ns]
    edges_ns = cut_pieces([t_ns for _, t_ns in known], CV_BATCHES, PIECE_S)
    if edges_ns is None:
        return None
    total_w = np.zeros(CV_BATCHES)
    for item in record.devices:
        power_w = _powers_w(record, item, edges_ns, meter)
        if power_w is None:
            return None
        total_w += power_w
    cv = variation(total_w.tolist())
    return None if cv is None else PowerSeen(batches=known[-1][0], cv=cv)


def _known_until(record: GangRecord, meter: Meter) -> int | None:
    """Up to when every device of the gang was sampled, on the clock of its leading host, less what an edge needs."""
    until_ns = []
    for item in record.devices:
        last_ns = meter.last_ns(item.host, item.device.uuid)
        if last_ns is None or record.generations.get(item.host, 0) != meter.generation(item.host):
            return None
        calibration, period_s = meter.calibration(item.host, item.device), meter.period_s(item.host, item.device)
        there_ns = _moved(last_ns - ns_from_s(settle_s(calibration, period_s)), item.host, record.node, meter)
        if there_ns is None:
            return None
        until_ns.append(there_ns)
    return min(until_ns, default=None)


def _powers_w(record: GangRecord, item: HostDevice, edges_ns: Int64, meter: Meter) -> Float64 | None:
    """A device's mean power in each stretch, W; None where it is not known."""
    moved_ns = [_moved(edge_ns, record.node, item.host, meter) for edge_ns in edges_ns.tolist()]
    there_ns = np.array([edge_ns for edge_ns in moved_ns if edge_ns is not None], np.int64)
    if len(there_ns) < len(edges_ns):
        return None
    margin_ns = ns_from_s(meter.margin_s(item.host, item.device))
    trace = meter.trace(item.host, item.device.uuid, int(there_ns[0]) - margin_ns, int(there_ns[-1]) + margin_ns)
    return piece_power_w(meter.calibration(item.host, item.device), trace, there_ns, meter.period_s(item.host, item.device))


def _moved(t_ns: int, host: str, other: str, meter: Meter) -> int | None:
    """A time of one host on another's clock; None where one of them is not known."""
    if host == other:
        return t_ns
    ours_ns = meter.clocks.to_own(host, t_ns)
    return None if ours_ns is None else meter.clocks.to_host(other, ours_ns)
