"""What prefill and decode cost: the counter's ticks, explained by what the engine did between them.

Steps of an engine are mostly shorter than a counter's tick, so no step's energy is read. But the mix of phases differs from tick
to tick, and a least-squares fit over all ticks of a window tells the phases apart:

- where each step is all prefill or all decode, E_j = P_prefill t_j,prefill + P_decode t_j,decode + P_rest t_j,rest, with the time
  that tick interval j spent in each: ``phase_time_regression``;
- where steps mix both (continuous batching), E_j = a n_j,prefill + b n_j,decode + P t_j, with the tokens computed in the
  interval: ``phase_token_regression``. What is neither a nor b is shared by all that runs, and stays apart.

Errors of the coefficients are Newey-West's (Econometrica 55, 1987): neighbouring ticks share the error of the tick between them,
and a phase's power wanders.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from llem_ray.core.power import Float64
from llem_ray.energy.ticks import Ticks, tick_line

SplitMethod = Literal["phase_time_regression", "phase_token_regression"]

MIN_TICKS: Final = 20
MAX_U_REL: Final = 0.5
"""A phase whose standard error is a larger share of its energy is not told apart."""
REST_REL: Final = 0.01
"""Time outside of steps counts as a phase of its own from this share of the window on."""
STRETCH: Final = 60
"""Ticks that one line gives times for, drawn through twice as many."""
LAG_TICKS: Final = 6
MAX_RESIDUAL_REL: Final = 0.2
MIN_VARIATION_REL: Final = 0.05
"""Less may come from what is not known of the ticks' times."""
ZOOMS: Final = 3
SHIFTS: Final = 17
"""Neighbours whose errors may go together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTable:
    """The n steps of a window, one after the other; times are s on the clock of the ticks."""

    begin_s: Float64
    end_s: Float64
    prefill_tokens: Float64
    decode_tokens: Float64
    mixed: npt.NDArray[np.bool_]
    """Steps that compute prompts and go on with other requests at once."""


@dataclass(frozen=True, slots=True)
class TickErrors:
    """What each interval between n + 1 ticks adds to the errors of a split: devices that run the same steps err together."""

    edges_s: Float64
    """Shape (n + 1,), from the begin of the window on."""
    added_j: Float64
    """Shape (n, 2): to that of prefill and to that of decode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseSplit:
    """Energy of one device in one window, by phase. The three parts add up to the window's energy."""

    method: SplitMethod
    prefill_j: float
    prefill_u_j: float
    """One sigma."""
    decode_j: float
    decode_u_j: float
    rest_j: float
    """What belongs to neither: time between steps, and under ``phase_token_regression`` what all tokens share."""
    residual_rel: float
    """Root mean square of what the fit leaves, over the mean energy of a tick."""
    ticks: int
    errors: TickErrors = field(compare=False, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoSplit:
    """Why the phases cannot be told apart."""

    reason: str


def split_phases(
    ticks: Ticks, steps: StepTable, begin_s: float, end_s: float, energy_j: float, *, slack_s: float = 0.0
) -> PhaseSplit | NoSplit:
    """Energy of prefill and of decode in a window.

    When ticks were published is known to some milliseconds only, in common for all of them where polls are locked to ticks. So by
    how much the steps' times are off from the ticks' is fitted too: phases of known times tell it better than polls.

    Args:
        ticks: The device's counter around the window.
        steps: Steps of the window.
        begin_s: Begin of the window, on the ticks' clock.
        end_s: Its end.
        energy_j: Energy of the window by the counter.
        slack_s: By how much the counter may lag and the steps' clock be off, beside what polling leaves open.
    """
    if len(steps.begin_s) == 0:
        return NoSplit(reason="the engine tells no steps")
    series = tick_times(ticks, begin_s, end_s)
    if len(series.tau_s) < MIN_TICKS:
        return NoSplit(reason=f"{len(series.tau_s)} counter ticks in the window, {MIN_TICKS} are needed")
    window_s = (begin_s, end_s)
    problem = _by_tokens(steps, window_s) if steps.mixed.any() else _by_time(steps, window_s)
    for name, total in zip(("prefill", "decode"), problem.whole, strict=True):
        if total <= 0:
            return NoSplit(reason=f"the window has no {name}")
    return _fit(problem, series, energy_j, 3 * series.sd_s + slack_s)


@dataclass(frozen=True, slots=True)
class TickSeries:
    """Consecutive ticks: estimated times, s, the counter's values, J, and one sigma of a shift that all times share."""

    tau_s: Float64
    c_j: Float64
    sd_s: float


def tick_times(ticks: Ticks, begin_s: float, end_s: float) -> TickSeries:
    """The ticks within a window."""
    times, values, sd_s = [np.empty(0)], [np.empty(0)], 0.0
    for at in range(0, len(ticks), STRETCH):
        line = tick_line(ticks, float(ticks.hi_s[min(at + STRETCH // 2, len(ticks) - 1)]), STRETCH)
        low, high = max(at, line.first), min(at + STRETCH, line.first + len(line.tau_s))
        times.append(line.tau_s[low - line.first : high - line.first])
        values.append(ticks.c_j[low:high])
        sd_s = max(sd_s, line.sd_s)
    tau_s, c_j = np.concatenate(times), np.concatenate(values)
    wanted = (tau_s >= begin_s) & (tau_s <= end_s) & (np.diff(tau_s, prepend=-np.inf) > 0)
    return TickSeries(tau_s[wanted], c_j[wanted], sd_s)


@dataclass(frozen=True, slots=True)
class _Problem:
    """What explains the ticks' energies: what every step spends, evenly over its time, and time itself."""

    method: SplitMethod
    knots_s: Float64
    """Begin and end of every step, one after the other, shape (2 n,)."""
    reached: tuple[Float64, Float64]
    """What was spent on prefill and on decode until each of them."""
    whole: tuple[float, float]
    """What the window has of them."""
    has_rest: bool
    """There is a third column, time: all of it, or what is outside of steps."""

    def design(self, edges_s: Float64) -> Float64:
        """Amounts between neighbouring edges, a column each."""
        columns = [np.diff(np.interp(edges_s, self.knots_s, reached)) for reached in self.reached]
        if self.has_rest and self.method == "phase_token_regression":
            columns.append(np.diff(edges_s))
        elif self.has_rest:
            columns.append(np.maximum(0.0, np.diff(edges_s) - columns[0] - columns[1]))
        return np.stack(columns, axis=1)


def _by_time(steps: StepTable, window_s: tuple[float, float]) -> _Problem:
    prefilling = steps.prefill_tokens > 0
    length_s = steps.end_s - steps.begin_s
    begin_s, end_s = np.clip(steps.begin_s, *window_s), np.clip(steps.end_s, *window_s)
    inside_s = end_s - begin_s
    whole = (float(inside_s[prefilling].sum()), float(inside_s[~prefilling].sum()))
    has_rest = window_s[1] - window_s[0] - sum(whole) > REST_REL * (window_s[1] - window_s[0])
    reached = (_reached(np.where(prefilling, length_s, 0.0)), _reached(np.where(prefilling, 0.0, length_s)))
    return _Problem("phase_time_regression", _knots(steps), reached, whole, has_rest)


def _by_tokens(steps: StepTable, window_s: tuple[float, float]) -> _Problem:
    amounts = (steps.prefill_tokens, steps.decode_tokens)
    share = shares_inside(steps.begin_s, steps.end_s, *window_s)
    whole = (float(amounts[0] @ share), float(amounts[1] @ share))
    reached = (_reached(amounts[0]), _reached(amounts[1]))
    return _Problem("phase_token_regression", _knots(steps), reached, whole, has_rest=True)


def _fit(problem: _Problem, series: TickSeries, energy_j: float, reach_s: float) -> PhaseSplit | NoSplit:
    spent_j = np.diff(series.c_j)

    def at(shift_s: float) -> tuple[Float64, Any, Float64]:
        design = problem.design(series.tau_s + shift_s)
        weights, *_ = np.linalg.lstsq(design, spent_j, rcond=None)
        return design, weights, spent_j - design @ weights

    centre_s, width_s = 0.0, reach_s
    for _ in range(ZOOMS):
        shifts_s = centre_s + width_s * np.linspace(-1.0, 1.0, SHIFTS)
        squares = [float(left @ left) for _, _, left in map(at, shifts_s)]
        centre_s, width_s = float(shifts_s[int(np.argmin(squares))]), 2 * width_s / (SHIFTS - 1)
    design, weights, left_j = at(centre_s)
    scale = design.max(axis=0)
    if (scale <= 0).any() or _variation(design / scale) < MIN_VARIATION_REL:
        return NoSplit(reason="the mix of phases is the same in every counter tick")
    step_s = max(width_s, 0.5e-3)
    slope = (problem.design(series.tau_s + centre_s + step_s) - problem.design(series.tau_s + centre_s - step_s)) @ weights
    spread, added = _errors(np.column_stack([design / scale, slope / max(float(np.abs(slope).max()), 1e-12)]), left_j)
    whole = np.asarray(problem.whole) / scale[:2]
    parts = []
    for i, name in enumerate(("prefill", "decode")):
        part_j, u_j = float(weights[i]) * problem.whole[i], float(spread[i] * whole[i])
        if part_j <= 0 or u_j > MAX_U_REL * part_j:
            return NoSplit(reason=f"{name} is not told apart: {part_j:.3g} +- {u_j:.2g} J")
        parts.append((part_j, u_j))
    residual_rel = float(np.sqrt(np.mean(left_j**2)) / np.mean(spent_j))
    if residual_rel > MAX_RESIDUAL_REL:
        return NoSplit(reason=f"the phases explain the power badly: {residual_rel:.0%} of a tick's energy is left")
    return PhaseSplit(
        method=problem.method,
        prefill_j=parts[0][0],
        prefill_u_j=parts[0][1],
        decode_j=parts[1][0],
        decode_u_j=parts[1][1],
        rest_j=energy_j - parts[0][0] - parts[1][0],
        residual_rel=residual_rel,
        ticks=len(series.c_j),
        errors=TickErrors(series.tau_s, added[:, :2] * whole),
    )


def _variation(design: Float64) -> float:
    """By how much the first two columns vary apart from all others, over their means: the smaller of the two."""
    found = []
    for i in (0, 1):
        others = np.delete(design, i, axis=1)
        weights, *_ = np.linalg.lstsq(others, design[:, i], rcond=None)
        found.append(float(np.std(design[:, i] - others @ weights) / np.mean(design[:, i])))
    return min(found)


def _errors(design: Float64, left_j: Float64) -> tuple[Float64, Float64]:
    """One sigma of each coefficient, Newey-West's and no less than that of independent errors; what each row adds to it."""
    n, k = design.shape
    inverse = np.linalg.pinv(design.T @ design)
    added = design * left_j[:, None] @ inverse
    freedom = n / max(1, n - k)
    robust = np.array([long_run_variance(added[:, i]) for i in range(k)]) * freedom
    plain = np.diag(inverse) * float(left_j @ left_j) / max(1, n - k)
    result: Float64 = np.sqrt(np.maximum(robust, plain))
    return result, np.sqrt(freedom) * added


def long_run_variance(added: Float64) -> float:
    """Variance of a sum whose terms, shape (n,), go together with their neighbours: by Newey and West's weights."""
    lag = min(LAG_TICKS, len(added) // 4)
    shifts = range(1, lag + 1)
    return float(added @ added + 2 * sum((1.0 - shift / (lag + 1)) * (added[shift:] @ added[:-shift]) for shift in shifts))


def shares_inside(begin: Any, end: Any, window_begin: float, window_end: float) -> Float64:
    """How much of each step lies in a window, 0 to 1. One of no length lies where it begins."""
    begins, ends = np.asarray(begin), np.asarray(end)
    inside = np.clip(ends, window_begin, window_end) - np.clip(begins, window_begin, window_end)
    instant = (begins >= window_begin) & (begins <= window_end)
    shares: Float64 = np.where(ends > begins, inside / np.maximum(ends - begins, np.finfo(float).tiny), instant)
    return shares


def _knots(steps: StepTable) -> Float64:
    return np.stack([steps.begin_s, steps.end_s], axis=1).ravel()


def _reached(amount: Float64) -> Float64:
    """Sum of what each step spends, evenly, at its begin and at its end."""
    until = np.cumsum(amount)
    return np.stack([until - amount, until], axis=1).ravel()


def step_table(begin_ns: Any, end_ns: Any, prefill_tokens: Any, decode_tokens: Any, mixed: Any, origin_ns: int) -> StepTable:
    """Columns of steps, in order of time, as the fit wants them. One that begins before the last has ended begins at its end.

    Args:
        begin_ns: Begin of each step, shape (n,), ns on the clock of the device's node.
        end_ns: End of each.
        prefill_tokens: Prompt tokens computed in each.
        decode_tokens: Output tokens of each.
        mixed: Whether it did both.
        origin_ns: Zero of the ticks' times.
    """
    end_s = np.maximum.accumulate((np.asarray(end_ns, np.int64) - origin_ns) / 1e9)
    begin_s = np.maximum((np.asarray(begin_ns, np.int64) - origin_ns) / 1e9, np.concatenate([[-np.inf], end_s])[:-1])
    return StepTable(
        begin_s=begin_s,
        end_s=np.maximum(end_s, begin_s),
        prefill_tokens=np.asarray(prefill_tokens, np.float64),
        decode_tokens=np.asarray(decode_tokens, np.float64),
        mixed=np.asarray(mixed, np.bool_),
    )
