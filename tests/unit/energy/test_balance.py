"""How evenly a gang's devices worked."""

from __future__ import annotations

import numpy as np
import pytest

from llem_ray.energy.balance import idle_bubble_share, rank_imbalance

IDLE_W = 100.0


def mw(*watts: float) -> np.ndarray:
    return np.array(watts) * 1e3


def test_a_device_that_is_busy_all_the_time_has_no_bubbles() -> None:
    assert idle_bubble_share(mw(*[400.0, 420.0] * 10), IDLE_W) == 0.0


def test_the_share_is_that_of_readings_near_idle() -> None:
    assert idle_bubble_share(mw(*[100.0] * 5, *[400.0] * 15), IDLE_W) == pytest.approx(0.25)


@pytest.mark.parametrize(("power_w", "share"), [(129.0, 0.5), (131.0, 0.0)], ids=["below the threshold", "above it"])
def test_idle_reaches_a_tenth_of_the_way_to_busy(power_w: float, share: float) -> None:
    assert idle_bubble_share(mw(*[power_w] * 10, *[400.0] * 10), IDLE_W) == pytest.approx(share)


def test_readings_that_are_missing_do_not_count() -> None:
    readings = mw(*[float("nan")] * 30, *[100.0] * 5, *[400.0] * 5)
    assert idle_bubble_share(readings, IDLE_W) == pytest.approx(0.5)


def test_a_window_in_which_nothing_is_busy_is_one_bubble() -> None:
    assert idle_bubble_share(mw(*[100.0] * 10, *[118.0] * 10), IDLE_W) == 1.0


@pytest.mark.parametrize("readings", [mw(), mw(float("nan"))], ids=["none", "all missing"])
def test_without_readings_there_is_no_share(readings: np.ndarray) -> None:
    assert idle_bubble_share(readings, IDLE_W) is None


def test_imbalance_is_the_spread_over_the_mean() -> None:
    assert rank_imbalance([90.0, 100.0, 110.0]) == pytest.approx(0.2)
    assert rank_imbalance([100.0]) == 0.0


@pytest.mark.parametrize("energies_j", [[], [0.0, 0.0]], ids=["no device", "no energy"])
def test_imbalance_of_nothing_is_not_known(energies_j: list[float]) -> None:
    assert rank_imbalance(energies_j) is None
