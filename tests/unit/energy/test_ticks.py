from dataclasses import replace

import numpy as np
import pytest

from llem_ray.energy.ticks import find_ticks, tick_line
from llem_ray.testing.loads import ConstantLoad
from llem_ray.testing.sensor import SensorModel, simulate_trace

LOAD = ConstantLoad(5.0, 30.0)


def ticks_of(model, *, seed=0, **changes):
    trace = replace(simulate_trace(LOAD, 10.0, 20.0, seed=seed, model=model), **changes)
    return find_ticks(trace, model.calibration("GPU-sim"), sample_period_s=model.poll_s, origin_ns=0)


def true_times_s(ticks, model):
    """When the load had drawn what each counter value says: it idles at 90 W from 4 s to 5 s, then draws 400 W."""
    return 5.0 + (ticks.c_j - model.base_mj / 1e3 - 90.0) / 400.0


@pytest.mark.parametrize(
    "model",
    [
        SensorModel(),
        SensorModel(poll_jitter_s=0.0),
        SensorModel(drop=0.4),
        SensorModel(tick_jitter_s=0.01),
        SensorModel(tick_s=0.02, poll_s=0.01),
        SensorModel(tick_s=0.001),
    ],
)
def test_every_bracket_holds_its_tick(model):
    for seed in range(10):
        ticks = ticks_of(model, seed=seed)
        true_s = true_times_s(ticks, model)
        assert len(ticks) > 50
        assert np.all(true_s <= ticks.hi_s + 1e-5)
        assert np.all(true_s >= ticks.lo_s - (0.02 if model.tick_jitter_s else 1e-5))


@pytest.mark.parametrize(("poll_s", "within_s"), [(0.05, 0.02), (0.047, 0.004)])
def test_the_line_sharpens_the_brackets(poll_s, within_s):
    model = SensorModel(poll_s=poll_s, poll_jitter_s=0.002)
    ratios = []
    for seed in range(60):
        ticks = ticks_of(model, seed=seed)
        line = tick_line(ticks, 15.0)
        error_s = line.tau_s - true_times_s(ticks, model)[line.first : line.first + len(line.tau_s)]
        middle = len(error_s) // 2
        assert abs(error_s[middle]) <= 0.026
        ratios.append((error_s[middle], line.sd_s))
    error_s, sd_s = np.array(ratios).T
    assert np.sqrt(np.mean(error_s**2)) <= within_s
    assert np.mean(np.abs(error_s) <= 2 * sd_s) >= 0.95


def test_missing_polls_are_skipped():
    model = SensorModel(poll_jitter_s=0.0)
    trace = simulate_trace(LOAD, 10.0, 20.0, seed=2, model=model)
    lost = (trace.t_ns > 14_000_000_000) & (trace.t_ns < 14_500_000_000)
    ticks = ticks_of(model, seed=2, energy_mj=np.where(lost, np.nan, trace.energy_mj))
    bridged = int(np.searchsorted(ticks.hi_s, 14.5))
    assert ticks.c_j[bridged] - ticks.c_j[bridged - 1] > 3 * 40
    assert ticks.hi_s[bridged] - ticks.lo_s[bridged] == pytest.approx(1.05 * 0.1, abs=1e-3)
    assert true_times_s(ticks, model)[bridged] >= ticks.lo_s[bridged]


def test_jitter_is_seen_only_where_it_is():
    regular = [ticks_of(SensorModel(poll_s=0.047), seed=seed).jitter_s for seed in range(10)]
    irregular = [ticks_of(SensorModel(poll_s=0.047, tick_jitter_s=0.01), seed=seed).jitter_s for seed in range(10)]
    assert max(regular) == 0.0
    assert 0.004 < np.median(irregular) < 0.02


def test_a_fast_counter_is_not_given_a_line():
    ticks = ticks_of(SensorModel(tick_s=0.001))
    assert not ticks.regular
    assert ticks.interval_s == 0.05
    line = tick_line(ticks, 15.0)
    assert line.sd_s < 0.5e-3
