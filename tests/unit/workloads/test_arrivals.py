"""Schedules of open loops: the right distribution, the asked rate, the same times for the same seed."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from llem_ray.core.backend import LoadSchedule
from llem_ray.core.units import NS_PER_S
from llem_ray.core.workload_spec import LoadSpec
from llem_ray.workloads.arrivals import constant_arrivals_s, gamma_arrivals_s, make_schedule
from llem_ray.workloads.traces import Arrival


def gaps(times_s: tuple[float, ...]) -> list[float]:
    return [later - earlier for earlier, later in pairwise((0.0, *times_s))]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed(burstiness: float) -> None:
    """Of gamma(k, theta) the coefficient of variation is 1 / sqrt(k), whatever the scale."""
    drawn = gaps(gamma_arrivals_s(20_000, 50.0, burstiness, seed=1))
    assert fmean(drawn) == pytest.approx(1 / 50)
    assert pstdev(drawn) / fmean(drawn) == pytest.approx(burstiness**-0.5, rel=0.03)


def test_a_poisson_process_has_exponential_gaps() -> None:
    drawn = gaps(gamma_arrivals_s(20_000, 1.0, 1.0, seed=2))
    assert sum(gap > 1.0 for gap in drawn) / len(drawn) == pytest.approx(2.718281828**-1, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_the_last_request_is_due_at_n_over_rate(seed: int) -> None:
    times_s = gamma_arrivals_s(10, 4.0, 0.5, seed)
    assert times_s[-1] == pytest.approx(2.5)
    assert list(times_s) == sorted(times_s)


def test_a_seed_fixes_the_times() -> None:
    assert gamma_arrivals_s(3, 1.0, 1.0, 7) == gamma_arrivals_s(3, 1.0, 1.0, 7)
    assert gamma_arrivals_s(3, 1.0, 1.0, 7) != gamma_arrivals_s(3, 1.0, 1.0, 8)


def test_constant_arrivals_have_equal_gaps() -> None:
    assert constant_arrivals_s(4, 2.0) == (0.5, 1.0, 1.5, 2.0)


def test_a_trace_is_replayed_from_its_first_arrival_and_as_fast_as_asked() -> None:
    trace = [Arrival(at_s=at_s, input_tokens=None, output_tokens=None, line=1) for at_s in (100.0, 101.0, 104.0, 109.0)]
    made = make_schedule(LoadSpec(pattern="trace", trace="t.csv", trace_speed=2.0), 3, 0, trace)
    assert made == LoadSchedule(send_at_ns=(0, NS_PER_S // 2, 2 * NS_PER_S))


@pytest.mark.parametrize(
    ("load", "schedule"),
    [
        (LoadSpec(pattern="saturated"), LoadSchedule()),
        (LoadSpec(pattern="saturated", concurrency=8), LoadSchedule(max_in_flight=8)),
        (LoadSpec(pattern="closed", concurrency=3), LoadSchedule(max_in_flight=3)),
        (LoadSpec(pattern="constant", rate_per_s=1.0), LoadSchedule(send_at_ns=(NS_PER_S, 2 * NS_PER_S))),
    ],
)
def test_the_schedule_of_a_load(load: LoadSpec, schedule: LoadSchedule) -> None:
    assert make_schedule(load, 2, 0) == schedule
