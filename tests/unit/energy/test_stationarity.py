"""The test for a trend across a window, against scipy and against series whose trend is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kendalltau

from llem_ray.core.power import Trace
from llem_ray.core.units import NS_PER_S
from llem_ray.energy.stationarity import BINS, Trend, bin_power_w, bin_tokens, check_drift, edges_ns, trend


@pytest.mark.parametrize("series", [np.arange(20.0) + 1, np.array([3, 1, 2, 2, 5, 4, 4, 4, 6, 2, 7, 3.0]), np.full(20, 7.0)])
def test_p_values_are_those_of_kendalls_tau(series: np.ndarray) -> None:
    """Mann-Kendall's test is Kendall's tau against time; scipy has no continuity correction: compare with it taken back."""
    found = trend(series)
    assert found is not None
    if len(set(series)) == 1:
        assert found == Trend(drift_rel=0.0, p_value=1.0)
        return
    expected = kendalltau(np.arange(len(series)), series, method="asymptotic").pvalue
    assert found.p_value >= expected
    assert found.p_value == pytest.approx(expected, rel=0.35)


def test_by_hand() -> None:
    """1 2 3 4 5: S = 10, var S = 5 x 4 x 15 / 18, z = 9 / sqrt(16.667) = 2.2045, p = 0.0275; halves of 2: 4.5 / 1.5."""
    found = trend(np.array([1.0, 2, 3, 4, 5]))
    assert found is not None
    assert (found.drift_rel, found.p_value) == (pytest.approx(2.0), pytest.approx(0.0275, abs=1e-4))


def test_false_alarms_are_as_rare_as_promised() -> None:
    draws = np.random.default_rng(5)
    p_values = [found.p_value for _ in range(2000) if (found := trend(draws.gamma(4.0, 25.0, BINS))) is not None]
    assert np.mean(np.array(p_values) < 0.01) == pytest.approx(0.01, abs=0.007)


@pytest.mark.parametrize(
    ("found", "flagged"),
    [
        (Trend(drift_rel=0.2, p_value=0.001), True),
        (Trend(drift_rel=-0.2, p_value=0.001), True),
        (Trend(drift_rel=0.01, p_value=0.001), False),
        (Trend(drift_rel=0.2, p_value=0.2), False),
        (None, False),
    ],
)
def test_a_trend_is_flagged_where_it_is_both_significant_and_large(found: Trend | None, flagged: bool) -> None:
    assert [flag.code for flag in check_drift("power", found, 0.05)] == ["not_stationary"] * flagged


def trace(t_s: np.ndarray, power_w: np.ndarray, energy_j: np.ndarray | None = None) -> Trace:
    nothing = np.full(len(t_s), np.nan)
    return Trace(
        device_uuid="G",
        t_ns=(t_s * NS_PER_S).astype(np.int64),
        hw_ns=np.zeros(len(t_s), np.int64),
        power_mw=power_w * 1000,
        power_avg_mw=nothing,
        energy_mj=nothing if energy_j is None else energy_j * 1000,
    )


def test_power_of_a_ramp_by_its_counter_and_by_its_readings() -> None:
    """P = 100 W + 10 W/s x t over 20 s: bin k of 1 s has 105 + 10 k W; halves 150 and 250 W."""
    t_s = np.arange(0.0, 20.001, 0.05)
    edges = edges_ns(0, 20 * NS_PER_S)
    assert edges is not None
    expected = 105.0 + 10.0 * np.arange(20)
    for energy_j in (100 * t_s + 5 * t_s**2, None):
        power_w = bin_power_w(trace(t_s, 100 + 10 * t_s, energy_j), edges)
        assert power_w == pytest.approx(expected, abs=0.6)
        found = trend(power_w)
        assert found is not None
        assert found.drift_rel == pytest.approx(250 / 150 - 1, rel=0.01)
        assert check_drift("power", found, 0.05)


def test_a_hole_in_the_readings_gives_no_trend() -> None:
    t_s = np.concatenate((np.arange(0.0, 5.0, 0.05), np.arange(8.0, 20.0, 0.05)))
    edges = edges_ns(0, 20 * NS_PER_S)
    assert edges is not None
    assert bin_power_w(trace(t_s, np.full(len(t_s), 100.0)), edges) is None


def test_a_short_window_has_no_bins() -> None:
    assert edges_ns(0, 9 * NS_PER_S) is None


def test_tokens_are_binned_at_the_end_of_their_bin() -> None:
    edges = np.array([0, 10, 20], np.int64)
    assert bin_tokens(np.array([20, 0, 5, 10, 11, 21], np.int64), edges).tolist() == [2.0, 2.0]
