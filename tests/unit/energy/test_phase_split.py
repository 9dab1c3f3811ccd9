"""Prefill and decode energy from counter ticks and step logs, against loads whose phases are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from served_loads import BEGIN_S, END_S, Served, batches, mixing, table

from llem_ray.energy.phase_split import NoSplit, PhaseSplit, StepTable, split_phases, step_table, tick_times
from llem_ray.energy.ticks import find_ticks
from llem_ray.testing.loads import Segment, SegmentLoad
from llem_ray.testing.sensor import SensorModel, simulate_trace


def split(served: Served, seed: int, *, end_s: float = END_S, slack_s: float = 0.0) -> PhaseSplit | NoSplit:
    model = SensorModel()
    trace = simulate_trace(served.load, BEGIN_S - 3, end_s + 3, seed=seed, model=model)
    ticks = find_ticks(trace, model.calibration("GPU-sim"), sample_period_s=model.poll_s, origin_ns=0)
    return split_phases(ticks, served.steps, BEGIN_S, end_s, served.load.energy_j(BEGIN_S, end_s), slack_s=slack_s)


def test_tick_times_are_those_of_the_ticks() -> None:
    model = SensorModel()
    trace = simulate_trace(batches(0).load, BEGIN_S - 3, END_S + 3, seed=0, model=model)
    ticks = find_ticks(trace, model.calibration("GPU-sim"), sample_period_s=model.poll_s, origin_ns=0)
    series = tick_times(ticks, BEGIN_S, END_S)
    assert len(series.tau_s) == pytest.approx(300, abs=2)
    np.testing.assert_allclose(np.diff(series.tau_s), 0.1, atol=0.01)
    true_j = batches(0).load.cumulative_j(series.tau_s)
    # At 130 to 650 W and times that are off together by some sd.
    np.testing.assert_allclose(series.c_j - series.c_j[0], true_j - true_j[0], atol=3 * series.sd_s * 520)
    assert 0 < series.sd_s < 0.02


@pytest.mark.parametrize(("make", "method"), [(batches, "phase_time_regression"), (mixing, "phase_token_regression")])
def test_known_energies_are_recovered_within_the_interval(make, method) -> None:
    inside, errors, residuals = [], [], []
    for seed in range(40):
        served = make(seed)
        found = split(served, seed)
        assert isinstance(found, PhaseSplit), found
        assert found.method == method
        for part_j, u_j, true_j in (
            (found.prefill_j, found.prefill_u_j, served.prefill_j),
            (found.decode_j, found.decode_u_j, served.decode_j),
        ):
            inside.append(abs(part_j - true_j) <= 2 * u_j)
            errors.append((part_j - true_j) / true_j)
        whole_j = served.load.energy_j(BEGIN_S, END_S)
        assert found.prefill_j + found.decode_j + found.rest_j == pytest.approx(whole_j)
        residuals.append(found.residual_rel)
    assert np.mean(inside) >= 0.9
    assert np.sqrt(np.mean(np.square(errors))) <= 0.01
    assert abs(np.mean(errors)) <= 0.002
    assert max(residuals) < 0.1


def test_intervals_are_sharp() -> None:
    found = split(batches(1), 1)
    assert isinstance(found, PhaseSplit)
    assert found.prefill_u_j <= 0.01 * found.prefill_j
    assert found.decode_u_j <= 0.01 * found.decode_j


@pytest.mark.parametrize("shift_s", [-0.03, 0.03])
def test_a_clock_that_is_off_within_the_slack_is_found(shift_s: float) -> None:
    served = batches(2)
    moved = replace(served.steps, begin_s=served.steps.begin_s + shift_s, end_s=served.steps.end_s + shift_s)
    found = split(replace(served, steps=moved), 2, slack_s=0.04)
    assert isinstance(found, PhaseSplit)
    assert found.prefill_j == pytest.approx(served.prefill_j, rel=0.02)
    assert found.decode_j == pytest.approx(served.decode_j, rel=0.02)


class TestNoSplit:
    def test_the_same_mix_in_every_tick(self) -> None:
        steps = [(BEGIN_S + 0.01 * i, BEGIN_S + 0.01 * (i + 1), 64 * (i % 2), 8, False) for i in range(3000)]
        load = SegmentLoad([Segment(0.0, 90.0), *(Segment(row[0], 600.0 if row[2] else 300.0) for row in steps)])
        found = split(Served(load, table(steps), 0, 0), 0)
        assert isinstance(found, NoSplit)

    def test_too_few_ticks(self) -> None:
        found = split(batches(0), 0, end_s=BEGIN_S + 1.5)
        assert isinstance(found, NoSplit)
        assert "counter ticks in the window, 20 are needed" in found.reason

    def test_no_prefill(self) -> None:
        served = batches(0)
        found = split(replace(served, steps=replace(served.steps, prefill_tokens=0 * served.steps.prefill_tokens)), 0)
        assert found == NoSplit(reason="the window has no prefill")

    def test_no_steps(self) -> None:
        none = np.empty(0)
        steps = StepTable(begin_s=none, end_s=none, prefill_tokens=none, decode_tokens=none, mixed=none.astype(bool))
        assert split(replace(batches(0), steps=steps), 0) == NoSplit(reason="the engine tells no steps")

    def test_noise_that_drowns_a_phase(self) -> None:
        served = batches(0, wander=0.0)
        rng = np.random.default_rng(0)
        wild = SegmentLoad([Segment(5.0 + 0.05 * i, rng.uniform(0, 900)) for i in range(800)])
        found = split(replace(served, load=wild), 0, end_s=BEGIN_S + 2.5)
        assert isinstance(found, NoSplit)
        assert "explain the power badly" in found.reason or "not told apart" in found.reason


@pytest.mark.parametrize("make", [batches, mixing])
def test_a_cpus_counter_that_moves_every_millisecond_serves_too(make) -> None:
    """RAPL: every poll shows a new value, so the fit is over polls."""
    served = make(5)
    model = SensorModel(tick_s=0.001, quantum_mj=0.061, power_tick_s=None)
    trace = simulate_trace(served.load, BEGIN_S - 3, END_S + 3, seed=5, model=model)
    ticks = find_ticks(trace, model.calibration("package-0"), sample_period_s=model.poll_s, origin_ns=0)
    found = split_phases(ticks, served.steps, BEGIN_S, END_S, served.load.energy_j(BEGIN_S, END_S))
    assert isinstance(found, PhaseSplit), found
    assert abs(found.prefill_j - served.prefill_j) <= 3 * found.prefill_u_j
    assert abs(found.decode_j - served.decode_j) <= 3 * found.decode_u_j
    assert found.prefill_j == pytest.approx(served.prefill_j, rel=0.02)


@pytest.mark.parametrize("make", [batches, mixing])
def test_steps_outside_the_window_belong_to_no_phase_of_it(make) -> None:
    served, begin_s, end_s = make(6), BEGIN_S + 7.005, BEGIN_S + 23.005
    model = SensorModel()
    trace = simulate_trace(served.load, BEGIN_S - 3, END_S + 3, seed=6, model=model)
    ticks = find_ticks(trace, model.calibration("GPU-sim"), sample_period_s=model.poll_s, origin_ns=0)
    whole_j = served.load.energy_j(begin_s, end_s)
    found = split_phases(ticks, served.steps, begin_s, end_s, whole_j)
    inside = (served.steps.end_s > begin_s) & (served.steps.begin_s < end_s)
    few = replace(served.steps, **{name: getattr(served.steps, name)[inside] for name in StepTable.__dataclass_fields__})
    again = split_phases(ticks, few, begin_s, end_s, whole_j)
    assert isinstance(found, PhaseSplit)
    assert isinstance(again, PhaseSplit)
    assert (found.prefill_j, found.decode_j) == pytest.approx((again.prefill_j, again.decode_j), rel=1e-3)
    assert 0.4 < found.prefill_j / served.prefill_j < 0.65


def test_steps_that_overlap_follow_each_other() -> None:
    steps = step_table([0, 8_000_000, 15_000_000], [10_000_000, 20_000_000, 18_000_000], [1, 1, 1], [1, 1, 1], [False] * 3, 0)
    assert steps.begin_s.tolist() == pytest.approx([0, 0.01, 0.02])
    assert steps.end_s.tolist() == pytest.approx([0.01, 0.02, 0.02])
