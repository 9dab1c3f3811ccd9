from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from llem_ray.core.measure_spec import MeasureSpec, StoppingSpec
from llem_ray.core.plan import Estimate, LoadGroup, Plan, Trial
from llem_ray.core.spec import Cell, DroppedCell, EngineSpec, Experiment, ModelSpec
from llem_ray.core.workload_spec import WorkloadSpec
from llem_ray.reporting.labels import break_label
from llem_ray.reporting.plan import plan_table
from llem_ray.reporting.summary import summarise_run
from llem_ray.reporting.tables import run_table


def render(table: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(batch: int, **more: Any) -> dict[str, Any]:
    return {
        "cell_id": f"c{batch}",
        "trial_id": f"c{batch}-r0",
        "status": "completed",
        "settings": json.dumps({"workload.batch_size": batch}),
        "model": "meta-llama/[x]",
        "backend": "transformers",
        "total_energy_j": 4321.0,
        "energy_uncertainty_j": 12.0,
        "sensor_rel": 0.05,
        "power_valid": True,
        "joules_per_output_token": 0.4213,
        "joules_per_total_token": 0.0421,
        "window_s": 10.02,
        "output_throughput_tok_s": 1024.4,
        "energy_covers": ["nvml/gpu/GPU-1"],
        "energy_not_measured": ["cpu_package", "network"],
        "flags": ["random_weights"],
        **more,
    }


INVALID = {"power_valid": False, "joules_per_output_token": None, "joules_per_total_token": None}
ROWS = [
    row(1),
    row(2, **INVALID, invalid_reasons=["counter_mismatch"]),
    row(4, notes=["no_cross_check"]),
    row(8, status="failed", failure_kind="out_of_memory", **INVALID, waste_energy_j=120.0, flags=None),
]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_fits_and_tells_all_at_every_width(width: int) -> None:
    text = render(run_table(summarise_run("demo", ROWS), Path("runs/demo")), width)
    assert max(map(len, text.splitlines())) <= width
    lines = text.splitlines()
    (good,) = [line for line in lines if "batch_size=1 " in line]
    assert "0.4213 ±0.0012" in good
    assert "0.04210" in good
    assert "431.2" in good
    (bad,) = [line for line in lines if "batch_size=2 " in line]
    assert "invalid:" in bad
    assert "counter_mismatch" in text
    assert "±" not in bad
    assert "failed: out_of_memory" in text
    words = " ".join(text.split())
    assert "demo (meta-llama/[x], transformers): 3 of 4 trials completed, 1 failed, 1 without valid energy" in words
    assert "all random_weights: The model has random weights" in words
    assert "1 attempt failed: out_of_memory" in words
    assert "The joules cover 1 GPU (nvml). Not measured: CPU package, network." in words
    assert "up to 5%" in words
    assert "Dataset: runs/demo" in words
    assert "120 J in failed attempts" in words


def test_marks_lead_to_the_legend() -> None:
    text = render(run_table(summarise_run("demo", ROWS), Path("runs/demo")), 100)
    marked = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line.strip().startswith("batch_size=")}
    legend = {line.split()[0]: line for line in text.splitlines() if line[:3].strip() in set("abcd")}
    assert "counter_mismatch (no valid energy): " in legend[marked["batch_size=2"]]
    assert "no_cross_check" in legend[marked["batch_size=4"]]
    assert "out_of_memory" in legend[marked["batch_size=8"]]
    assert marked["batch_size=1"] == "10.0"


def test_a_host_without_a_meter_shows_estimates_marked_as_such() -> None:
    none = {**INVALID, "total_energy_j": None, "energy_covers": [], "energy_reason": "nothing measures this host"}
    rows = [row(1, **none, est_energy_j=250.0, est_joules_per_output_token=0.0243), row(2, **none)]
    text = render(run_table(summarise_run("demo", rows), Path("runs/demo")), 100)
    assert "est. 0.0243" in text
    assert "est. 25.0" in text
    assert "not measured" in text
    assert "No measured energy: nothing measures this host" in text
    assert "never part of a measured total" in text
    assert "The joules cover" not in text


def test_a_run_without_rows_says_so() -> None:
    text = render(run_table(summarise_run("demo", []), Path("runs/demo")), 80)
    assert "no trial has been recorded yet" in text


def test_codes_of_another_version_are_shown_with_what_was_seen() -> None:
    rows = [row(1, flags=["made_up"], reason_details=[("made_up", "seen once")])]
    assert "a  made_up: seen once" in render(run_table(summarise_run("demo", rows), Path("runs/demo")), 100)


def plan(trials: int, estimate: Estimate, dropped: int = 1) -> Plan:
    experiment = Experiment(model=ModelSpec(config="llama-tiny"), engine=EngineSpec(tensor_parallel=2), workload=WorkloadSpec())
    cells = [Cell(cell_id=f"c{n}", experiment=experiment, settings={"workload.batch_size": n}) for n in range(trials)]
    group = LoadGroup(load_key="k", gpus=2, trials=tuple(Trial(trial_id=f"{c.cell_id}-r0", cell=c, repeat=0) for c in cells))
    return Plan(
        name="demo", run_hash="0a1b2c3d", groups=(group,), repeats=1, order="shuffled", seed=7, measure=MeasureSpec(),
        estimate=estimate, base_dir=".",
        dropped=tuple(
            DroppedCell(settings={"workload.batch_size": 900 + n}, reason="excluded by rule 1") for n in range(dropped)
        ),
    )  # fmt: skip


UNKNOWN = Estimate(
    duration_s=None, energy_kwh=None, basis="nothing", unknown={"duration_s": "no past run", "energy_kwh": "no rates"}
)


@pytest.mark.parametrize("width", [80, 120])
def test_the_plan_shows_order_loads_drops_and_what_is_unknown(width: int) -> None:
    text = render(plan_table(plan(3, UNKNOWN)), width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "demo-0a1b2c3d: 3 cells x 1 repeat = 3 trials, 1 model load, order shuffled (seed 7)" in words
    assert "llama-tiny (random weights)" in words
    assert "transformers TP=2" in words
    assert [words.index(f"c{n}-r0 workload.batch_size={n}") for n in range(3)] == sorted(
        words.index(f"c{n}-r0 workload.batch_size={n}") for n in range(3)
    )
    assert "1 cell dropped" in words
    assert "workload.batch_size=900 excluded by rule 1" in words
    assert "Time: unknown: no past run" in words
    assert "Energy: unknown: no rates" in words


def test_a_long_plan_is_cut_and_counts_the_rest() -> None:
    known = Estimate(duration_s=7500.0, energy_kwh=1.234, unknown={}, basis="past run demo")
    text = " ".join(render(plan_table(plan(1000, known, dropped=30)), 100).split())
    assert "and 980 more" in text
    assert "... and 20 more" in text
    assert "Time: about 2 h 05 min, from past run demo" in text
    assert "Energy: about 1.23 kWh, from past run demo" in text


def test_a_window_that_is_a_part_of_a_run_tells_of_the_whole() -> None:
    part = row(1, window_rule="steady_state", run_s=12.5, run_joules_per_output_token=0.4567)
    text = render(run_table(summarise_run("demo", [part, row(2, window_rule="total")]), Path("runs/demo")), 120)
    assert "batch_size=1: steady_state, 10.0 of 12.5 s; 0.4567 J/output token over the whole run." in text
    assert "batch_size=2: total" not in text


def test_a_window_that_was_not_reached_is_not_called_one_and_says_what_was_lacking() -> None:
    seen = "no steady state: 8 requests succeeded with B = 8 at once"
    missed = row(
        1,
        **INVALID,
        window_rule="steady_state",
        run_s=10.02,
        invalid_reasons=["window_not_reached"],
        reason_details={"window_not_reached": seen},
    )
    text = render(run_table(summarise_run("demo", [missed]), Path("runs/demo")), 120)
    assert "steady_state, 10.0 of 10.0 s" not in text
    assert seen in text


def repeats(cell: int, n: int, **more: Any) -> dict[str, Any]:
    """The n-th repeat of a cell with a long label, all tables' columns filled."""
    settings = {"engine.engine_args.attn_implementation": ("sdpa", "flash_attention_2")[cell], "model.dtype": ("a", "b")[cell]}
    spread = 1 + 0.01 * n * (cell + 1)
    efficiency = {"prefill_energy_j": 1.0, "decode_energy_j": 2.0, "prompt_tokens": 10, "output_tokens": 10, "mfu": 0.3}
    served = {f"{name}_s_{at}": 0.0521 for name in ("ttft", "tpot", "e2e_latency") for at in ("p50", "p99")}
    rates = {"request_throughput_req_s": 12.51, "total_token_throughput_tok_s": 2048.0, "goodput_req_s": 9.5}
    return row(
        cell,
        trial_id=f"c{cell}-r{n}",
        repeat=n,
        settings=json.dumps(settings),
        **{**efficiency, **served, **{name: value * spread for name, value in rates.items()}},
        **{"slo_attainment": 0.87, "joules_per_flop": 3e-12, "carbon_g": 1.0, "energy_cost": 0.1, "currency": "EUR"},
        **{"joules_per_output_token": 0.4213 * spread, **more},
    )


STUDY = [*(repeats(0, n) for n in range(5)), *(repeats(1, n) for n in range(5))]


@pytest.mark.parametrize("width", [80, 100])
def test_no_table_tears_a_setting_apart(width: int) -> None:
    text = render(run_table(summarise_run("demo", STUDY), Path("runs/demo")), width)
    assert max(map(len, text.splitlines())) <= width
    words = text.split()
    for table in ("latency", "rates", "efficiency"):
        assert table in words
    broken = sum(word.startswith("flash_") and word != "flash_attention_2" for word in words)
    assert broken == 0
    assert words.count("dtype=b") == 5  # four tables, and where J/token varies most


def test_a_label_breaks_where_it_can_be_read() -> None:
    assert break_label("rate=8 attn_implementation=flash_attention_2", 20) == [
        "rate=8",
        "attn_implementation=",
        "flash_attention_2",
    ]
    assert break_label("attn_implementation=sdpa x=1", 15) == ["attn_", "implementation=", "sdpa x=1"]
    assert break_label("a" * 5, 2) == ["aa", "aa", "a"]


def test_the_target_is_told_for_the_run_and_for_each_cell_that_lacks_it() -> None:
    rows = [*STUDY, repeats(1, 5, **INVALID, invalid_reasons=["window_not_reached"])]
    target = StoppingSpec(half_width_rel=0.03)
    summary = summarise_run("demo", rows, stopping=target, repeats=6, planned_cells=3)
    words = " ".join(render(run_table(summary, Path("runs/demo")), 80).split())
    assert (
        "Target ±3 % of joules_per_output_token at 95 % confidence: reached by 1 of 3 cells, 1 without a trial yet; "
        "about 3 repeats more would do."
    ) in words
    assert "attn_implementation=flash_attention_2 dtype=b: ±3.78 %, all repeats are used up, about 3 repeats more" in words
    assert "Without the window that was asked for, and in no mean: c1-r5." in words
    assert "half the width of the 95 % interval of the mean over n repeats, by the target's rule" in words
    assert "It varies between repeats by 1.55 % to 3.04 %, most in attn_implementation=flash_attention_2 dtype=b" in words
