"""Nodes that are not what they seem, and a GPU that does not come back: what is used, what is named, what is refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from lab_fixtures import require_lab

from llem_ray.testing.lab import HostSpec, Lab, default_gpus
from llem_ray.testing.lab.runs import LabRun
from llem_ray.testing.nvml import Fault
from llem_ray.testing.nvml.library import SCENARIO_VARIABLE

pytestmark = [pytest.mark.ray, pytest.mark.slow]

require_lab()

FAULT_S = 19.0
"""When a GPU's memory fills, s after the command began: after its load where that is quick, and in the first window."""

SWEEP = """
schema_version: 1
name: odd
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, gpus: 1, engine_args: {prefill_ms: 5}}
  workload: {batch_size: 2, output_tokens: 10}
sweep:
  engine.engine_args.decode_ms: [5, 6]
repeats: 1
measure:
  min_window_s: WINDOW
  idle_baseline_s: 0.5
  sources: [nvml]
  warmup: {batches: 0}
  exclusive: cluster
  gates: {min_coverage: 0.3}
"""

H3 = default_gpus("h3", 4)
VISIBLE = [gpu.uuid for gpu in H3[1:]]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """h1: two GPUs. h2: GPUs that only Ray knows. h3: four GPUs, of which Ray sees three."""
    hosts = [
        HostSpec(name="h1", gpus=default_gpus("h1", 2)),
        HostSpec(name="h2", num_gpus=2, monotonic_offset_s=100),
        HostSpec(name="h3", gpus=H3, num_gpus=3, env={"CUDA_VISIBLE_DEVICES": ",".join(VISIBLE)}, monotonic_offset_s=9000),
    ]
    with Lab(hosts, folder=tmp_path_factory.mktemp("lab")) as made:
        yield made


def fill_memory_of_first_gpu(lab: Lab, after_s: float) -> str:
    """For processes that load NVML from now on; returns the GPU's UUID."""
    host = lab.hosts["h1"]
    first, *others = host.scenario.gpus
    fault = Fault(kind="memory_used", begin_s=host.scenario.seconds(time.time_ns()) + after_s, value=40e9)
    replace(host.scenario, gpus=(replace(first, faults=(fault,)), *others)).write(Path(host.environment[SCENARIO_VARIABLE]))
    return first.uuid


def run_with_fault_in_first_window(lab: Lab, folder: Path) -> tuple[LabRun, str]:
    """Again with a later fault where the machine was too slow for it; returns the run and the bad GPU."""
    fault_s = FAULT_S
    for number in range(3):
        bad, begin_s = fill_memory_of_first_gpu(lab, fault_s), time.monotonic()
        run = LabRun(lab, folder / str(number), SWEEP.replace("WINDOW", str(fault_s - 2)))
        run.start()
        run.wait_for("measuring", 1)
        took_s = time.monotonic() - begin_s
        assert run.finish(timeout_s=300) == 0, run.said()
        if took_s < fault_s:
            return run, bad
        fault_s = took_s + FAULT_S
    pytest.fail(f"the first window began {took_s:.0f} s after the command, which is later than ever expected")


@pytest.mark.timeout(900)
def test_a_gpu_whose_memory_is_not_free_again_is_named_and_not_used_by_the_next_gang(lab: Lab, tmp_path: Path) -> None:
    run, bad = run_with_fault_in_first_window(lab, tmp_path)
    rows = sorted(run.table("trials"), key=lambda row: row["begin_ns"])
    used = [{uuid for worker in row["workers"] for uuid in worker["gpu_uuids"]} for row in rows]
    assert len(used) == 2
    assert bad in used[0], run.said()
    assert bad not in used[1]
    assert f"GPU {bad} on h1 is not used any more" in run.said()
    assert "more memory in use than before its load" in run.said()


def test_gpus_that_cannot_be_measured_are_not_used(lab: Lab, tmp_path: Path) -> None:
    run = LabRun(lab, tmp_path, SWEEP.replace("WINDOW", "2").replace("gpus: 1", "gpus: 2, tensor_parallel: 2, nodes: 2"))
    assert run.run() == 0, run.said()
    for row in run.table("trials"):
        assert {worker["hostname"] for worker in row["workers"]} == {"h1", "h3"}
        (there,) = [worker["gpu_uuids"] for worker in row["workers"] if worker["hostname"] == "h3"]
        assert len(there) == 1
        assert there[0] in VISIBLE
        assert row["power_valid"]


def test_a_gang_for_which_too_few_can_be_measured_is_refused(lab: Lab, tmp_path: Path) -> None:
    run = LabRun(lab, tmp_path, SWEEP.replace("WINDOW", "2").replace("gpus: 1", "gpus: 3, tensor_parallel: 3, nodes: 3"))
    assert run.run() == 5
    assert "needs 3 nodes" in run.said()
    assert "no sampler on h2" in run.said()
