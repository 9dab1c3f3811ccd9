"""Intervals of latency percentiles: against resamples that are really drawn, and what they cover, queues and batches included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from llem_ray.workloads.percentile_intervals import PERCENTILES, Intervals, percentile_intervals, requests_needed

Floats = npt.NDArray[np.float64]


def of_requests(values: Sequence[float] | Floats, seed: int = 0) -> Intervals:
    return percentile_intervals([[value] for value in values], seed)


def test_of_independent_requests_it_is_the_bootstrap_of_resamples_that_are_drawn() -> None:
    values = np.random.default_rng(1).lognormal(0.0, 1.0, 4000)
    resamples = values[np.random.default_rng(2).integers(0, values.size, (2000, values.size))]
    found = of_requests(values, seed=3).ends
    for percentile, drawn in zip(PERCENTILES, np.percentile(resamples, PERCENTILES, axis=1), strict=True):
        low, high = np.percentile(drawn, [2.5, 97.5])
        width = high - low
        assert found[percentile][0] == pytest.approx(low, abs=0.2 * width)
        assert found[percentile][1] == pytest.approx(high, abs=0.2 * width)


def test_of_gaps_it_is_the_bootstrap_of_whole_requests() -> None:
    """Each of 600 requests has a pace of its own: its gaps are alike, and many of them tell little more than one."""
    rng = np.random.default_rng(1)
    values = [pace * rng.lognormal(0.0, 0.1, rng.integers(5, 40)) for pace in rng.lognormal(0.0, 0.5, 600)]
    draws = [np.concatenate([values[index] for index in rng.integers(0, 600, 600)]) for _ in range(400)]
    found = percentile_intervals(values, 0)
    for percentile in (50, 90):
        low, high = np.percentile([np.percentile(draw, percentile) for draw in draws], [2.5, 97.5])
        assert found.ends[percentile] == pytest.approx((low, high), abs=0.25 * (high - low))
        assert 200 < found.effective[percentile] < 1300 < sum(map(len, values))


def test_the_seed_decides() -> None:
    values = np.random.default_rng(1).exponential(1.0, 300)
    assert of_requests(values, seed=1) == of_requests(values, seed=1)
    assert of_requests(values, seed=1) != of_requests(values, seed=2)


def test_too_few_requests_have_no_interval() -> None:
    values = np.random.default_rng(3).permutation(1000).astype(float)
    assert [requests_needed(percentile) for percentile in PERCENTILES] == [100, 100, 200, 1000]
    assert set(of_requests(values).ends) == {50, 90, 95, 99}
    assert of_requests(values).why_not is None
    assert set(of_requests(values[1:]).ends) == {50, 90, 95}
    assert set(of_requests(values[:150]).ends) == {50, 90}
    assert of_requests(values[:150]).why_not == "150 requests, p95 takes 200, p99 takes 1000"
    assert of_requests(values[:99]).ends == {}
    assert of_requests(values[:99]).why_not == "99 requests, p50 takes 100, p90 takes 100, p95 takes 200, p99 takes 1000"
    assert percentile_intervals([[], *([value] for value in values[:99])], 0).ends == {}


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert of_requests([2.0] * 100).ends == {50: (2.0, 2.0), 90: (2.0, 2.0)}


def test_a_percentile_that_is_the_largest_value_is_no_surer_for_that() -> None:
    """Two values in runs of 50, by chance more of the larger: whether the median is that one, 40 runs hardly know."""
    levels = np.random.default_rng(1).permutation([0.0] * 18 + [1.0] * 22)
    found = of_requests(np.repeat(levels, 50))
    assert found.effective[50] < 100
    assert found.ends == {}


@pytest.mark.parametrize("n", [101, 128, 257])
def test_neighbours_are_weighed_by_all_lags_up_to_where_they_are_noise(n: int) -> None:
    """Recomputed from the autocovariances' definition, lag by lag."""
    values = np.random.default_rng(n).normal(size=n)
    values = np.convolve(values, np.ones(5), mode="same")
    series = (values <= np.percentile(values, 50)).astype(float)
    series -= series.mean()
    of_lag = [float(series[: n - lag] @ series[lag:]) / n for lag in range(n)]
    pairs = [of_lag[lag] + of_lag[lag + 1] for lag in range(0, n - 1, 2)]
    kept = pairs[: next(index for index, pair in enumerate(pairs) if pair <= 0)]
    spread = 2 * float(np.minimum.accumulate(kept).sum()) - of_lag[0]
    assert of_requests(values).effective[50] == pytest.approx(n * of_lag[0] / spread)


def test_neighbours_that_tell_of_each_other_count_for_less() -> None:
    """The same 1,000 values, each ten times in a row: no more than 1,000 are known."""
    values = np.random.default_rng(4).exponential(1.0, 1000)
    single, tenfold = of_requests(values), of_requests(np.repeat(values, 10))
    assert single.effective[50] > 800
    assert tenfold.effective[50] == pytest.approx(1000, rel=0.25)
    widths = [found.ends[50][1] - found.ends[50][0] for found in (single, tenfold)]
    assert widths[1] == pytest.approx(widths[0], rel=0.25)
    assert 99 not in tenfold.ends
    assert tenfold.why_not is not None
    assert tenfold.why_not.startswith("10000 requests that tell of each other, worth ")
    assert tenfold.why_not.endswith(" independent ones, p99 takes 2000")


def independent(rng: np.random.Generator, n: int) -> Floats:
    return rng.exponential(1.0, n)


def queue(load: float) -> Callable[[np.random.Generator, int], Floats]:
    """Times in an M/M/1 queue, each in units of their mean: exponential too, but neighbours wait behind the same others."""

    def times(rng: np.random.Generator, n: int) -> Floats:
        service = rng.exponential(1.0, n)
        walk = np.concatenate([[0.0], np.cumsum(service[:-1] - rng.exponential(1 / load, n - 1))])
        first = rng.exponential(1 / (1 - load)) if rng.random() < load else 0.0
        return (np.maximum(walk + first, walk - np.minimum.accumulate(walk)) + service) * (1 - load)

    return times


@pytest.mark.parametrize(
    ("make", "n", "percentiles"),
    [
        (independent, 100, (50, 90)),
        (independent, 200, (95,)),
        (independent, 1000, (99,)),
        (queue(0.3), 1000, (50, 90)),
        (queue(0.5), 3000, (50, 90)),
        (queue(0.7), 3000, (50,)),
    ],
    ids=["independent p50, p90", "independent p95", "independent p99", "load 0.3", "load 0.5", "load 0.7"],
)
def test_what_it_covers(make: Callable[[np.random.Generator, int], Floats], n: int, percentiles: tuple[int, ...]) -> None:
    """300 simulated trials: +-2.5 % is noise. Taken as independent, those of the queues would cover 40 to 85 %."""
    rng, trials = np.random.default_rng(n), 300
    hits: dict[int, list[bool]] = {percentile: [] for percentile in percentiles}
    for trial in range(trials):
        ends = of_requests(make(rng, n), seed=trial).ends
        for percentile in percentiles:
            if percentile in ends:
                low, high = ends[percentile]
                hits[percentile].append(bool(low <= -np.log(1 - percentile / 100) <= high))
    for percentile in percentiles:
        assert len(hits[percentile]) > 0.8 * trials, percentile
        assert np.mean(hits[percentile]) >= 0.91, percentile


def served(rng: np.random.Generator, n: int, together: int) -> list[list[float]]:
    """Gaps of requests that run together, some 20 each: a step has one length for all, longer where requests have just begun."""
    left, gaps, running = list(rng.geometric(1 / 20, n)), [list[float]() for _ in range(n)], list[int]()
    begun = 0
    while len(running) or begun < n:
        fresh = range(begun, min(n, begun + together - len(running)))
        running, begun = [*running, *fresh], begun + len(fresh)
        step_s = 0.01 + rng.exponential(0.001) + len(fresh) * rng.lognormal(-4, 0.8)
        for number in running:
            gaps[number].append(step_s)
            left[number] -= 1
        running = [number for number in running if left[number]]
    return gaps


def test_what_it_covers_of_gaps_between_tokens_of_requests_that_run_together() -> None:
    """Resampling requests as if each were on its own would cover half of the truths here: eight share every step."""
    rng, trials = np.random.default_rng(8), 120
    truth = np.percentile([gap for of_one in served(rng, 30_000, 8) for gap in of_one], PERCENTILES)
    hits: list[list[bool]] = [[] for _ in PERCENTILES]
    for trial in range(trials):
        ends = percentile_intervals(served(rng, 400, 8), trial).ends
        for index, percentile in enumerate(PERCENTILES):
            if percentile in ends:
                hits[index].append(bool(ends[percentile][0] <= truth[index] <= ends[percentile][1]))
    assert all(len(of_one) > 0.8 * trials for of_one in hits[:3])
    assert all(np.mean(of_one) >= 0.88 for of_one in hits[:3])
