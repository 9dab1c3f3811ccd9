"""Where the time to the first token went, and the steps of the windows, of whole runs on hosts with clocks of their own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from llem_ray.config.sweep import load_sweep
from llem_ray.execution.driver import RunDriver, RunOptions
from llem_ray.planning.plan import make_plan
from llem_ray.reporting.loads import LOAD_PARTS
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory
from llem_ray.testing.cluster import PretendCluster
from llem_ray.testing.nodes import PretendDevice, PretendHost, swinging

PARTS = [column for columns in LOAD_PARTS.values() for column in columns]
WITHIN_LOAD = ("process_start_s", "import_s", "construct_s", "compile_s", "warm_s", "load_rest_s")

SWEEP = """
schema_version: 1
name: loads
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, gpus: 2, engine_args: {prefill_ms: 20}}
  workload: {batch_size: 2, output_tokens: 4}
sweep:
  engine.engine_args.load_ms: [60, 120]
repeats: 2
measure: {min_window_s: 0.3, idle_baseline_s: 0.3, warmup: {batches: 3}, gates: {min_coverage: 0.5}}
"""


class Silent:
    live = False

    def update(self, event: Any) -> None:
        pass

    def message(self, text: str) -> None:
        pass


class Finished:
    """A run that has ended, on a host whose clock is 25 h ahead."""

    def __init__(self, folder: Path, sweep: str) -> None:
        devices = tuple(PretendDevice(uuid=f"GPU-{index}", load=swinging(150, 40, 3)) for index in range(2))
        cluster = PretendCluster([PretendHost(name="far", devices=devices, offset_s=90_000.0)])
        path = folder / "sweep.yaml"
        path.write_text(sweep)
        self.rundir = RunDirectory.create(folder, "loads-00000000")
        self.begin_ns = time.monotonic_ns()
        plan = make_plan(load_sweep(path), gpus_available=2)
        options = RunOptions(begin_ns=self.begin_ns, cache_dir=str(folder))
        RunDriver(plan, self.rundir, cluster, options, Silent()).run()

    def rows(self, table: Any) -> list[dict[str, Any]]:
        return read_table(self.rundir.path, table).to_pylist()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("finished"), SWEEP)


def test_the_parts_add_up_to_the_first_token_of_the_first_trial(finished: Finished) -> None:
    loads = finished.rows("loads")
    trials = {(row["trial_id"], row["attempt"]): row for row in finished.rows("trials")}
    assert [trials[row["trial_id"], row["attempt"]]["gang"] for row in loads] == [row["gang"] for row in loads]
    assert len(loads) == len({row["gang"] for row in trials.values()}) == 2
    for row in loads:
        assert row["reason"] is None
        assert all(row[part] is None or row[part] >= 0 for part in PARTS)
        assert sum(row[part] or 0 for part in PARTS) == pytest.approx(row["submit_to_first_token_s"], abs=1e-6)
        assert sum(row[part] or 0 for part in WITHIN_LOAD) == pytest.approx(row["load_s"], abs=1e-6)
        first_ns = min(
            item["first_token_ns"]
            for item in finished.rows("requests")
            if (item["trial_id"], item["attempt"]) == (row["trial_id"], row["attempt"])
        )
        since_submit_s = (first_ns - finished.begin_ns) / 1e9 - 90_000.0
        assert row["submit_to_first_token_s"] == pytest.approx(since_submit_s, abs=0.01)


def test_each_part_has_what_was_spent_in_it(finished: Finished) -> None:
    first, second = finished.rows("loads")
    loaded_ms = sorted((first["construct_s"], second["construct_s"]))
    assert loaded_ms[0] >= 0.06
    assert loaded_ms[1] >= 0.12
    for row in (first, second):
        assert row["bare_idle_s"] >= 0.3
        assert row["resident_idle_s"] >= 0.3
        assert row["warmup_s"] >= 3 * 0.02
        assert row["guard_s"] > 0
        assert row["first_token_s"] >= 0.02
        assert (row["import_s"], row["compile_s"], row["process_start_s"]) == (0.0, None, None)
    assert second["queue_s"] > first["queue_s"] + first["load_s"] + 4 * 0.3
    assert second["startup_s"] == first["startup_s"]


def test_every_step_of_every_window_is_in_the_dataset(finished: Finished) -> None:
    steps = finished.rows("steps")
    for trial in finished.rows("trials"):
        mine = [row for row in steps if (row["trial_id"], row["attempt"]) == (trial["trial_id"], trial["attempt"])]
        assert len(mine) == trial["steps"] > 0
        assert sum(row["decode_tokens"] for row in mine) == trial["output_tokens"]
        assert sum(row["prefill_tokens"] for row in mine) == trial["prompt_tokens"]
        assert all(trial["begin_ns"] <= row["begin_ns"] <= row["end_ns"] <= trial["end_ns"] for row in mine)
        assert [row["begin_ns"] for row in mine] == sorted(row["begin_ns"] for row in mine)
        assert [row["kind"] for row in mine[:4]] == ["prefill", "decode", "decode", "decode"]


def test_a_load_that_fails_says_why_and_steps_and_token_times_can_be_left_out(tmp_path: Path) -> None:
    off = SWEEP.replace("measure: {", "measure: {record_steps: false, record_token_times: false, ")
    axis = "engine.engine_args.load_ms: [60, 120]"
    run = Finished(
        tmp_path, off.replace(axis, "engine.engine_args.fail: [{kind: load}, null]").replace("repeats: 2", "repeats: 1")
    )
    failed, reached = sorted(run.rows("loads"), key=lambda row: row["reason"] is None)
    assert failed["reason"].startswith("load: ")
    assert failed["bare_idle_s"] >= 0.3
    assert [failed[part] for part in ("load_s", "construct_s", "first_token_s", "submit_to_first_token_s")] == [None] * 4
    assert reached["submit_to_first_token_s"] > reached["load_s"] > 0
    assert run.rows("steps") == []
    assert [row["steps"] > 0 for row in run.rows("trials") if row["status"] == "completed"] == [True]
    assert {row["token_times_ns"] for row in run.rows("requests")} == {None}
    assert all(row["first_token_ns"] is not None for row in run.rows("requests"))
