"""The ledger of one device: energy of every phase, with boundaries that neighbours share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Final

import numpy as np

from llem_ray.core.energy import Phase, PhaseEnergy, PhaseSpan, Window
from llem_ray.core.errors import TilingError
from llem_ray.core.power import Calibration, Device, Float64, Method, Trace
from llem_ray.core.units import NS_PER_S
from llem_ray.energy.edge import Edge, counter_at, counter_near, shift_power_w
from llem_ray.energy.estimator import counter_quantum_j, edge_margin_s, power_curve, power_max_w, shift_variance_s2, span_energy
from llem_ray.energy.power_curve import PowerCurve, reading_period_s
from llem_ray.energy.readings import clean, coverage, find_freeze, monotone_piece
from llem_ray.energy.ticks import find_ticks

LOW_COVERAGE: Final = 0.9


def check_tiling(spans: Sequence[PhaseSpan], begin_ns: int, end_ns: int) -> None:
    """Check that the spans cover [begin, end] once and wholly, in any order.

    Raises:
        TilingError: Names the first overlap or hole, or the span that ends before it begins.
    """
    at_ns, last = begin_ns, "the begin"
    for span in sorted(spans, key=lambda span: (span.begin_ns, span.end_ns)):
        name = f"{span.phase}{f' of {span.trial_id}' if span.trial_id else ''} [{span.begin_ns}, {span.end_ns}]"
        if span.end_ns < span.begin_ns:
            raise TilingError(f"phase {name} ends before it begins")
        if span.begin_ns < at_ns:
            raise TilingError(f"phase {name} overlaps {last} by {at_ns - span.begin_ns} ns")
        if span.begin_ns > at_ns:
            raise TilingError(f"hole of {span.begin_ns - at_ns} ns between {last} and {name}")
        at_ns, last = span.end_ns, name
    if at_ns < end_ns:
        raise TilingError(f"hole of {end_ns - at_ns} ns between {last} and the end")
    if at_ns > end_ns:
        raise TilingError(f"phase {last} overlaps the end by {at_ns - end_ns} ns")


@dataclass(frozen=True, slots=True)
class LedgerSum:
    """Energy of a device over several spans. ``energy_j`` is None when a span has none; ``known_j`` is what was measured."""

    energy_j: float | None
    u_j: float | None
    known_j: float
    spans: int
    reason: str | None


@dataclass(slots=True)
class _Sum:
    """A running sum in which two counter spans that share an edge share its error."""

    shift_s2: float
    quantum_j: float
    energy_j: float = 0.0
    closed_j2: float = 0.0
    first: Edge | None = None
    tail: Edge | None = None
    spans: int = 0
    reason: str | None = None
    unknown_u: bool = False

    def add(self, part: PhaseEnergy, begin: Edge | None, end: Edge | None) -> None:
        self.spans += 1
        if part.energy_j is None:
            self._close()
            self.reason = self.reason or f"{part.span.phase} at {part.span.begin_ns} ns: {part.reason}"
            return
        self.energy_j += part.energy_j
        if part.method != "measured_counter" or begin is None or end is None:
            self._close()
            self.unknown_u |= part.u_j is None
            self.closed_j2 += (part.u_j or 0.0) ** 2
            return
        if self.tail is not begin:
            self._close()
            self.first = begin
        self.tail = end

    def _open_j2(self) -> float:
        if self.first is None or self.tail is None:
            return 0.0
        shift_j2 = shift_power_w(self.first.powers_w, self.tail.powers_w) ** 2 * self.shift_s2 / 3
        return self.first.u_j**2 + self.tail.u_j**2 + self.quantum_j**2 / 6 + shift_j2

    def _close(self) -> None:
        self.closed_j2 += self._open_j2()
        self.first = self.tail = None

    def result(self) -> LedgerSum:
        missing = self.reason is not None
        u_j = None if missing or self.unknown_u else float(np.sqrt(self.closed_j2 + self._open_j2()))
        return LedgerSum(None if missing else self.energy_j, u_j, self.energy_j, self.spans, self.reason)


class _Once:
    """The power of a slice, worked out when a span has no counter: mostly never."""

    def __init__(self, find: Callable[[], PowerCurve | None]) -> None:
        self._find = find

    @cached_property
    def curve(self) -> PowerCurve | None:
        return self._find()


@dataclass(slots=True)
class DeviceLedger:
    """Accounts for every instant of one device's time in a run, in slices, without keeping samples.

    Feed it in time order: ``add(trace, spans)`` takes the samples around some further spans, which must adjoin those before, and
    returns their energies. The trace reaches from ``edge_margin_s`` before the first span to as much after the last one; at the
    ends of the run it may be shorter. Each boundary is estimated once and belongs to both its neighbours, so energies add up to
    that of the whole, and the uncertainty of adjoining spans comes from their outer edges only.

    Args:
        device: Whose energy it is.
        calibration: Of its sensor.
        sample_period_s: Time between polls, s.
        begin_ns: Start of the run on the clock that stamps the samples.
        delta_ns: Half-width of the clock offset, for spans marked on another node.
        idle_power_w: Idle power, W, to tell a frozen counter from an idle device.
    """

    device: Device
    calibration: Calibration
    sample_period_s: float
    begin_ns: int
    delta_ns: int = 0
    idle_power_w: float | None = None
    _end_ns: int = field(init=False)
    _edge: Edge | None = field(init=False, default=None)
    _started: bool = field(init=False, default=False)
    _period_s: float | None = field(init=False, default=None)
    _whole: _Sum = field(init=False)
    _by_phase: dict[Phase, _Sum] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._end_ns = self.begin_ns
        self._whole = self._new_sum()

    @property
    def end_ns(self) -> int:
        """End of the last span that was added."""
        return self._end_ns

    def whole(self) -> LedgerSum:
        """Energy from the begin of the run to ``end_ns``."""
        return self._whole.result()

    def phases(self) -> Mapping[Phase, LedgerSum]:
        """Energy by phase."""
        return {phase: total.result() for phase, total in self._by_phase.items()}

    def add(self, trace: Trace, spans: Sequence[PhaseSpan], *, goes_on: bool = False) -> tuple[PhaseEnergy, ...]:
        """Account for further spans.

        Args:
            trace: Samples around them.
            spans: Adjoining.
            goes_on: The last phase will be continued: its end, which cancels then, is estimated in the cheap way.

        Raises:
            TilingError: They do not adjoin the spans before, overlap each other or leave a hole.
        """
        if not spans:
            return ()
        spans = sorted(spans, key=lambda span: (span.begin_ns, span.end_ns))
        check_tiling(spans, self._end_ns, spans[-1].end_ns)
        around = Window(node="", begin_ns=self._end_ns, end_ns=spans[-1].end_ns)
        trace = clean(trace, around).trace
        curve = _Once(partial(self._curve, trace, self._end_ns))
        if not self._started:
            self._edge, self._started = self._edge_at(trace, self.begin_ns), True
        energies = []
        for span in spans:
            begin, end = self._edge, self._edge_at(trace, span.end_ns, cheaply=goes_on and span is spans[-1])
            if span.end_ns == span.begin_ns:
                end = begin
            elif begin is not None and end is not None:
                end = self._not_before(trace, begin, end)
            part = self._account(span, trace, curve, begin, end)
            self._whole.add(part, begin, end)
            self._by_phase.setdefault(span.phase, self._new_sum()).add(part, begin, end)
            self._edge, self._end_ns = end, span.end_ns
            energies.append(part)
        return tuple(energies)

    def _new_sum(self) -> _Sum:
        shift_s2 = self.calibration.lag_s**2 + (self.delta_ns / NS_PER_S) ** 2
        return _Sum(shift_s2=shift_s2, quantum_j=counter_quantum_j(self.device))

    def _measurable(self) -> bool:
        return not self.device.shared and self.device.method != "unavailable"

    def _curve(self, trace: Trace, origin_ns: int) -> PowerCurve | None:
        """Power of the slice; how often the meter publishes is found once, so that all slices agree on it."""
        if not self._measurable() or len(trace) == 0:
            return None
        column = trace.power_mw if np.isfinite(trace.power_mw).any() else trace.power_avg_mw
        if self._period_s is None and np.isfinite(column).any():
            self._period_s = reading_period_s(trace.t_ns, column, self.sample_period_s)
        found = power_curve(
            self.device,
            trace,
            origin_ns=origin_ns,
            sample_period_s=self.sample_period_s,
            period_s=self._period_s,
        )
        return found[0] if found else None

    def _edge_at(self, trace: Trace, t_ns: int, *, cheaply: bool = False) -> Edge | None:
        if not self._measurable() or self.device.method == "estimated_model" or len(trace) == 0:
            return None
        piece, flags = monotone_piece(trace, Window(node="", begin_ns=t_ns, end_ns=t_ns + 1))
        if flags:
            return None
        if cheaply and (near := counter_near(piece, t_ns)) is not None:
            return near
        margin_ns = round(3 * edge_margin_s(self.calibration, self.sample_period_s) * NS_PER_S)
        ticks = find_ticks(
            piece.between(t_ns - margin_ns, t_ns + margin_ns),
            self.calibration,
            sample_period_s=self.sample_period_s,
            origin_ns=t_ns,
        )
        return counter_at(
            ticks,
            t_ns,
            power_max_w=power_max_w(self.device),
            quantum_j=counter_quantum_j(self.device),
            lag_s=self.calibration.lag_s,
            delta_s=self.delta_ns / NS_PER_S,
        )

    def _not_before(self, trace: Trace, begin: Edge, end: Edge) -> Edge:
        """``end`` at no less than ``begin``: edges closer than a tick may cross within their errors, energy is never negative."""
        if end.c_j >= begin.c_j or monotone_piece(trace, Window(node="", begin_ns=begin.t_ns, end_ns=end.t_ns))[1]:
            return end
        return replace(end, c_j=begin.c_j)

    def _account(self, span: PhaseSpan, trace: Trace, power: _Once, begin: Edge | None, end: Edge | None) -> PhaseEnergy:
        if self.device.shared:
            return self._part(span, None, None, "unavailable", "attribution=shared: the reading is the board's (MIG)")
        if self.device.method == "unavailable":
            return self._part(span, None, None, "unavailable", self.device.reason or "the device has no meter")
        if span.end_ns == span.begin_ns:
            return self._part(span, 0.0, 0.0, self.device.method)
        window = Window(node="", begin_ns=span.begin_ns, end_ns=span.end_ns, delta_ns=self.delta_ns)
        reason = self._counter_fault(trace, window, begin, end)
        if reason is None and begin is not None and end is not None:
            shift_s2 = shift_variance_s2(window, self.calibration.lag_s)
            energy = span_energy(begin, end, quantum_j=counter_quantum_j(self.device), shift_s2=shift_s2)
            seen = coverage(trace, trace.energy_mj, window, self.sample_period_s)
            notes = {"coverage": f"{seen:.3f}"} if seen < LOW_COVERAGE else {}
            return self._part(span, end.c_j - begin.c_j, energy.u_j, "measured_counter", notes=notes)
        column = trace.power_mw if np.isfinite(trace.power_mw).any() else trace.power_avg_mw
        seen = coverage(trace, column, window, self.sample_period_s)
        curve = power.curve
        if curve is None or (seen < LOW_COVERAGE and not self._nearly_sampled(trace, column, span)):
            told = f"{seen:.0%} of the span was sampled" if seen else "not sampled"
            return self._part(span, None, None, "unavailable", reason if reason and "reset" in reason else told)
        energy_j = max(0.0, curve.energy_j(span.begin_ns, span.end_ns))
        method: Method = "estimated_model" if self.device.method == "estimated_model" else "measured_power_integral"
        notes = {"counter": reason} if reason and method != "estimated_model" else {}
        u_j = None if method == "estimated_model" else curve.u_j(span.begin_ns, span.end_ns)
        return self._part(span, energy_j, u_j, method, notes=notes)

    def _nearly_sampled(self, trace: Trace, column: Float64, span: PhaseSpan) -> bool:
        """A span of a poll or two may hold no reading, yet readings within two polls on both sides tell its power."""
        reach_ns = round(2 * self.sample_period_s * NS_PER_S)
        if span.end_ns - span.begin_ns > reach_ns:
            return False
        t_ns = trace.t_ns[np.isfinite(column)]
        first, last = np.searchsorted(t_ns, [span.begin_ns, span.end_ns])
        before = first > 0 and span.begin_ns - t_ns[first - 1] <= reach_ns
        return bool(before and last < len(t_ns) and t_ns[last] - span.end_ns <= reach_ns)

    def _counter_fault(self, trace: Trace, window: Window, begin: Edge | None, end: Edge | None) -> str | None:
        """Why the counter cannot be used between two edges."""
        if begin is None or end is None:
            return "no counter ticks at a boundary"
        period_s = self.calibration.tick_period_s
        _, flags = monotone_piece(trace, window)
        flags = flags or find_freeze(
            trace,
            window,
            interval_s=max(period_s, self.sample_period_s) if period_s is not None else None,
            idle_power_w=self.idle_power_w,
            quantum_j=counter_quantum_j(self.device),
        )
        return f"{flags[0].code}: {flags[0].detail}" if flags else None

    def _part(
        self,
        span: PhaseSpan,
        energy_j: float | None,
        u_j: float | None,
        method: Method,
        reason: str | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> PhaseEnergy:
        return PhaseEnergy(
            span=span,
            device_uuid=self.device.uuid,
            energy_j=energy_j,
            u_j=u_j,
            method=method,
            reason=reason,
            notes=notes or {},
        )
