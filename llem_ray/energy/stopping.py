"""How many repeats a cell needs, told by its first ones: Stein's two-stage rule.

C. Stein, "A two-sample test for a linear hypothesis whose power is independent of the variance", Ann. Math. Statist. 16 (1945).
The spread of the first n0 repeats fixes the number N once and for all; looking at the interval after every repeat and
stopping when it is tight would cover less than it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from math import floor, sqrt
from statistics import fmean, median, stdev
from typing import Any, Final, Literal

from llem_ray.core.measure_spec import StoppingSpec
from llem_ray.energy.metrics import Interval, t_quantile

OUTLIER_Z: Final = {5: 13.1, 6: 8.4, 8: 6.8, 10: 5.8, 15: 5.2, 20: 4.7, 30: 4.4, 50: 4.2}
"""Values, at least -> modified z-score that their largest exceeds in 2 % of normal samples, by simulation."""
ENERGY_METRICS: Final = frozenset({"joules_per_output_token", "joules_per_total_token"})
MAD_TO_SD: Final = 0.6745
NOT_REACHED: Final = "window_not_reached"
"""Reason of a row whose window is another than the one that was asked for."""

Ended = Literal["target", "repeats", "budget"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeat:
    """One repeat that has ended."""

    value: float | None
    """What the target is about; None where the repeat failed or its energy is not valid."""
    window_s: float = 0.0
    """Measured time it took."""


def metric_value(row: Mapping[str, Any], metric: str) -> float | None:
    """A target's metric in a row of ``trials``.

    None where the trial failed, where it does not have the window that was asked for, or where the metric's energy is not valid.
    """
    if row.get("status") == "failed" or NOT_REACHED in (row.get("invalid_reasons") or ()):
        return None
    if metric in ENERGY_METRICS and not row.get("power_valid"):
        return None
    value: float | None = row.get(metric)
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is known of a cell after some repeats."""

    needed: int | None
    """Repeats with a value that the target takes; None before the first ones are there."""
    ended: Literal["target", "budget"] | None
    """Why the cell gets no further repeats; None where it does."""


def judge(repeats: Mapping[int, Repeat], spec: StoppingSpec) -> Verdict:
    """Whether a cell has enough repeats.

    N = max(n0, floor((t s0 / h)^2) + 1), with s0 the standard deviation of the first n0 values, t the quantile of Student's
    distribution with n0 - 1 degrees of freedom, and h the target: ``half_width_rel`` of the mean of the first n0. Stein's rule is
    exact for an h that is fixed beforehand; taking the mean of the first values for it costs little (a test simulates it).

    The first n0 are the first by their numbers, whichever end first: while one before them is missing N is not known. Results
    beyond a gap count as values all the same.

    Args:
        repeats: Number of a repeat, from 0, to what it gave, of those that have ended; some may have no value.
        spec: The target.
    """
    values = values_in_order(repeats)
    needed = repeats_needed(values_in_order(_before_gap(repeats)), spec)
    if needed is not None and len(values) >= needed:
        return Verdict(needed=needed, ended="target")
    spent_s = sum(repeat.window_s for repeat in repeats.values())
    next_s = spent_s / len(repeats) if repeats else 0.0
    # The first repeats are needed for any interval at all.
    over = spec.budget_s is not None and len(repeats) >= spec.first and spent_s + next_s > spec.budget_s
    return Verdict(needed=needed, ended="budget" if over else None)


def is_surely_needed(repeats: Mapping[int, Repeat], missing: int, spec: StoppingSpec) -> bool:
    """Whether a cell needs one more repeat whatever those give that have not ended yet.

    Args:
        repeats: Those that have ended; ``judge`` does not end the cell by them.
        missing: How many have begun or are to begin before it, and have not ended.
        spec: The target.
    """
    enough = judge(repeats, spec).needed or spec.first
    if len(values_in_order(repeats)) + missing >= enough:
        return False
    if spec.budget_s is None:
        return True
    windows_s = [repeat.window_s for repeat in repeats.values()]
    return sum(windows_s) + (missing + 1) * max(windows_s, default=0.0) <= spec.budget_s


def values_in_order(repeats: Mapping[int, Repeat]) -> list[float]:
    """Values of the repeats that have one, by their numbers."""
    return [value for number in sorted(repeats) if (value := repeats[number].value) is not None]


def _before_gap(repeats: Mapping[int, Repeat]) -> Mapping[int, Repeat]:
    return {number: repeats[number] for number in takewhile(repeats.__contains__, count())}


def repeats_needed(values: Sequence[float], spec: StoppingSpec) -> int | None:
    """Values that the target takes, told by the first ``spec.first``; None while there are fewer, or without a target."""
    if spec.half_width_rel is None or len(values) < spec.first:
        return None
    first = values[: spec.first]
    target = spec.half_width_rel * abs(fmean(first))
    if target == 0.0:
        return None
    return max(spec.first, floor((_quantile(spec) * stdev(first) / target) ** 2) + 1)


def stein_interval(values: Sequence[float], spec: StoppingSpec) -> Interval | None:
    """Mean of all values +- t s0 / sqrt(n), with s0 and its degrees of freedom of the first ``spec.first``.

    None while there are fewer. For the number of repeats that ``judge`` asks for it covers as stated and is as tight as asked.
    """
    if len(values) < spec.first:
        return None
    half_width = _quantile(spec) * stdev(values[: spec.first]) / sqrt(len(values))
    return Interval(fmean(values), half_width, len(values), spec.confidence)


def coefficient_of_variation(values: Sequence[float]) -> float | None:
    """Standard deviation over mean; None for fewer than two values, or a mean of 0."""
    if len(values) < 2 or fmean(values) == 0.0:
        return None
    return stdev(values) / abs(fmean(values))


def find_outliers(values: Sequence[float]) -> tuple[int, ...]:
    """Indices of values whose modified z-score, 0.6745 |x - median| / MAD, exceeds ``OUTLIER_Z``.

    B. Iglewicz and D. Hoaglin, "How to Detect and Handle Outliers" (1993). Their cutoff of 3.5 is for large samples: of five
    values with nothing wrong it names one in a fifth of all cells. Outliers are to be looked at, and stay in every mean: none
    below five values, where nobody can tell.
    """
    cutoffs = [cutoff for least, cutoff in OUTLIER_Z.items() if len(values) >= least]
    if not cutoffs:
        return ()
    middle = median(values)
    spread = median([abs(value - middle) for value in values])
    if spread == 0.0:
        return ()
    return tuple(i for i, value in enumerate(values) if MAD_TO_SD * abs(value - middle) / spread > cutoffs[-1])


def _quantile(spec: StoppingSpec) -> float:
    return t_quantile((1 + spec.confidence) / 2, spec.first - 1)
