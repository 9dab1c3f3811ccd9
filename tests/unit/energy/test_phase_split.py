"""Prefill and decode energy from counter ticks and step logs, against loads whose phases are known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from llem_ray.energy.phase_split import NoSplit, PhaseSplit, StepTable, split_phases, tick_times
from llem_ray.energy.ticks import find_ticks
from llem_ray.testing.loads import Segment, SegmentLoad
from llem_ray.testing.sensor import SensorModel, simulate_trace

BEGIN_S, END_S = 10.0, 40.0


@dataclass
class Served:
    """What a pretended engine did, and what it really spent on prefill, on decode and else."""

    load: SegmentLoad
    steps: StepTable
    prefill_j: float
    decode_j: float


def table(rows: list[tuple[float, float, int, int, bool]]) -> StepTable:
    begin, end, prefill, decode, mixed = (np.array(column) for column in zip(*rows, strict=True))
    return StepTable(begin_s=begin, end_s=end, prefill_tokens=prefill * 1.0, decode_tokens=decode * 1.0, mixed=mixed.astype(bool))


def batches(seed: int, *, wander: float = 0.03, pause_s: float = 0.01) -> Served:
    """Batch after batch: a prefill of 60 to 120 ms at 650 W, 20 to 60 decode steps at 400 W, a pause at 130 W."""
    rng, t, rows, segments, spent = np.random.default_rng(seed), BEGIN_S, [], [Segment(0.0, 90.0)], [0.0, 0.0]
    while t < END_S:
        length_s = rng.uniform(0.06, 0.12)
        power_w = 650.0 * (1 + wander * rng.normal())
        rows.append((t, t + length_s, 2048, 8, False))
        segments.append(Segment(t, power_w))
        spent[0] += power_w * (min(t + length_s, END_S) - t)
        t += length_s
        power_w = 400.0 * (1 + wander * rng.normal())
        segments.append(Segment(t, power_w))
        for _ in range(rng.integers(20, 60)):
            if t < END_S:
                spent[1] += power_w * (min(t + 0.01, END_S) - t)
            rows.append((t, t + 0.01, 0, 8, False))
            t += 0.01
        segments.append(Segment(t, 130.0))
        t += pause_s * rng.uniform(0.5, 1.5)
    return Served(SegmentLoad([*segments, Segment(t + 1e-6, 90.0)]), table(rows), *spent)


def mixing(seed: int) -> Served:
    """Continuous batching: each step costs 150 W of its time, 20 mJ a prompt token and 150 mJ an output token."""
    rng, t, rows, segments, spent = np.random.default_rng(seed), BEGIN_S, [], [Segment(0.0, 90.0)], [0.0, 0.0]
    running = 8
    while t < END_S:
        running = int(np.clip(running + rng.integers(-2, 3), 4, 32))
        prefill = int(rng.integers(100, 900)) if rng.random() < 0.25 else 0
        length_s = 0.012 + prefill * 4e-5 + running * 1e-4
        share = (min(t + length_s, END_S) - t) / length_s
        spent[0] += 0.02 * prefill * share
        spent[1] += 0.15 * running * share
        power_w = 150.0 + (0.02 * prefill + 0.15 * running) / length_s
        rows.append((t, t + length_s, prefill, running, prefill > 0))
        segments.append(Segment(t, power_w * (1 + 0.02 * rng.normal())))
        t += length_s
    return Served(SegmentLoad([*segments, Segment(t, 90.0)]), table(rows), *spent)


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
