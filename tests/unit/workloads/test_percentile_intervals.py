"""Bootstrap intervals of latency percentiles: against resamples that are really drawn, and what they cover."""

from __future__ import annotations

import numpy as np
import pytest

from llem_ray.workloads.percentile_intervals import percentile_intervals, requests_needed, why_no_interval


def test_it_is_the_bootstrap_of_resamples_that_are_drawn() -> None:
    values = np.random.default_rng(1).lognormal(0.0, 1.0, 1000)
    resamples = values[np.random.default_rng(2).integers(0, values.size, (4000, values.size))]
    found = percentile_intervals(values, seed=3)
    for percentile, drawn in zip((50, 90, 95, 99), np.percentile(resamples, [50, 90, 95, 99], axis=1), strict=True):
        low, high = np.percentile(drawn, [2.5, 97.5])
        width = high - low
        assert found[percentile][0] == pytest.approx(low, abs=0.12 * width)
        assert found[percentile][1] == pytest.approx(high, abs=0.12 * width)


def test_the_seed_decides() -> None:
    values = np.random.default_rng(1).exponential(1.0, 300)
    assert percentile_intervals(values, seed=1) == percentile_intervals(values[::-1], seed=1)
    assert percentile_intervals(values, seed=1) != percentile_intervals(values, seed=2)


def test_too_few_requests_have_no_interval() -> None:
    values: list[float | None] = [float(number) for number in range(1000)]
    assert [requests_needed(percentile) for percentile in (50, 90, 95, 99)] == [100, 100, 200, 1000]
    assert set(percentile_intervals(values, 0)) == {50, 90, 95, 99}
    assert set(percentile_intervals(values[1:], 0)) == {50, 90, 95}
    assert set(percentile_intervals([*values[:100], None], 0)) == {50, 90}
    assert percentile_intervals([*values[:99], None], 0) == {}
    assert why_no_interval(1000) is None
    assert why_no_interval(150) == "150 requests, p95 takes 200, p99 takes 1000"
    assert why_no_interval(0) is not None


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert percentile_intervals([2.0] * 100, 0) == {50: (2.0, 2.0), 90: (2.0, 2.0)}


@pytest.mark.parametrize(("n", "percentiles"), [(100, (50, 90)), (200, (95,)), (1000, (99,))])
def test_what_it_covers_where_requests_are_as_few_as_may_be(n: int, percentiles: tuple[int, ...]) -> None:
    """1,000 simulated trials: +-1.5 % is noise."""
    rng = np.random.default_rng(n)
    hits: dict[int, list[bool]] = {percentile: [] for percentile in percentiles}
    for trial in range(1000):
        found = percentile_intervals(rng.exponential(1.0, n), seed=trial)
        for percentile in percentiles:
            low, high = found[percentile]
            hits[percentile].append(low <= -np.log(1 - percentile / 100) <= high)
    for percentile in percentiles:
        assert 0.91 <= np.mean(hits[percentile]) <= 0.97, percentile
