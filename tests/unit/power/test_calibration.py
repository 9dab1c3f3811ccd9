from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llem_ray.core.errors import ReadFailed
from llem_ray.power.calibration import calibrate_sources, tick_period_s


def brackets(period_s, n, width_s, phase, drop=()):
    """Poll brackets of true ticks, each placed at random inside its bracket."""
    rng = np.random.default_rng(phase)
    ticks = [1000.0 + k * period_s for k in range(n) if k not in drop]
    offsets = rng.uniform(0, 1, len(ticks))
    return [(round((t - o * width_s) * 1e9), round((t + (1 - o) * width_s) * 1e9)) for t, o in zip(ticks, offsets, strict=True)]


@given(st.floats(0.02, 0.4), st.integers(0, 10_000))
def test_period_from_brackets(period_s, phase):
    found = tick_period_s(brackets(period_s, max(5, int(2 / period_s)), 0.002, phase))
    assert found == pytest.approx(period_s, abs=0.001)


def test_missed_ticks_do_not_stretch_the_period():
    assert tick_period_s(brackets(0.1, 21, 0.002, 1, drop=(4, 5, 11))) == pytest.approx(0.1, abs=0.0005)


def test_one_wide_bracket_weighs_little():
    ticks = brackets(0.1, 21, 0.002, 2)
    ticks[-1] = (ticks[-1][0], ticks[-1][1] + 60_000_000)
    assert tick_period_s(ticks) == pytest.approx(0.1, abs=0.0005)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_ticks_say_nothing(n):
    assert tick_period_s(brackets(0.1, n, 0.002, 3)) is None


def test_lag_is_the_sources_own_if_it_knows(clock, new_meter):
    unknown, known = new_meter(clock), new_meter(clock, uuids=("b",))
    known.lag_s = 0.0
    found = calibrate_sources([unknown, known], clock, duration_s=1.0, lag_s=0.007)
    assert (found["gpu-0"].lag_s, found["b"].lag_s) == (0.007, 0.0)


def test_call_time_and_readings_present(clock, new_meter):
    found = calibrate_sources([new_meter(clock, call_s=0.0005)], clock, duration_s=1.0)["gpu-0"]
    assert found.call_s == pytest.approx(0.0005)
    assert (found.has_instant, found.has_average) == (True, False)


def test_frozen_counter_has_no_period(clock, new_meter):
    assert calibrate_sources([new_meter(clock, tick_s=1e6)], clock, duration_s=2.0)["gpu-0"].tick_period_s is None


def test_a_slow_source_is_not_hurried(clock, new_meter):
    slow = new_meter(clock, max_hz=1.0)
    calibrate_sources([slow], clock, duration_s=2.0)
    assert slow.reads == 2


def test_a_source_that_fails_spoils_no_other(clock, new_meter):
    bad, good = new_meter(clock, fault=ReadFailed("gone")), new_meter(clock, uuids=("b",))
    found = calibrate_sources([bad, good], clock, duration_s=2.0)
    assert list(found) == ["b"]
    assert found["b"].tick_period_s == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("max_hz", [1000.0, 1.0])
def test_it_takes_its_time_and_no_more(clock, new_meter, max_hz):
    begin = clock.monotonic_ns()
    calibrate_sources([new_meter(clock, max_hz=max_hz)], clock, duration_s=2.0)
    assert clock.monotonic_ns() - begin == pytest.approx(2e9, rel=0.01)
