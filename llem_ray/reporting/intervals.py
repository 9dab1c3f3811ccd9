"""How sure the numbers of a cell are: intervals over its repeats, or of a single one over its samples or requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from llem_ray.core.measure_spec import StoppingSpec
from llem_ray.energy.metrics import Interval, t_interval
from llem_ray.energy.stopping import repeats_needed, stein_interval

Row = Mapping[str, Any]

LATENCIES: Final = (
    "ttft_s_p50", "ttft_s_p99", "tpot_s_p50", "tpot_s_p99", "inter_chunk_s_p50", "inter_chunk_s_p99",
    "e2e_latency_s_p50", "e2e_latency_s_p99",
)  # fmt: skip
RATES: Final = ("request_throughput_req_s", "output_throughput_tok_s", "total_token_throughput_tok_s", "goodput_req_s")
INTERVAL_COLUMNS: Final = (*LATENCIES, *RATES, *(f"{name}_{end}" for name in LATENCIES for end in ("lo", "hi")))
"""Columns of ``trials`` that intervals of latencies and rates are made from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Uncertain:
    """A mean with the half-width of its interval."""

    mean: float
    half_width: float | None
    n: int
    """Values in the mean."""
    kind: Literal["t95", "stein", "U"]
    """``t95``: 95 % interval of the mean over repeats; ``stein``: that of the target's rule, at its level; ``U``: twice the
    sampling uncertainty of a single repeat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Between:
    """Ends of an interval."""

    low: float
    high: float
    n: int
    """Repeats."""
    kind: Literal["t95", "stein", "requests"]
    """As in ``Uncertain``; ``requests``: 95 % interval of a single repeat's percentile over its requests."""


def mean_interval(values: Sequence[float], sigma: float | None) -> Uncertain | None:
    """95 % t-interval of the mean over repeats; of a single one twice its own sigma. None without values, or a sigma of one.

    Args:
        values: One per repeat.
        sigma: Of a single value.
    """
    interval = t_interval(values)
    if interval is None or (interval.half_width is None and sigma is None):
        return None
    if interval.half_width is not None:
        return Uncertain(mean=interval.mean, half_width=interval.half_width, n=interval.n, kind="t95")
    return Uncertain(mean=interval.mean, half_width=None if sigma is None else 2 * sigma, n=1, kind="U")


def joules_interval(known: Sequence[Row], target: StoppingSpec | None) -> Uncertain | None:
    """Of J per output token.

    Args:
        known: Repeats that have one, by their numbers.
        target: The run's.
    """
    found = _over_repeats("joules_per_output_token", known, target)
    if found is None:
        return None
    interval, kind = found
    if interval.half_width is not None:
        return Uncertain(mean=interval.mean, half_width=interval.half_width, n=interval.n, kind=kind)
    u_j, energy_j = known[0].get("energy_uncertainty_j"), known[0].get("total_energy_j")
    relative = u_j / energy_j if u_j is not None and energy_j else None
    return Uncertain(mean=interval.mean, half_width=None if relative is None else interval.mean * relative, n=1, kind="U")


def serving_intervals(rows: Sequence[Row], target: StoppingSpec | None) -> dict[str, Between | None]:
    """Of latency percentiles and rates; None where one repeat cannot tell.

    Args:
        rows: Repeats that count, by their numbers.
        target: The run's.
    """
    return {name: _between(name, [row for row in rows if row.get(name) is not None], target) for name in (*LATENCIES, *RATES)}


def _between(name: str, known: Sequence[Row], target: StoppingSpec | None) -> Between | None:
    found = _over_repeats(name, known, target)
    if found is None:
        return None
    interval, kind = found
    mean, half_width = interval.mean, interval.half_width
    if half_width is not None:
        return Between(low=mean - half_width, high=mean + half_width, n=interval.n, kind=kind)
    if name not in LATENCIES:
        return None
    low, high = known[0].get(f"{name}_lo"), known[0].get(f"{name}_hi")
    return Between(low=low, high=high, n=1, kind="requests") if low is not None and high is not None else None


def _over_repeats(
    name: str, known: Sequence[Row], target: StoppingSpec | None
) -> tuple[Interval, Literal["t95", "stein"]] | None:
    """By the target's rule where the target is about it and its first repeats are there."""
    values = [row[name] for row in known]
    if target is not None and target.metric == name and repeats_needed(values, target) is not None:
        stein = stein_interval(values, target)
        if stein is not None:
            return stein, "stein"
    interval = t_interval(values)
    return None if interval is None else (interval, "t95")
