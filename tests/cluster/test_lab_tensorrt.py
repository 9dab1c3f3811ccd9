"""TensorRT-LLM over two hosts of a lab, through Ray: a stand-in for the library that starts real actors in the gang's bundles."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_fixtures import ray_says, require_lab, until
from pretended_tensorrt import cluster_path

from llem_ray.testing.lab import HostSpec, Lab, default_gpus
from llem_ray.testing.lab.runs import LabRun
from llem_ray.testing.lab.truth import judge_trials

require_lab()

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]

CLOCKS_S = {"h1": 5, "h2": 7_200}
GPUS = {name: [gpu.uuid for gpu in default_gpus(name, 2)] for name in CLOCKS_S}
SUPPORT = Path(__file__).parents[1] / "support"

SWEEP = """
schema_version: 1
name: lab-tensorrt
base:
  model: {config: llama-tiny}
  engine: {backend: tensorrt, PYTHON tensor_parallel: WORKERS, nodes: 2, engine_args: {max_seq_len: 128, iteration_stats: STATS}}
  workload: {batch_size: 2, output_tokens: 10}
repeats: 1
measure: {min_window_s: 1.5, idle_baseline_s: 0.5, sources: [nvml], warmup: {batches: 0}, gates: {min_coverage: 0.3}}
"""

LEFT = """
from ray._private.state import actors
from ray.util import placement_group_table
alive = [actor["ActorClassName"] for actor in actors().values() if actor["State"] != "DEAD"]
groups = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
free = ray.available_resources()
say([[name for name in alive if "Sampler" not in name], groups, free.get("GPU", 0), free.get("CPU", 0)])
"""


def sweep(workers: int, python: str | None = None) -> str:
    text = SWEEP.replace("WORKERS", str(workers)).replace("STATS", "true" if python else "false")
    return text.replace("PYTHON", f"python: {python}," if python else "")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    hosts = [HostSpec(name=name, gpus=default_gpus(name, 2), monotonic_offset_s=shift) for name, shift in CLOCKS_S.items()]
    with Lab(hosts, folder=tmp_path_factory.mktemp("lab"), env={"OMP_NUM_THREADS": "1", "PYTHONPATH": cluster_path()}) as made:
        yield made


def check_row(row: dict[str, Any]) -> None:
    """Each worker is on the GPU that its host's process of the gang leases, and energy is that of these GPUs alone."""
    workers = {worker["hostname"]: worker for worker in row["workers"]}
    assert set(workers) == set(CLOCKS_S)
    for rank, worker in zip(row["ranks"], row["workers"], strict=True):
        assert worker["gpu_uuids"] == [rank["gpu_uuid"]]
        assert rank["gpu_uuid"] in GPUS[worker["hostname"]]
        assert rank["host"] == worker["node"]
        assert rank["pid"] not in (0, worker["pid"])
    leased = {rank["gpu_uuid"] for rank in row["ranks"]}
    assert {part.rpartition("/")[2] for part in row["energy_covers"]} == leased
    assert row["nodes_expected"] == row["nodes_reported"] == 2
    assert row["total_gpu_energy_j"] == pytest.approx(sum(d["energy_j"] for d in row["devices"] if d["uuid"] in leased))
    facts = dict(row["engine_facts"])
    assert (facts["orchestrator"], facts["allreduce_strategy"]) == ("ray", "NCCL")


def check_nothing_is_left(lab: Lab) -> None:
    """No actor, no placement group, and Ray has all GPUs and CPUs again."""
    until(lambda: ray_says(lab, "h1", LEFT) == [[], [], 4.0, 8.0], deadline_s=30, what="actors and placement groups to be gone")
    signs = ("EngineActor", "RayWorkerWrapper", "llem_ray.backends.process.child")
    for name in CLOCKS_S:
        assert [process.command for process in lab.pids(name) if any(sign in process.command for sign in signs)] == []


def test_workers_are_where_the_gang_is_and_a_killed_one_is_replaced(lab: Lab, tmp_path: Path) -> None:
    run = LabRun(lab, tmp_path, sweep(2))
    run.start()
    _, host = run.wait_for("measuring", 1)["host"].split(",")
    assert run.kill_actors(host, "RayWorkerWrapper") == 1
    assert run.finish() == 0, run.said()
    rows = run.table("trials")
    (failed,) = [row for row in rows if row["status"] == "failed"]
    assert failed["failure_kind"] == "engine_died"
    assert "TensorRT-LLM's worker 1 of 2 ended" in failed["failure_message"]
    (row,) = (row for row in rows if row["status"] == "completed")
    assert len(run.table("loads")) == 2
    check_row(row)
    assert dict(row["engine_facts"])["steps"] == "none: iteration_stats is off"
    (trial,) = judge_trials(lab, [row], "h1")
    assert abs(trial.error_rel) < 0.03
    for reading in trial.readings:
        assert reading.bound_j[0] <= reading.true_j <= reading.bound_j[1], reading
    check_nothing_is_left(lab)


def test_an_interpreter_of_its_own_joins_the_cluster_and_has_two_workers_on_each_host(lab: Lab, tmp_path: Path) -> None:
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        f"import os, runpy, sys\nsys.path.insert(0, {str(SUPPORT)!r})\n"
        f"os.environ['PYTHONPATH'] += {os.pathsep + cluster_path()!r}\n"
        "sys.argv = ['child', *sys.argv[3:]]\n"
        "runpy.run_module('llem_ray.backends.process.child', run_name='__main__', alter_sys=True)\n"
    )
    run = LabRun(lab, tmp_path / "run", sweep(4, f"{sys.executable} {launcher}"))
    assert run.run() == 0, run.said()
    (row,) = run.table("trials")
    check_row(row)
    assert {rank["gpu_uuid"] for rank in row["ranks"]} == {uuid for uuids in GPUS.values() for uuid in uuids}
    assert dict(row["engine_facts"])["steps"].startswith("none: the statistics cannot be read")
    assert dict(row["engine_facts"])["interpreter"].endswith("launcher.py")
    check_nothing_is_left(lab)
