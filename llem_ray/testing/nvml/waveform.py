"""Power over time as straight pieces, whose energy is known exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Kind = Literal["step", "linear"]
Segment: TypeAlias = tuple[float, float, Kind]
"""(start in s, power at the start in W, how it goes on until the next segment starts)."""


@dataclass(frozen=True)
class Waveform:
    """True power of one device: constant before the first segment, and after the last unless it repeats.

    Args:
        segments: ``(t_s, power_w, kind)``, ascending in time. A ``step`` stays constant until the next segment, a
            ``linear`` one runs straight to the next segment's power.
        repeat_s: Period after which the segments start again, or None. It must exceed the span of the segments.

    Raises:
        ValueError: The segments are not ascending and finite, a power is negative, or the period is too short.
    """

    segments: tuple[Segment, ...]
    repeat_s: float | None = None
    _t_s: npt.NDArray[np.float64] = field(init=False, repr=False, compare=False)
    _power_w: npt.NDArray[np.float64] = field(init=False, repr=False, compare=False)
    _slope_w_s: npt.NDArray[np.float64] = field(init=False, repr=False, compare=False)
    _energy_j: npt.NDArray[np.float64] = field(init=False, repr=False, compare=False)
    _cycle_j: float = field(init=False, repr=False, compare=False, default=0.0)

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("a waveform needs at least one segment")
        t_s = np.array([segment[0] for segment in self.segments], dtype=np.float64)
        power_w = np.array([segment[1] for segment in self.segments], dtype=np.float64)
        linear = np.array([_is_linear(segment[2]) for segment in self.segments])
        if not (np.isfinite(t_s).all() and np.isfinite(power_w).all()):
            raise ValueError("times and powers of a waveform must be finite")
        if (np.diff(t_s) <= 0).any():
            raise ValueError("the segments of a waveform must ascend in time")
        if (power_w < 0).any():
            raise ValueError("the power of a waveform must not be negative")
        if self.repeat_s is not None and self.repeat_s <= t_s[-1] - t_s[0]:
            raise ValueError(f"repeat_s={self.repeat_s} does not exceed the span of the segments, {t_s[-1] - t_s[0]} s")
        end_s, end_w = (t_s[-1] + 1.0, power_w[-1]) if self.repeat_s is None else (t_s[0] + self.repeat_s, power_w[0])
        span_s = np.diff(t_s, append=end_s)
        slope = np.where(linear, np.diff(power_w, append=end_w) / span_s, 0.0)
        piece_j = power_w * span_s + 0.5 * slope * span_s**2
        object.__setattr__(self, "_t_s", t_s)
        object.__setattr__(self, "_power_w", power_w)
        object.__setattr__(self, "_slope_w_s", slope)
        object.__setattr__(self, "_energy_j", np.concatenate([[0.0], np.cumsum(piece_j)[:-1]]))
        object.__setattr__(self, "_cycle_j", float(piece_j.sum()))

    @classmethod
    def constant(cls, power_w: float) -> Waveform:
        """The same power for ever."""
        return cls(((0.0, power_w, "step"),))

    @classmethod
    def of(cls, segments: Iterable[Sequence[object]], repeat_s: float | None = None) -> Waveform:
        """From any iterable of ``(t_s, power_w, kind)``."""
        return cls(tuple((float(t), float(p), kind) for t, p, kind in segments), repeat_s)  # type: ignore[arg-type,misc]

    def power_w(self, t_s: float) -> float:
        """True power at ``t_s``, W."""
        _, local_s = self._fold(t_s)
        i = self._piece(local_s)
        if i < 0:
            return float(self._power_w[0])
        return float(self._power_w[i] + self._slope_w_s[i] * (local_s - self._t_s[i]))

    def energy_j(self, begin_s: float, end_s: float) -> float:
        """Exact energy between two times, J; negative where ``end_s < begin_s``."""
        return self._cumulative_j(end_s) - self._cumulative_j(begin_s)

    def _fold(self, t_s: float) -> tuple[float, float]:
        if self.repeat_s is None:
            return 0.0, t_s
        cycles = math.floor((t_s - self._t_s[0]) / self.repeat_s)
        return cycles, t_s - cycles * self.repeat_s

    def _piece(self, local_s: float) -> int:
        return int(np.searchsorted(self._t_s, local_s, side="right")) - 1

    def _cumulative_j(self, t_s: float) -> float:
        cycles, local_s = self._fold(t_s)
        i = self._piece(local_s)
        if i < 0:
            return cycles * self._cycle_j + float(self._power_w[0] * (local_s - self._t_s[0]))
        x_s = local_s - self._t_s[i]
        return cycles * self._cycle_j + float(self._energy_j[i] + self._power_w[i] * x_s + 0.5 * self._slope_w_s[i] * x_s**2)


def _is_linear(kind: str) -> bool:
    if kind not in ("step", "linear"):
        raise ValueError(f"kind of a segment must be step or linear, not {kind!r}")
    return kind == "linear"
