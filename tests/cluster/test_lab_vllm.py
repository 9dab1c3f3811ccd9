"""vLLM over two hosts of a lab: one model shared by both, in the interpreter that has vLLM, and the energy of both GPUs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lab_fixtures import require_lab

from llem_ray.testing.lab import HostSpec, Lab, default_gpus
from llem_ray.testing.lab.runs import LabRun
from llem_ray.testing.lab.truth import JudgedTrial, judge_trials

ROOT = Path(__file__).parents[2]
CLOCKS_S = {"h1": 5, "h2": 7_200}
LOAD_S = 400.0
ENGINE_SIGNS = ("VLLM::", "multiprocessing.spawn", "llem_ray.backends.process.child")


def vllm_python() -> str:
    """The interpreter with vLLM: this one, or that of the environment that scripts/setup-vllm makes."""
    if find_spec("vllm") is not None:
        return sys.executable
    return str(ROOT / os.environ.get("LLEM_RAY_VENV_VLLM", ".venv-vllm") / "bin" / "python")


require_lab()

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(2 * LOAD_S),
    pytest.mark.skipif(
        not Path(vllm_python()).exists(), reason="there is no interpreter with vLLM: scripts/setup-vllm makes one"
    ),
]

SWEEP = f"""
schema_version: 1
name: lab-vllm
base:
  model: {{config: llama-tiny, dtype: float32}}
  engine:
    backend: vllm
    python: {vllm_python()}
    device: cpu
    tensor_parallel: 2
    gpus: 2
    nodes: 2
    engine_args: {{max_model_len: 128, max_num_seqs: 4}}
  workload: {{batch_size: 2, output_tokens: 10}}
repeats: 2
measure: {{min_window_s: 2, idle_baseline_s: 1, sources: [nvml], gates: {{min_coverage: 0.3}}, load_timeout_s: {LOAD_S}}}
"""


@dataclass(frozen=True)
class Ran:
    trials: list[dict[str, Any]]
    judged: list[JudgedTrial]
    left: dict[str, tuple[list[str], list[str]]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("lab-vllm")
    hosts = [HostSpec(name=name, gpus=default_gpus(name, 1), monotonic_offset_s=shift) for name, shift in CLOCKS_S.items()]
    # Both hosts share this machine's cores.
    with Lab(hosts, folder=folder / "hosts", env={"OMP_NUM_THREADS": "1"}) as lab:
        run = LabRun(lab, folder / "run", SWEEP)
        code = run.run(timeout_s=LOAD_S)
        assert code == 0, run.said()
        trials = run.table("trials")
        left = {
            name: (
                [process.command for process in lab.pids(name) if any(sign in process.command for sign in ENGINE_SIGNS)],
                lab.run(name, ["ls", "/dev/shm"], timeout_s=30).stdout.split(),
            )
            for name in CLOCKS_S
        }
        yield Ran(trials=trials, judged=judge_trials(lab, trials, "h1"), left=left)


def test_one_model_is_served_by_both_hosts(ran: Ran) -> None:
    assert len(ran.trials) == 2
    for row in ran.trials:
        assert row["status"] == "completed"
        assert row["output_tokens"] % 20 == 0
        assert row["output_tokens"] > 0
        assert [rank["rank"] for rank in row["ranks"]] == [0, 1]
        assert len({rank["host"] for rank in row["ranks"]}) == 2
        assert all(rank["pid"] > 0 for rank in row["ranks"])
        assert {worker["hostname"] for worker in row["workers"]} == {"h1", "h2"}
    assert len({rank["pid"] for row in ran.trials for rank in row["ranks"]}) == 2


def test_the_energy_of_both_gpus_is_complete_and_true(ran: Ran) -> None:
    for row, trial in zip(ran.trials, ran.judged, strict=True):
        leased = {uuid for worker in row["workers"] for uuid in worker["gpu_uuids"]}
        assert len(leased) == 2
        assert {part.rpartition("/")[2] for part in row["energy_covers"]} == leased
        assert row["nodes_expected"] == row["nodes_reported"] == 2
        assert row["power_valid"], row["invalid_reasons"]
        assert row["total_gpu_energy_j"] == pytest.approx(sum(d["energy_j"] for d in row["devices"] if d["uuid"] in leased))
        assert abs(trial.error_rel) < 0.03
        for reading in trial.readings:
            assert reading.bound_j[0] <= reading.true_j <= reading.bound_j[1], reading


def test_nothing_is_left_on_either_host(ran: Ran) -> None:
    for commands, segments in ran.left.values():
        assert commands == []
        assert not [name for name in segments if name.startswith(("psm_", "vllm_dist"))]
