"""Closed-form power waveforms: what a simulated device draws, with its exact energy.

Every load is a list of segments that are held or go straight to the next one's power, so that its energy between any two
times is exact, and a fake meter written in another language can evaluate the very same waveform. Times are s on any one
clock, powers W. A load is busy from ``begin_s`` to ``end_s`` and idle outside, unless its class says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from llem_ray.core.power import Float64

IDLE_W = 90.0

_SERVING = ((600.0, 680.0, 0.08, 0.25), (300.0, 450.0, 0.3, 0.9), (100.0, 200.0, 0.05, 0.3))
"""Lowest and highest power, shortest and longest time of prefill, decode and pause."""


@dataclass(frozen=True, slots=True)
class Segment:
    """From ``t_s`` on the power is ``power_w``: held (``step``) or going straight to the next segment's (``linear``)."""

    t_s: float
    power_w: float
    kind: Literal["step", "linear"] = "step"


class Load(Protocol):
    """A waveform with exact energy."""

    def power_w(self, t_s: Float64) -> Float64:
        """Power at each time, W."""
        ...

    def cumulative_j(self, t_s: Float64) -> Float64:
        """Exact energy from a fixed origin to each time, J: differences are energies."""
        ...

    def energy_j(self, t0_s: float, t1_s: float) -> float:
        """Exact energy between two times, J."""
        ...

    def segments(self, t0_s: float, t1_s: float) -> list[Segment]:
        """The waveform on [t0, t1]: the first segment begins at t0, the last at t1."""
        ...


class SegmentLoad:
    """The waveform of a list of segments; the first's power also holds before it, the last's after it.

    Raises:
        ValueError: There is no segment, or they are not ascending in time.
    """

    def __init__(self, segments: Iterable[Segment]) -> None:
        listed = list(segments)
        self._t_s: Float64 = np.array([segment.t_s for segment in listed])
        self._power_w: Float64 = np.array([segment.power_w for segment in listed])
        if not listed or np.any(np.diff(self._t_s) <= 0):
            raise ValueError("a load needs segments that begin at ascending times")
        linear = np.array([segment.kind == "linear" for segment in listed[:-1]], dtype=bool)
        span_s = np.diff(self._t_s)
        rise_w = np.where(linear, np.diff(self._power_w), 0.0)
        self._slope: Float64 = np.append(rise_w / span_s, 0.0)
        self._cumulative_j: Float64 = np.concatenate(([0.0], np.cumsum((self._power_w[:-1] + rise_w / 2) * span_s)))

    def power_w(self, t_s: Float64) -> Float64:
        """Power at each time, W; at a jump the power after it."""
        at, into_s = self._locate(t_s)
        return self._power_w[at] + self._slope[at] * np.maximum(into_s, 0.0)

    def cumulative_j(self, t_s: Float64) -> Float64:
        """Energy from the first segment's begin to each time, J; negative before it."""
        at, into_s = self._locate(t_s)
        ramped_j: Float64 = self._slope[at] * np.maximum(into_s, 0.0) ** 2 / 2
        return self._cumulative_j[at] + self._power_w[at] * into_s + ramped_j

    def energy_j(self, t0_s: float, t1_s: float) -> float:
        """Exact energy between two times, J."""
        ends_j = self.cumulative_j(np.array([t0_s, t1_s]))
        return float(ends_j[1] - ends_j[0])

    def segments(self, t0_s: float, t1_s: float) -> list[Segment]:
        """The waveform on [t0, t1]: the first segment begins at t0, the last at t1."""
        inside_s = self._t_s[(self._t_s > t0_s) & (self._t_s < t1_s)]
        starts_s = np.concatenate(([t0_s], inside_s))
        at, into_s = self._locate(starts_s)
        linear = (self._slope[at] != 0) & (into_s >= 0)
        powers_w = self.power_w(starts_s)
        result = [
            Segment(float(t), float(power), "linear" if ramps else "step")
            for t, power, ramps in zip(starts_s, powers_w, linear, strict=True)
        ]
        last_w = self.power_w(np.array([t1_s]))[0]
        if result[-1].kind == "linear":  # a ramp must end at its own power, even where the load jumps at t1
            last_w = result[-1].power_w + self._slope[at[-1]] * (t1_s - result[-1].t_s)
        return [*result, Segment(float(t1_s), float(last_w))]

    def _locate(self, t_s: Float64) -> tuple[npt.NDArray[np.intp], Float64]:
        t_s = np.asarray(t_s, dtype=np.float64)
        at = np.maximum(np.searchsorted(self._t_s, t_s, "right") - 1, 0)
        return at, t_s - self._t_s[at]


class ConstantLoad(SegmentLoad):
    """One power from begin to end: a saturated decode."""

    def __init__(self, begin_s: float, end_s: float, *, busy_w: float = 400.0, idle_w: float = IDLE_W) -> None:
        super().__init__([Segment(begin_s - 1.0, idle_w), Segment(begin_s, busy_w), Segment(end_s, idle_w)])


class PrefillDecodeLoad(SegmentLoad):
    """Batches of 80 ms prefill at 680 W and 420 ms decode at 400 W, each length jittered by 10 %."""

    def __init__(self, begin_s: float, end_s: float, *, seed: int, idle_w: float = IDLE_W) -> None:
        busy = _prefill_decode(begin_s, end_s, np.random.default_rng(seed))
        super().__init__([Segment(begin_s - 1.0, idle_w), *busy, Segment(end_s, idle_w)])


class MidstreamLoad(SegmentLoad):
    """Prefill and decode that began long before the window and go on after it: no edge of the load at the window's edges."""

    def __init__(self, begin_s: float, end_s: float, *, seed: int, lead_s: float = 5.0) -> None:
        super().__init__(_prefill_decode(begin_s - lead_s, end_s + lead_s, np.random.default_rng(seed)))


class RestlessLoad(SegmentLoad):
    """Serving that takes no notice of the window: prefill, decode and pause in turn, at any phase, before, in and after it.

    600 to 680 W for 80 to 250 ms, 300 to 450 W for 300 to 900 ms, 100 to 200 W for 50 to 300 ms: a step in every third tick of
    a 100 ms counter, and often two in neighbouring ones.
    """

    def __init__(self, begin_s: float, end_s: float, *, seed: int, lead_s: float = 5.0) -> None:
        rng = np.random.default_rng(seed)
        segments, t_s = [], begin_s - lead_s - float(rng.uniform(0.0, 2.0))
        while t_s < end_s + lead_s:
            for low_w, high_w, short_s, long_s in _SERVING:
                segments.append(Segment(t_s, float(rng.uniform(low_w, high_w))))
                t_s += float(rng.uniform(short_s, long_s))
        super().__init__(segments)


class PoissonBurstLoad(SegmentLoad):
    """Bursts of 350 to 650 W over 130 W that arrive at random, 4 a second, and last 0.15 s on average."""

    def __init__(self, begin_s: float, end_s: float, *, seed: int, idle_w: float = IDLE_W) -> None:
        rng = np.random.default_rng(seed)
        busy, t_s = [], begin_s
        while t_s < end_s:
            busy.append(Segment(t_s, 130.0))
            t_s += 1e-4 + rng.exponential(0.25)
            if t_s >= end_s:
                break
            busy.append(Segment(t_s, float(rng.uniform(350.0, 650.0))))
            t_s += 1e-4 + rng.exponential(0.15)
        super().__init__([Segment(begin_s - 1.0, idle_w), *busy, Segment(end_s, idle_w)])


class LockedSquareLoad(SegmentLoad):
    """650 W and 150 W, 50 ms each: locked to a 100 ms sensor, which may see only one of the two."""

    def __init__(self, begin_s: float, end_s: float, *, idle_w: float = IDLE_W) -> None:
        steps = np.arange(int(np.ceil((end_s - begin_s) / 0.05 - 1e-9)))
        busy = [Segment(begin_s + 0.05 * float(step), 150.0 if step % 2 else 650.0) for step in steps]
        super().__init__([Segment(begin_s - 1.0, idle_w), *busy, Segment(end_s, idle_w)])


class SlowLoad(SegmentLoad):
    """Rises in 40 ms from begin on, drifts up by 3 % until end, and falls in 120 ms after it."""

    def __init__(self, begin_s: float, end_s: float, *, busy_w: float = 400.0, idle_w: float = IDLE_W) -> None:
        super().__init__(
            [
                Segment(begin_s - 1.0, idle_w),
                Segment(begin_s, idle_w, "linear"),
                Segment(begin_s + 0.04, busy_w, "linear"),
                Segment(end_s, 1.03 * busy_w, "linear"),
                Segment(end_s + 0.12, idle_w),
            ]
        )


def _prefill_decode(begin_s: float, end_s: float, rng: np.random.Generator) -> list[Segment]:
    segments, t_s = [], begin_s
    while t_s < end_s:
        segments.append(Segment(t_s, 680.0))
        t_s += 0.08 * float(rng.uniform(0.9, 1.1))
        if t_s >= end_s:
            break
        segments.append(Segment(t_s, 400.0))
        t_s += 0.42 * float(rng.uniform(0.9, 1.1))
    return segments


def six_loads(begin_s: float, end_s: float, *, seed: int) -> dict[str, SegmentLoad]:
    """The six loads that accuracy is shown on, busy on [begin, end], by name. The random ones vary with ``seed``."""
    return {
        "constant": ConstantLoad(begin_s, end_s),
        "prefill_decode": PrefillDecodeLoad(begin_s, end_s, seed=seed),
        "poisson_bursts": PoissonBurstLoad(begin_s, end_s, seed=seed),
        "locked_square": LockedSquareLoad(begin_s, end_s),
        "midstream": MidstreamLoad(begin_s, end_s, seed=seed),
        "slow": SlowLoad(begin_s, end_s),
    }


STEP_ALIGNED = ("constant", "prefill_decode", "poisson_bursts", "locked_square")
"""Those of ``six_loads`` whose power steps exactly at the window's edges."""
