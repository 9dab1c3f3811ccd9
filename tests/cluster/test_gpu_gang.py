"""A gang that leases fake GPUs, through embedded Ray and the real command, against closed-form truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from math import fsum
from pathlib import Path
from typing import Any

import pytest

from llem_ray.results.reader import read_table
from llem_ray.testing.nvml import Gpu, Scenario, Waveform, build, environment
from llem_ray.testing.nvml.library import default_cache

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]

EVERY_NS = 700_000_000
"""Batches begin at multiples of this. From then on the first GPU draws 500 W for as long as a prefill takes, then 300 W."""

GPUS = (
    Gpu(uuid="GPU-aaaaaaaa-0000-0000-0000-000000000001", waveform=Waveform(((0.0, 500.0, "step"), (0.2, 300.0, "step")), 0.7)),
    Gpu(uuid="GPU-bbbbbbbb-0000-0000-0000-000000000002", waveform=Waveform(((0.0, 120.0, "step"),))),
)

SWEEP = """
schema_version: 1
name: gpus
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, gpus: 1, engine_args: {every_ms: 700, prefill_ms: 200, decode_ms: 20}}
  workload: {batch_size: 2, output_tokens: 10}
sweep:
  workload.output_tokens: [10, 20]
repeats: 2
footprint: {grid_gco2_per_kwh: 400, as_of: 2026-01-31}
measure: {min_window_s: 5.5, idle_baseline_s: 2, sources: [nvml], gates: {min_coverage: 0.3}, warmup: {until_cv: 0.2}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scenario, int]:
    folder = tmp_path_factory.mktemp("gpus")
    # Real time on CLOCK_REALTIME; the dataset is on the monotonic clock. The two agree to well under a tick while this runs.
    offset_ns = time.time_ns() - time.monotonic_ns()
    origin_ns = time.monotonic_ns() // EVERY_NS * EVERY_NS + offset_ns
    scenario = Scenario(gpus=GPUS, clock="realtime", origin_ns=origin_ns)
    env = environment(build(default_cache()), scenario.write(folder / "gpus.scenario"), os.environ)
    (folder / "sweep.yaml").write_text(SWEEP)
    command = [sys.executable, "-m", "llem_ray", "submit", str(folder / "sweep.yaml"), "--results", str(folder / "runs")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((folder / "runs").iterdir()), scenario, offset_ns


def rows(run: Path, table: Any) -> list[dict[str, Any]]:
    return read_table(run, table).to_pylist()


def truth_j(scenario: Scenario, offset_ns: int, uuid: str, begin_ns: int, end_ns: int) -> float:
    return scenario.energy_j(uuid, scenario.seconds(begin_ns + offset_ns), scenario.seconds(end_ns + offset_ns))


def test_energy_is_that_of_the_leased_gpu_alone(run: tuple[Path, Scenario, int]) -> None:
    path, scenario, offset_ns = run
    trials = rows(path, "trials")
    assert len(trials) == 4
    for trial in trials:
        assert trial["power_valid"], trial
        assert trial["energy_method"] == "measured_counter"
        (leased,) = [part.rpartition("/")[2] for part in trial["energy_covers"]]
        true_j = truth_j(scenario, offset_ns, leased, trial["begin_ns"], trial["end_ns"])
        assert trial["total_gpu_energy_j"] == pytest.approx(true_j, rel=0.012)
        assert trial["energy_bound_lo_j"] <= true_j <= trial["energy_bound_hi_j"]
        assert trial["joules_per_output_token"] == pytest.approx(trial["total_gpu_energy_j"] / trial["output_tokens"])
        assert {device["uuid"] for device in trial["devices"]} == {gpu.uuid for gpu in GPUS}


def test_known_phases_are_recovered_within_the_interval(run: tuple[Path, Scenario, int]) -> None:
    path, scenario, offset_ns = run
    steps = rows(path, "steps")
    for trial in rows(path, "trials"):
        (leased,) = [part.rpartition("/")[2] for part in trial["energy_covers"]]
        true_j = {"prefill": 0.0, "decode": 0.0}
        for step in steps:
            if (step["trial_id"], step["attempt"]) == (trial["trial_id"], trial["attempt"]):
                true_j[step["kind"]] += truth_j(scenario, offset_ns, leased, step["begin_ns"], step["end_ns"])
        assert trial["phase_method"] == "phase_time_regression", trial["phase_reason"]
        for kind, expected_j in true_j.items():
            # Steps end late on a busy machine, and the GPU's power does not wait for them: 2 % are allowed for that.
            slack_j = 3 * trial[f"{kind}_energy_u_j"] + 0.02 * expected_j
            assert abs(trial[f"{kind}_gpu_energy_j"] - expected_j) <= slack_j, (kind, expected_j, trial)
        requests = [row for row in rows(path, "requests") if row["trial_id"] == trial["trial_id"]]
        assert trial["request_energy_rule"] == "phases"
        assert fsum(row["energy_j"] for row in requests) == trial["total_energy_j"]
        assert trial["flops_method"] == "parameters"
        assert dict(trial["null_reasons"])["mfu"] == "the model did not run on GPUs"
        assert trial["carbon_g"] == pytest.approx(trial["total_energy_j"] / 3.6e6 * 400)


def test_warm_up_ends_with_steady_steps_and_power_of_the_leased_gpu(run: tuple[Path, Scenario, int]) -> None:
    """Each batch draws the same, whether it is the first GPU's 500 and 300 W or the other's 120 W."""
    path, _, _ = run
    warmups_s = [row["duration_s"] for row in rows(path, "phases") if row["phase"] == "warmup"]
    assert len(warmups_s) == 4
    assert min(warmups_s) >= 3.5, "five stretches of a batch of 0.7 s"
    for trial in rows(path, "trials"):
        assert (trial["warmup_end"], trial["notes"]) == ("steady", [])
        assert trial["warmup_step_cv"] <= 0.2
        assert trial["warmup_power_cv"] <= 0.03


def test_idle_and_net_energy_are_signed_and_there(run: tuple[Path, Scenario, int]) -> None:
    path, _, _ = run
    for trial in rows(path, "trials"):
        assert trial["idle_power_w"] > 0
        assert trial["net_energy_j"] == pytest.approx(trial["total_energy_j"] - trial["idle_energy_j"])


def test_every_guard_is_three_ticks(run: tuple[Path, Scenario, int]) -> None:
    path, _, _ = run
    guards_s = [row["duration_s"] for row in rows(path, "phases") if row["phase"] == "guard"]
    assert guards_s
    assert min(guards_s) >= 0.29


def test_phases_tile_the_run_and_add_up_per_device(run: tuple[Path, Scenario, int]) -> None:
    path, scenario, offset_ns = run
    phases = rows(path, "phases")
    for gpu in GPUS:
        mine = sorted((row for row in phases if row["device_uuid"] == gpu.uuid), key=lambda row: row["begin_ns"])
        for before, after in pairwise(mine):
            assert before["end_ns"] == after["begin_ns"], (before, after)
        known = [row for row in mine if row["energy_j"] is not None]
        assert known
        true_j = sum(truth_j(scenario, offset_ns, gpu.uuid, row["begin_ns"], row["end_ns"]) for row in known)
        assert sum(row["energy_j"] for row in known) == pytest.approx(true_j, rel=0.01)


def test_the_other_gpu_is_unleased(run: tuple[Path, Scenario, int]) -> None:
    path, _, _ = run
    leased = {part.rpartition("/")[2] for trial in rows(path, "trials") for part in trial["energy_covers"]}
    other = {gpu.uuid for gpu in GPUS} - leased
    assert len(other) == 1
    names = {row["phase"] for row in rows(path, "phases") if row["device_uuid"] in other}
    assert "unleased" in names
    assert "measured" not in names


def test_environment_names_driver_and_gpus(run: tuple[Path, Scenario, int]) -> None:
    path, scenario, _ = run
    session = json.loads((path / "environment.json").read_text())["sessions"][0]
    assert session["nvidia_drivers"] == [scenario.driver_version]
    assert session["gpus"] == {"NVIDIA H200": 2}
