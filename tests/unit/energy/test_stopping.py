"""Stein's rule: its numbers against scipy's, and what it promises against simulated cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from llem_ray.core.measure_spec import StoppingSpec
from llem_ray.energy.metrics import t_interval
from llem_ray.energy.stopping import (
    Repeat,
    coefficient_of_variation,
    find_outliers,
    is_surely_needed,
    judge,
    metric_value,
    repeats_needed,
    stein_interval,
)

TARGET = StoppingSpec(half_width_rel=0.02)
CELLS = 2000


def repeats(*values: float | None, window_s: float = 10.0) -> dict[int, Repeat]:
    return {number: Repeat(value=value, window_s=window_s) for number, value in enumerate(values)}


class TestNumbers:
    @pytest.mark.parametrize(("first", "confidence"), [(5, 0.95), (8, 0.9), (20, 0.99)])
    def test_needed_and_interval_are_those_of_the_formula(self, first: int, confidence: float) -> None:
        spec = StoppingSpec(half_width_rel=0.01, confidence=confidence, first=first)
        values = np.random.default_rng(first).normal(3.0, 0.1, 60).tolist()
        t = stats.t.ppf((1 + confidence) / 2, first - 1)
        s0, h = np.std(values[:first], ddof=1), 0.01 * np.mean(values[:first])
        assert repeats_needed(values, spec) == max(first, math.floor((t * s0 / h) ** 2) + 1)
        interval = stein_interval(values, spec)
        assert interval is not None
        assert interval.mean == pytest.approx(np.mean(values))
        assert interval.half_width == pytest.approx(t * s0 / math.sqrt(60))

    def test_later_values_do_not_change_what_is_needed(self) -> None:
        first = [1.0, 1.1, 0.9, 1.05, 0.95]
        assert repeats_needed(first, TARGET) == repeats_needed([*first, 5.0, 9.0], TARGET)

    def test_equal_values_need_no_more(self) -> None:
        assert judge(repeats(*[2.0] * 5), TARGET).ended == "target"

    def test_variation_and_outliers(self) -> None:
        values = [1.0, 1.01, 0.99, 1.02, 0.98, 3.0]
        assert coefficient_of_variation(values) == pytest.approx(stats.variation(values, ddof=1))
        assert find_outliers(values) == (5,)
        assert find_outliers(values[:4]) == ()
        assert find_outliers([1.0] * 6) == ()
        assert coefficient_of_variation([1.0]) is None

    @pytest.mark.parametrize("n", [5, 6, 7, 8, 10, 12, 20, 30, 60])
    def test_where_nothing_is_wrong_hardly_any_cell_has_an_outlier(self, n: int) -> None:
        draws = np.random.default_rng(n).normal(1.0, 0.02, (1500, n))
        assert np.mean([len(find_outliers(list(row))) > 0 for row in draws]) <= 0.03

    @pytest.mark.parametrize(("n", "off"), [(5, 1.8), (10, 1.3), (30, 1.2)])
    def test_a_repeat_that_something_happened_to_is_found(self, n: int, off: float) -> None:
        draws = np.random.default_rng(n).normal(1.0, 0.02, (200, n))
        draws[:, 2] = off
        assert np.mean([find_outliers(list(row)) == (2,) for row in draws]) >= 0.9


class TestVerdict:
    def test_nothing_is_known_before_the_first_ones_are_there(self) -> None:
        verdict = judge(repeats(1.0, 1.0, 1.0, 1.0), TARGET)
        assert (verdict.needed, verdict.ended) == (None, None)

    def test_repeats_without_a_value_do_not_count(self) -> None:
        assert judge(repeats(1.0, None, 1.0, 1.0, 1.0), TARGET).ended is None
        assert judge(repeats(1.0, None, 1.0, 1.0, 1.0, 1.0), TARGET).ended == "target"

    def test_the_first_ones_are_the_first_by_number_whichever_come_first(self) -> None:
        """A repeat whose result is late is one of them: others must not take its place, or N would change when it comes."""
        values = [1.0, 1.1, 0.9, 1.2, 1.0, 1.05, 1.0]
        whole = repeats(*values)
        late = {number: repeat for number, repeat in whole.items() if number != 2}
        assert judge(late, TARGET).needed is None
        assert judge(whole, TARGET).needed == judge(repeats(*values[:5]), TARGET).needed
        beyond = repeats(*[2.0, 2.0, 2.0, 2.0, 2.01]) | {7: Repeat(value=2.0)}
        assert judge(beyond, TARGET).ended == "target"

    def test_a_repeat_is_surely_needed_while_all_that_is_missing_cannot_do(self) -> None:
        noisy = repeats(1.0, 1.01, 0.99, 1.02, 0.98)
        needed = judge(noisy, TARGET).needed
        assert needed == 5
        tight = StoppingSpec(half_width_rel=0.01)
        needed = judge(noisy, tight).needed
        assert needed == 20
        assert is_surely_needed(noisy, 14, tight)
        assert not is_surely_needed(noisy, 15, tight)
        assert is_surely_needed(repeats(1.0, None, None), 3, tight)
        assert not is_surely_needed(repeats(1.0, None, None), 4, tight)
        limited = StoppingSpec(half_width_rel=0.01, budget_s=100.0)
        assert is_surely_needed(noisy, 4, limited)
        assert not is_surely_needed(noisy, 5, limited)

    def test_the_budget_ends_it_but_not_before_the_first_ones(self) -> None:
        spec = StoppingSpec(half_width_rel=0.001, budget_s=65.0)
        noisy = [1.0, 1.2, 0.8, 1.1, 0.9, 1.0, 1.1]
        assert judge(repeats(*noisy[:4]), spec).ended is None
        assert judge(repeats(*noisy[:5]), spec).ended is None
        assert judge(repeats(*noisy[:6]), spec).ended == "budget"
        assert judge(repeats(*noisy[:5], window_s=30.0), spec).ended == "budget"

    def test_without_a_target_nothing_ends(self) -> None:
        assert judge(repeats(*[1.0] * 9), StoppingSpec()).ended is None

    def test_a_mean_of_zero_has_no_relative_target(self) -> None:
        assert judge(repeats(0.0, 0.0, 0.0, 0.0, 0.0), TARGET).ended is None

    @pytest.mark.parametrize(
        ("row", "metric", "value"),
        [
            ({"status": "completed", "power_valid": True, "joules_per_output_token": 2.0}, "joules_per_output_token", 2.0),
            ({"status": "completed", "power_valid": False, "joules_per_output_token": 2.0}, "joules_per_output_token", None),
            ({"status": "completed", "power_valid": False, "output_throughput_tok_s": 2.0}, "output_throughput_tok_s", 2.0),
            ({"status": "failed", "power_valid": True, "output_throughput_tok_s": 2.0}, "output_throughput_tok_s", None),
        ],
    )
    def test_values_of_rows(self, row: dict[str, object], metric: str, value: float | None) -> None:
        assert metric_value(row, metric) == value


def covered(half_width: float | None, mean: float, truth: float) -> bool:
    assert half_width is not None
    return abs(mean - truth) <= half_width


class TestCoverage:
    """Simulated cells of J/token 1 with a spread between repeats; with 2,000 of them +-1 % is noise."""

    @pytest.mark.parametrize("n", [3, 5, 20])
    @pytest.mark.parametrize("spread", [0.01, 0.1])
    def test_fixed_repeats_cover_93_to_97_percent(self, n: int, spread: float) -> None:
        draws = np.random.default_rng(n).normal(1.0, spread, (CELLS, n))
        intervals = [t_interval(row.tolist()) for row in draws]
        share = np.mean([covered(one.half_width, one.mean, 1.0) for one in intervals if one is not None])
        assert 0.93 <= share <= 0.97

    @pytest.mark.parametrize("spread", [0.01, 0.03, 0.08])
    @pytest.mark.parametrize("first", [5, 10])
    def test_the_target_rule_covers_and_keeps_its_promise(self, spread: float, first: int) -> None:
        rng, spec = np.random.default_rng(first), StoppingSpec(half_width_rel=0.02, first=first)
        hits, widths, counts = [], [], []
        for _ in range(CELLS):
            values = rng.normal(1.0, spread, first).tolist()
            needed = repeats_needed(values, spec)
            assert needed is not None
            values += rng.normal(1.0, spread, needed - first).tolist()
            assert judge(repeats(*values), spec).ended == "target"
            interval = stein_interval(values, spec)
            assert interval is not None
            assert interval.half_width is not None
            hits.append(covered(interval.half_width, interval.mean, 1.0))
            widths.append(interval.half_width / np.mean(values[:first]))
            counts.append(needed)
        assert np.mean(hits) >= 0.93
        assert max(widths) <= 0.02
        assert min(counts) >= first
        assert np.mean(counts) == pytest.approx(max(first, (stats.t.ppf(0.975, first - 1) * spread / 0.02) ** 2), rel=0.25)

    def test_stopping_when_the_interval_looks_tight_would_cover_less(self) -> None:
        """Why the rule is not the naive one."""
        rng, hits = np.random.default_rng(1), []
        for _ in range(CELLS // 2):
            values = rng.normal(1.0, 0.05, 5).tolist()
            while (one := t_interval(values)) is not None and one.half_width is not None and one.half_width > 0.02 * one.mean:
                values.append(rng.normal(1.0, 0.05))
            assert one is not None
            hits.append(covered(one.half_width, one.mean, 1.0))
        assert np.mean(hits) < 0.93
