from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from llem_ray.core.plan import Estimate, LoadGroup, Plan, Trial
from llem_ray.core.spec import Cell, DroppedCell, EngineSpec, Experiment, MeasureSpec, ModelSpec, WorkloadSpec
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
    assert "counter_mismatch" in legend[marked["batch_size=2"]]
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
