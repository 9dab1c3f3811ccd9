"""One saturated sweep of vLLM on the CPU through all of it: real command, embedded Ray, a GPU whose energy is known, dataset.

The fake GPU takes no notice of the engine, so its true energy is the integral of its waveform over whatever window was recorded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from math import floor, fsum, sqrt
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import pytest

from llem_ray.cli.main import main
from llem_ray.results.reader import read_table
from llem_ray.testing.nvml import Gpu, Scenario, Waveform, build, environment
from llem_ray.testing.nvml.library import default_cache

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]

GPU = Gpu(uuid="GPU-aaaaaaaa-0000-0000-0000-000000000001", waveform=Waveform(((0.0, 350.0, "step"), (0.13, 480.0, "step")), 0.31))
AT_ONCE, REQUESTS = 4, 120
FIRST, TARGET, BUDGET_S = 5, 0.5, 6.0
TTFT_MS, TPOT_MS = 200.0, 20.0
T_QUANTILE = 2.7764451
"""Student's t, 4 degrees of freedom, 97.5 %."""
WIDE = "140"
SWEEP = f"""
schema_version: 1
name: saturated
base:
  model: {{config: llama-tiny, dtype: float32}}
  engine: {{backend: vllm, device: cpu, gpus: 1, engine_args: {{max_model_len: 128, max_num_seqs: {AT_ONCE}}}}}
  workload:
    requests: {REQUESTS}
    input_tokens: {{distribution: uniform, min: 8, max: 40}}
    output_tokens: {{distribution: uniform, min: 12, max: 36}}
    load: {{pattern: saturated, concurrency: {AT_ONCE}}}
repeats: 8
stopping: {{half_width_rel: {TARGET}, first: {FIRST}, budget_s: {BUDGET_S}}}
footprint: {{grid_gco2_per_kwh: 400, price_per_kwh: 0.3, currency: EUR, as_of: 2026-01-31}}
measure:
  sources: [nvml]
  idle_baseline_s: 0.5
  min_window_s: 1
  gates: {{min_coverage: 0.3}}
  slo: {{ttft_ms: {TTFT_MS}, tpot_ms: {TPOT_MS}}}
  warmup: {{until_cv: 0.5, max_batches: 5000}}
"""


@dataclass(frozen=True)
class Ran:
    folder: Path
    said: str
    trials: list[dict[str, Any]]
    requests: dict[str, list[dict[str, Any]]]
    """By trial."""
    steps: dict[str, list[dict[str, Any]]]
    scenario: Scenario
    offset_ns: int

    def true_j(self, begin_ns: int, end_ns: int) -> float:
        return self.scenario.energy_j(
            GPU.uuid, self.scenario.seconds(begin_ns + self.offset_ns), self.scenario.seconds(end_ns + self.offset_ns)
        )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("saturated")
    # Truth runs on CLOCK_REALTIME, the dataset on the monotonic clock: they agree to well under a tick while this runs.
    offset_ns = time.time_ns() - time.monotonic_ns()
    scenario = Scenario(gpus=(GPU,), clock="realtime", origin_ns=time.time_ns())
    env = environment(build(default_cache()), scenario.write(folder / "gpu.scenario"), os.environ)
    (folder / "sweep.yaml").write_text(SWEEP)
    command = [sys.executable, "-m", "llem_ray", "submit", str(folder / "sweep.yaml"), "--results", str(folder / "runs")]
    # One thread: many wait for each other where others use the cores too.
    env = {**os.environ, **env, "OMP_NUM_THREADS": "1", "COLUMNS": WIDE}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = next((folder / "runs").iterdir())
    trials = sorted(read_table(run, "trials").to_pylist(), key=lambda row: row["repeat"])
    tables: list[dict[str, list[dict[str, Any]]]] = [{}, {}]
    for table, rows in zip(tables, (read_table(run, "requests"), read_table(run, "steps")), strict=True):
        for row in rows.to_pylist():
            table.setdefault(row["trial_id"], []).append(row)
    return Ran(run, done.stdout, trials, *tables, scenario=scenario, offset_ns=offset_ns)


def test_repeats_go_on_to_the_target_or_the_budget(ran: Ran) -> None:
    """Stein's rule by hand: N from the spread of the first five; else the budget ends it once the next would overrun it."""
    values = [row["joules_per_output_token"] for row in ran.trials]
    assert all(row["status"] == "completed" and row["power_valid"] for row in ran.trials), ran.trials
    assert FIRST <= len(values) <= 8
    needed = max(FIRST, floor((T_QUANTILE * stdev(values[:FIRST]) / (TARGET * fmean(values[:FIRST]))) ** 2) + 1)
    spent_s = fsum(row["window_s"] for row in ran.trials)
    if needed <= len(values):
        assert len(values) == needed
        assert "reached by 1 of 1 cell" in ran.said
    else:
        assert spent_s * (1 + 1 / len(values)) > BUDGET_S or len(values) == 8
        assert "reached by 0 of 1 cell" in ran.said
    half_width = T_QUANTILE * stdev(values[:FIRST]) / sqrt(len(values))
    found = re.search(r"llama-tiny +(\d+) +([\d.]+) ±([\d.]+)", ran.said)
    assert found is not None
    assert [float(part) for part in found.groups()] == pytest.approx([len(values), fmean(values), half_width], rel=0.06)


def test_warm_up_went_on_until_step_time_and_power_were_steady(ran: Ran) -> None:
    phases = read_table(ran.folder, "phases").to_pylist()
    for row in ran.trials:
        assert (row["warmup_end"], row["warmup_batches"] >= 5) == ("steady", True)
        assert row["warmup_step_cv"] <= 0.5
        assert row["warmup_power_cv"] < 0.06, "0.13 s at 350 W and 0.18 s at 480 W, again and again: alike over 0.5 s"
        assert "warmup_without_power" not in row["notes"]
        mine = sorted((one for one in phases if one["trial_id"] == row["trial_id"]), key=lambda one: one["begin_ns"])
        assert [one["phase"] for one in mine][-4:] == ["warmup", "guard", "measured", "guard"]
        assert all(before["end_ns"] == after["begin_ns"] for before, after in pairwise(mine[-4:]))
        warmup, guard, measured, _ = mine[-4:]
        assert warmup["duration_s"] >= 2.5, "five stretches of 0.5 s"
        assert guard["duration_s"] >= 0.29
        assert measured["begin_ns"] <= min(one["sent_ns"] for one in ran.requests[row["trial_id"]])
        assert measured["begin_ns"] == pytest.approx(row["run_begin_ns"], abs=1e6)


def test_the_window_is_ml_energys_steady_state(ran: Ran) -> None:
    for row in ran.trials:
        requests = ran.requests[row["trial_id"]]
        assert len(requests) == row["run_requests"] == REQUESTS
        spans = [(one["first_token_ns"], 1) for one in requests] + [(one["last_token_ns"], -1) for one in requests]
        at_once, most = 0, 0
        for _, change in sorted(spans):
            at_once += change
            most = max(most, at_once)
        assert row["window_rule"] == "steady_state"
        assert row["realised_concurrency"] == most <= AT_ONCE
        begin_ns = sorted(one["first_token_ns"] for one in requests)[most - 1]
        end_ns = sorted(one["last_token_ns"] for one in requests)[REQUESTS - most - 2]
        assert (row["begin_ns"], row["end_ns"]) == (begin_ns, end_ns)
        assert row["window_s"] == pytest.approx((end_ns - begin_ns) / 1e9)


def test_tokens_are_those_whose_times_lie_in_the_window(ran: Ran) -> None:
    for row in ran.trials:
        requests = ran.requests[row["trial_id"]]
        assert all(len(one["token_times_ns"]) == one["output_tokens"] == one["output_tokens_requested"] for one in requests)
        times_ns = np.concatenate([one["token_times_ns"] for one in requests])
        inside = int(np.count_nonzero((times_ns > row["begin_ns"]) & (times_ns <= row["end_ns"])))
        assert 0 < inside == row["output_tokens"] < len(times_ns) == row["run_output_tokens"]
        begun = [one for one in requests if row["begin_ns"] < one["first_token_ns"] <= row["end_ns"]]
        assert row["prompt_tokens"] == sum(one["prompt_tokens"] for one in begun) < row["run_prompt_tokens"]
        assert row["output_throughput_tok_s"] == pytest.approx(inside / row["window_s"])
        assert row["joules_per_output_token"] == pytest.approx(row["total_energy_j"] / inside)


def test_the_true_energy_lies_within_the_uncertainty(ran: Ran) -> None:
    errors_u = []
    for row in ran.trials:
        assert (row["energy_method"], row["energy_covers"]) == ("measured_counter", [f"nvml/gpu/{GPU.uuid}"])
        true_j = ran.true_j(row["begin_ns"], row["end_ns"])
        assert row["total_energy_j"] == pytest.approx(true_j, rel=0.03)
        assert row["energy_bound_lo_j"] <= true_j <= row["energy_bound_hi_j"]
        errors_u.append(abs(row["total_energy_j"] - true_j) / row["energy_uncertainty_j"])
        assert row["run_energy_j"] == pytest.approx(ran.true_j(row["run_begin_ns"], row["run_end_ns"]), rel=0.03)
        assert row["net_energy_j"] == pytest.approx(row["total_energy_j"] - row["idle_power_w"] * row["window_s"], rel=1e-6)
    # One of fifty windows is outside of the uncertainty, and one of a thousand outside of twice that; not half of them.
    assert median(errors_u) <= 2.0, errors_u


def test_every_step_is_logged(ran: Ran) -> None:
    for row in ran.trials:
        steps, requests = ran.steps[row["trial_id"]], ran.requests[row["trial_id"]]
        assert sum(step["prefill_tokens"] for step in steps) == sum(one["prompt_tokens"] for one in requests)
        assert sum(step["decode_tokens"] for step in steps) == row["run_output_tokens"]
        assert all(step["flops"] > 0 for step in steps)
        assert all(before["end_ns"] <= after["begin_ns"] for before, after in pairwise(steps))
        assert row["flops_method"] == "engine"
        assert 0 < row["flops"] < fsum(step["flops"] for step in steps)
        assert row["joules_per_flop"] == pytest.approx(row["total_energy_j"] / row["flops"])


def test_phases_and_requests_share_the_windows_energy(ran: Ran) -> None:
    """Power that does not follow the engine may not be told apart; then the row says why, and requests share by their tokens."""
    for row in ran.trials:
        requests = ran.requests[row["trial_id"]]
        shares_j = [one["energy_j"] for one in requests if one["energy_j"] is not None]
        assert len(shares_j) >= row["requests"]
        assert min(shares_j) > 0
        assert fsum(shares_j) == row["total_energy_j"]
        parts_j = [row[f"{name}_energy_j"] for name in ("prefill", "decode")]
        if row["phase_method"] is None:
            assert (parts_j, row["request_energy_rule"]) == ([None, None], "total_tokens")
            assert row["phase_reason"]
        else:
            assert fsum([*parts_j, row["phase_rest_energy_j"]]) == pytest.approx(row["total_energy_j"])
            assert row["request_energy_rule"] == "phases"


def test_latencies_objectives_and_footprint_follow_from_the_requests(ran: Ran) -> None:
    for row in ran.trials:
        inside = [one for one in ran.requests[row["trial_id"]] if row["begin_ns"] < one["last_token_ns"] <= row["end_ns"]]
        assert len(inside) == row["requests"] == sum(one["in_window"] for one in ran.requests[row["trial_id"]])
        ttft_s = [(one["first_token_ns"] - one["sent_ns"]) / 1e9 for one in inside]
        tpot_s = [(one["last_token_ns"] - one["first_token_ns"]) / 1e9 / (one["output_tokens"] - 1) for one in inside]
        e2e_s = [(one["last_token_ns"] - one["sent_ns"]) / 1e9 for one in inside]
        for name, values in (("ttft_s", ttft_s), ("tpot_s", tpot_s), ("e2e_latency_s", e2e_s)):
            assert row[f"{name}_mean"] == pytest.approx(fmean(values))
            for percent in (50, 99):
                assert row[f"{name}_p{percent}"] == pytest.approx(float(np.percentile(values, percent)))
        good = sum(t * 1e3 <= TTFT_MS and o * 1e3 <= TPOT_MS for t, o in zip(ttft_s, tpot_s, strict=True))
        assert row["slo_attainment"] == pytest.approx(good / len(inside))
        assert row["goodput_req_s"] == pytest.approx(good / row["window_s"])
        assert row["carbon_g"] == pytest.approx(row["total_energy_j"] / 3.6e6 * 400)
        assert (row["energy_cost"], row["currency"]) == (pytest.approx(row["total_energy_j"] / 3.6e6 * 0.3), "EUR")


def test_show_prints_every_table(ran: Ran, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", WIDE)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["show", str(ran.folder)])
    shown = capsys.readouterr().out
    for words in ("J/output token", "steady_state", "TTFT ms", "good req/s", "gCO2", "vllm:", "Target ±50 %", "Dataset:"):
        assert words in shown, words
        assert words in ran.said, words
