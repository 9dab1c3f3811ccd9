from __future__ import annotations

import json
from typing import Any

import pytest

from llem_ray.core.measure_spec import StoppingSpec
from llem_ray.reporting.intervals import LATENCIES, Between, Uncertain
from llem_ray.reporting.resolution import RunResolution
from llem_ray.reporting.summary import SUMMARY_COLUMNS, summarise_run
from llem_ray.results.schema import SCHEMAS


def row(cell: str, repeat: int, **more: Any) -> dict[str, Any]:
    return {
        "cell_id": cell,
        "trial_id": f"{cell}-r{repeat}",
        "repeat": repeat,
        "attempt": 1,
        "status": "completed",
        "settings": json.dumps({"workload.batch_size": 1 if cell == "a" else 4, "engine.backend": "transformers"}),
        "model": "llama-tiny",
        "backend": "transformers",
        "total_energy_j": 100.0,
        "energy_uncertainty_j": 2.0,
        "power_valid": True,
        "joules_per_output_token": 0.5,
        "joules_per_total_token": 0.1,
        "window_s": 10.0,
        "output_throughput_tok_s": 20.0,
        "energy_covers": ["nvml/gpu/GPU-1", "nvml/gpu/GPU-2"],
        "energy_not_measured": ["dram"],
        "invalid_reasons": [],
        "flags": [],
        "notes": [],
        "reason_details": [("edge_gap", "0.3 s")],
        **more,
    }


INVALID = {"power_valid": False, "joules_per_output_token": None, "invalid_reasons": ["gpu_lost"]}
FAILED = {"status": "failed", "failure_kind": "hang", "total_energy_j": None, "power_valid": None, "waste_energy_j": 7.0}


def test_repeats_give_a_t_interval_over_the_valid_ones() -> None:
    values = (0.50, 0.52, 0.54)
    rows = [row("a", n, joules_per_output_token=value) for n, value in enumerate(values)]
    rows.append(row("a", 3, **INVALID))
    (cell,) = summarise_run("run", rows).cells
    # s = 0.02, t(0.975, 2) = 4.302653: 4.302653 x 0.02 / sqrt(3)
    assert cell.joules_per_output_token == Uncertain(
        mean=pytest.approx(0.52), half_width=pytest.approx(0.0496827, rel=1e-5), n=3, kind="t95"
    )
    assert (cell.trials, cell.completed, cell.valid, cell.failed) == (4, 4, 3, 0)
    assert cell.invalid_reasons == ("gpu_lost",)
    assert cell.power_w == pytest.approx(10.0)


def test_a_single_repeat_shows_the_uncertainty_of_its_energy() -> None:
    (cell,) = summarise_run("run", [row("a", 0)]).cells
    assert cell.joules_per_output_token == Uncertain(mean=0.5, half_width=pytest.approx(0.01), n=1, kind="U")
    (cell,) = summarise_run("run", [row("a", 0, energy_uncertainty_j=None)]).cells
    assert cell.joules_per_output_token == Uncertain(mean=0.5, half_width=None, n=1, kind="U")


def test_invalid_energy_never_becomes_a_number() -> None:
    (cell,) = summarise_run("run", [row("a", 0, **INVALID)]).cells
    assert cell.joules_per_output_token is None
    assert cell.joules_per_total_token is None
    assert cell.power_w is None


def test_a_retried_trial_counts_once_and_its_failure_is_told() -> None:
    summary = summarise_run("run", [row("a", 0, **FAILED), row("a", 0, attempt=2), row("b", 0, **FAILED)])
    first, second = summary.cells
    assert (first.trials, first.completed, first.failed, dict(first.failures)) == (1, 1, 0, {"hang": 1})
    assert (second.trials, second.completed, second.failed) == (1, 0, 1)
    assert (summary.trials, summary.completed, summary.failed, summary.waste_energy_j) == (2, 1, 1, 14.0)


def test_estimates_stay_apart_from_measurements() -> None:
    estimate = {"est_energy_j": 50.0, "est_joules_per_output_token": 0.25}
    unmeasured = {**INVALID, "invalid_reasons": [], "total_energy_j": None, "energy_reason": "no meter", "energy_covers": []}
    measured, estimated = summarise_run("run", [row("a", 0, **estimate), row("b", 0, **unmeasured, **estimate)]).cells
    assert measured.est_joules_per_output_token is None
    assert (estimated.joules_per_output_token, estimated.power_w) == (None, None)
    assert (estimated.est_joules_per_output_token, estimated.est_power_w) == (0.25, 5.0)
    assert estimated.energy_reason == "no meter"


def test_labels_name_what_differs_and_keep_dotted_keys_apart() -> None:
    summary = summarise_run("run", [row("a", 0), row("b", 0)])
    assert [cell.label for cell in summary.cells] == ["batch_size=1", "batch_size=4"]
    (alone,) = summarise_run("run", [row("b", 0)]).cells
    assert alone.label == "batch_size=4 backend=transformers"
    (plain,) = summarise_run("run", [row("a", 0, settings="{}")]).cells
    assert plain.label == "llama-tiny"
    seeds = [row(c, 0, settings=json.dumps({"model.seed": i, "workload.seed": i})) for i, c in enumerate("ab")]
    assert summarise_run("run", seeds).cells[1].label == "model.seed=1 workload.seed=1"


def test_the_run_says_what_its_joules_cover() -> None:
    rows = [row("a", 0), row("b", 0, energy_covers=["rapl/cpu_package/rapl:0"], energy_not_measured=["dram", "fans"])]
    summary = summarise_run("run", rows)
    assert summary.covers == {"nvml/gpu": 2, "rapl/cpu_package": 1}
    assert summary.not_measured == ("dram", "fans")
    assert summary.measured_energy_j == 200.0
    assert summary.details == {"edge_gap": "0.3 s"}


SPREAD = (0.50, 0.51, 0.49, 0.505, 0.495)


def test_cells_are_told_apart_by_whether_they_reached_the_target() -> None:
    rows = [row("a", n, joules_per_output_token=0.5) for n in range(5)]
    rows += [row("b", n, joules_per_output_token=value) for n, value in enumerate(SPREAD)]
    rows += [row("c", n, **FAILED) for n in range(2)]
    target = StoppingSpec(half_width_rel=0.01)
    summary = summarise_run("run", rows, stopping=target, repeats=5)
    a, b, c = (cell.resolution for cell in summary.cells)
    assert a is not None
    assert b is not None
    assert c is not None
    assert (a.ended, a.more, a.half_width_rel) == ("target", 0, 0.0)
    # s0 = 0.0079057, t(0.975, 4) = 2.776445: (2.776445 x 0.0079057 / 0.005)^2 = 19.3, so 20 in all
    assert (b.ended, b.more) == ("repeats", 15)
    assert b.half_width_rel == pytest.approx(2.776445 * 0.00790569 / 5**0.5 / 0.5, rel=1e-5)
    assert (c.ended, c.more, c.more_at_least, c.half_width_rel) == (None, 5, True, None)
    found = summary.resolution
    assert found == RunResolution(cells=3, resolved=("a",), unresolved=("b", "c"), not_begun=0, more=20)
    wider = summarise_run("run", rows, stopping=target, repeats=5, planned_cells=7).resolution
    assert wider is not None
    assert (wider.cells, wider.not_begun) == (7, 4)
    assert summary.cells[1].variation == pytest.approx(0.00790569 / 0.5, rel=1e-5)
    shown = summary.cells[1].joules_per_output_token
    assert shown is not None
    assert (shown.kind, shown.n) == ("stein", 5)


def test_a_run_without_a_target_has_no_resolution() -> None:
    summary = summarise_run("run", [row("a", n) for n in range(3)], stopping=StoppingSpec(), repeats=3)
    assert summary.stopping is None
    assert summary.cells[0].resolution is None


def test_outliers_are_named_and_stay_in_the_mean() -> None:
    values = [*SPREAD, 2.0]
    (cell,) = summarise_run("run", [row("a", n, joules_per_output_token=value) for n, value in enumerate(values)]).cells
    assert cell.outliers == ("a-r5",)
    assert cell.joules_per_output_token is not None
    assert cell.joules_per_output_token.mean == pytest.approx(sum(values) / 6)
    slow = [row("a", n, **INVALID, output_throughput_tok_s=20.0 + value) for n, value in enumerate(values)]
    (cell,) = summarise_run("run", slow).cells  # also where nothing measures energy
    assert cell.outliers == ("a-r5",)


def test_repeats_without_their_window_are_in_no_mean_and_are_named() -> None:
    """Their numbers are of whole runs: filling up and running empty included."""
    missed = {
        **INVALID,
        "invalid_reasons": ["window_not_reached"],
        "output_throughput_tok_s": 8.0,
        "ttft_s_p50": 9.0,
        "window_s": 2,
    }
    rows = [row("a", 0, ttft_s_p50=1.0), row("a", 1, **missed), row("a", 2, ttft_s_p50=2.0)]
    (cell,) = summarise_run("run", rows).cells
    assert cell.missed_windows == ("a-r1",)
    assert (cell.output_throughput_tok_s, cell.window_s, cell.latency["ttft_s_p50"]) == (20.0, 10.0, 1.5)
    assert (cell.completed, cell.valid) == (3, 2)
    (cell,) = summarise_run("run", rows[1:2]).cells
    assert (cell.missed_windows, cell.output_throughput_tok_s) == (("a-r1",), 8.0)
    target = StoppingSpec(half_width_rel=0.5, metric="output_throughput_tok_s")
    (cell,) = summarise_run("run", [row("a", n, **missed) for n in range(6)], stopping=target, repeats=6).cells
    assert cell.resolution is not None
    assert (cell.resolution.ended, cell.resolution.mean) == ("repeats", None)


def test_latencies_and_rates_have_intervals_over_repeats_or_over_the_requests_of_one() -> None:
    values = (0.50, 0.52, 0.54)
    rows = [row("a", n, ttft_s_p50=value, ttft_s_p50_lo=0.1, ttft_s_p50_hi=0.9) for n, value in enumerate(values)]
    (cell,) = summarise_run("run", rows).cells
    # s = 0.02, t(0.975, 2) = 4.302653: 4.302653 x 0.02 / sqrt(3)
    low, high = 0.52 - 0.0496827, 0.52 + 0.0496827
    expected = Between(low=pytest.approx(low), high=pytest.approx(high), n=3, kind="t95")
    assert cell.intervals["ttft_s_p50"] == expected
    assert cell.intervals["output_throughput_tok_s"] == Between(low=20.0, high=20.0, n=3, kind="t95")
    assert cell.intervals["tpot_s_p50"] is None
    (cell,) = summarise_run("run", rows[:1]).cells
    assert cell.intervals["ttft_s_p50"] == Between(low=0.1, high=0.9, n=1, kind="requests")
    assert cell.intervals["output_throughput_tok_s"] is None


FITTED = ("prefill_energy_j", "decode_energy_j", "prompt_tokens", "output_tokens")


def test_the_summary_needs_no_other_columns() -> None:
    assert set(SUMMARY_COLUMNS) <= set(SCHEMAS["trials"].names)
    rows = [row("a", 0, ranks=[], est_energy_j=3.0), row("b", 0, **FAILED)]
    narrow = [{name: value for name, value in one.items() if name in SUMMARY_COLUMNS} for one in rows]
    assert summarise_run("run", narrow) == summarise_run("run", rows)
    used = set()

    class Watched(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            used.add(name)
            return super().__getitem__(name)

        def get(self, name: str, default: Any = None) -> Any:
            used.add(name)
            return super().get(name, default)

    summarise_run(
        "run",
        [
            Watched(row("a", 0, **dict.fromkeys((*LATENCIES, *FITTED), 1.0))),
            Watched(row("b", 0, **INVALID, total_energy_j=None)),
            Watched(row("c", 0, **FAILED)),
        ],
        stopping=StoppingSpec(half_width_rel=0.02),
    )
    assert used == set(SUMMARY_COLUMNS)


def test_the_summary_is_json() -> None:
    value = json.loads(json.dumps(summarise_run("run", [row("a", 0), row("b", 0, **FAILED)]).as_dict(), allow_nan=False))
    assert value["cells"][0]["joules_per_output_token"]["kind"] == "U"
    assert value["cells"][1]["failures"] == {"hang": 1}
