"""Lengths drawn from distributions: bounds, moments against scipy, and the same numbers for ever."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import LengthSpec
from llem_ray.workloads.lengths import draw_lengths, load_lengths

COUNT = 20_000
NORMAL = LengthSpec(distribution="normal", mean=500, std=120)
LOGNORMAL = LengthSpec(distribution="lognormal", mean=800, std=600)


@st.composite
def specs(draw: st.DrawFn) -> LengthSpec:
    least = draw(st.integers(1, 500))
    most = draw(st.integers(least, 3000))
    kind = draw(st.sampled_from(["uniform", "normal", "lognormal", "fixed", "empirical"]))
    if kind == "uniform":
        return LengthSpec(distribution="uniform", min=least, max=most)
    if kind == "fixed":
        return LengthSpec(distribution="fixed", mean=least)
    if kind == "empirical":
        return LengthSpec(
            distribution="empirical", values=tuple(draw(st.lists(st.integers(least, most), min_size=1, max_size=9)))
        )
    mean = draw(st.floats(least, most))
    std = draw(st.sampled_from([0.0, 1e-9, 0.1, 5.0, 300.0, 1e6]))
    bounds = {"min": draw(st.sampled_from([None, least])), "max": draw(st.sampled_from([None, most]))}
    return LengthSpec(distribution=kind, mean=mean, std=std, **bounds)  # type: ignore[arg-type]


@given(spec=specs(), seed=st.integers(0, 10**9), count=st.integers(1, 60))
def test_bounds_hold_and_more_lengths_begin_with_the_same(spec: LengthSpec, seed: int, count: int) -> None:
    drawn = draw_lengths(spec, count, str(seed))
    assert drawn == draw_lengths(spec, count + 7, str(seed))[:count]
    least, most = spec.min or 1, spec.max or math.inf
    if spec.distribution == "empirical":
        assert set(drawn) <= set(spec.values or ())
    assert all(type(length) is int and least <= length <= most for length in drawn)


def test_seeds_and_fields_draw_apart() -> None:
    assert draw_lengths(NORMAL, 50, "0/input_tokens") != draw_lengths(NORMAL, 50, "1/input_tokens")
    assert draw_lengths(NORMAL, 50, "0/input_tokens") != draw_lengths(NORMAL, 50, "0/output_tokens")


@pytest.mark.parametrize(
    ("spec", "numbers"),
    [
        (LengthSpec(distribution="uniform", min=1, max=1000), [19, 398, 961, 287, 673, 360, 983, 220]),
        (NORMAL, [250, 469, 710, 432, 554, 457, 754, 407]),
        (LOGNORMAL, [160, 538, 2064, 439, 862, 503, 2632, 382]),
        (LengthSpec(distribution="empirical", values=(10, 20, 30), weights=(1, 0, 3)), [10, 30, 30, 30, 30, 30, 30, 10]),
    ],
)
def test_numbers_never_change(spec: LengthSpec, numbers: list[int]) -> None:
    """Neither with a library, nor with the Python version, nor with the machine."""
    assert draw_lengths(spec, 8, "7/input_tokens") == numbers


def test_a_normal_has_its_mean_and_spread() -> None:
    drawn = np.array(draw_lengths(NORMAL, COUNT, "0"))
    assert drawn.mean() == pytest.approx(500, abs=5 * 120 / math.sqrt(COUNT))
    assert drawn.std() == pytest.approx(120, rel=0.02)
    assert stats.kstest(drawn, stats.norm(500, 120).cdf).statistic < 1.63 / math.sqrt(COUNT)  # 1 % level


def test_mean_and_std_of_a_lognormal_are_those_of_the_length() -> None:
    drawn = np.array(draw_lengths(LOGNORMAL, COUNT, "0"))
    variance = math.log(1 + (600 / 800) ** 2)
    oracle = stats.lognorm(s=math.sqrt(variance), scale=math.exp(math.log(800) - variance / 2))
    assert (oracle.mean(), oracle.std()) == pytest.approx((800, 600))
    assert drawn.mean() == pytest.approx(800, abs=5 * 600 / math.sqrt(COUNT))
    assert drawn.std() == pytest.approx(600, rel=0.05)
    assert np.median(drawn) == pytest.approx(800 / math.sqrt(1 + (600 / 800) ** 2), rel=0.03)
    assert stats.kstest(drawn, oracle.cdf).statistic < 1.63 / math.sqrt(COUNT)


def test_bounds_cut_a_normal_off_and_pile_nothing_up() -> None:
    spec = LengthSpec(distribution="normal", mean=500, std=120, min=450, max=700)
    drawn = np.array(draw_lengths(spec, COUNT, "0"))
    oracle = stats.truncnorm((449.5 - 500) / 120, (700.5 - 500) / 120, 500, 120)
    assert stats.kstest(drawn, oracle.cdf).statistic < 1.63 / math.sqrt(COUNT)
    share_at_bound = oracle.cdf(450.5)
    assert np.mean(drawn == 450) == pytest.approx(share_at_bound, abs=5 * math.sqrt(share_at_bound / COUNT))


def test_a_uniform_draws_every_number_alike() -> None:
    counts = Counter(draw_lengths(LengthSpec(distribution="uniform", min=3, max=12), COUNT, "0"))
    assert sorted(counts) == list(range(3, 13))
    assert stats.chisquare(list(counts.values())).pvalue > 0.001


def test_weights_are_kept() -> None:
    spec = LengthSpec(distribution="empirical", values=(5, 50, 500, 5000), weights=(6, 3, 1, 0))
    counts = Counter(draw_lengths(spec, COUNT, "0"))
    assert sorted(counts) == [5, 50, 500]
    assert stats.chisquare([counts[5], counts[50], counts[500]], [0.6 * COUNT, 0.3 * COUNT, 0.1 * COUNT]).pvalue > 0.001


def test_lengths_of_answers_are_limited() -> None:
    spec = LengthSpec(distribution="answer", min=4, max=9)
    assert draw_lengths(spec, 4, "0", answers=[0, 5, 9, 80]) == [4, 5, 9, 9]
    with pytest.raises(ConfigError, match="known answer of request 1 has no tokens") as caught:
        draw_lengths(LengthSpec(distribution="answer"), 2, "0", answers=[3, 0])
    assert (caught.value.field, caught.value.allowed) == ("workload.output_tokens", "at least 1")


def test_a_file_of_lengths(tmp_path: Path) -> None:
    (tmp_path / "lengths.csv").write_text("12\n\n300, 2.5\n", encoding="utf-8")
    spec = load_lengths(LengthSpec(distribution="empirical", path="lengths.csv"), tmp_path, "workload.input_tokens")
    assert spec == LengthSpec(distribution="empirical", values=(12, 300), weights=(1.0, 2.5))
    assert load_lengths(spec, tmp_path, "workload.input_tokens") is spec


@pytest.mark.parametrize("line", ["tokens", "0", "-3", "1.5", "12,-1", "12,nan", "12,inf", "12;3"])
def test_a_line_that_is_no_length_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(f"12\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a length") as caught:
        load_lengths(LengthSpec(distribution="empirical", path="lengths.csv"), tmp_path, "workload.output_tokens")
    error = caught.value
    assert (error.file, error.line, error.field, error.found) == (str(path), 2, "workload.output_tokens.path", line)


@pytest.mark.parametrize(("text", "says"), [(None, "does not exist"), ("\n \n", "is empty"), ("3,0\n", "is empty")])
def test_a_file_without_lengths_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "l.csv").write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_lengths(LengthSpec(distribution="empirical", path="l.csv"), tmp_path, "workload.input_tokens")
    assert caught.value.file == str(tmp_path / "l.csv")
