"""What is refused before anything starts."""

import time
from pathlib import Path

import psutil
import pytest

from llem_ray.config.sweep import load_sweep
from llem_ray.core.errors import ConfigError, PlacementError, PluginError
from llem_ray.core.plan import Plan
from llem_ray.execution.preflight import check_plan, process_start_ns
from llem_ray.planning.plan import make_plan
from llem_ray.testing.backend import FakeBackend

SWEEP = """\
schema_version: 1
name: study
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu}
sweep:
  workload.batch_size: [1, 2]
"""


def plan_of(tmp_path: Path, *overrides: str, gpus: int = 0) -> Plan:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return make_plan(load_sweep(tmp_path / "sweep.yaml", overrides=overrides), gpus_available=gpus)


def test_a_good_plan_passes_and_touches_nothing(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    check_plan(plan, 0, str(tmp_path / "cache"))
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("engine.backend=nothing", PluginError, "unknown engine 'nothing'"),
        ("engine.engine_args={decode_ms: -1}", ConfigError, "engine.engine_args"),
        ("sweep.engine.engine_args=[{decode_ms: 1}, {nonsense: 1}]", ConfigError, "nonsense"),
        ("workload.prompts={source: file, path: absent.jsonl}", ConfigError, "absent.jsonl"),
        ("engine={backend: fake, device: cuda}", PlacementError, "needs 1 GPU, this host has 0"),
        ("engine={backend: fake, device: cuda, tensor_parallel: 4}", PlacementError, "needs 4 GPUs, this host has 0"),
    ],
)
def test_a_bad_plan_is_refused(tmp_path: Path, override: str, error: type[Exception], says: str) -> None:
    plan = plan_of(tmp_path, override)
    with pytest.raises(error, match=says.replace("[", r"\[")):
        check_plan(plan, 0, str(tmp_path))


def test_gpus_that_are_there_are_enough(tmp_path: Path) -> None:
    check_plan(plan_of(tmp_path, "engine={backend: fake, device: cuda, tensor_parallel: 2}", gpus=2), 2, str(tmp_path))


def test_the_process_began_when_the_kernel_says() -> None:
    age_s = (time.monotonic_ns() - process_start_ns()) / 1e9
    assert age_s == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.5)


def test_an_engine_for_batches_is_not_asked_to_serve_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, "sweep.workload.batch_size=[1]", "workload.requests=4", "workload.load.pattern=saturated")
    check_plan(plan, 0, str(tmp_path))
    monkeypatch.setattr(FakeBackend, "serves_online", False)
    with pytest.raises(
        ConfigError, match=r"workload.load.pattern: fake runs batches only.*\n  found: saturated\n  allowed: batch"
    ):
        check_plan(plan, 0, str(tmp_path))


def test_a_trace_is_read_before_anything_starts(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "sweep.workload.batch_size=[1]", "workload.load={pattern: trace, trace: t.csv}")
    with pytest.raises(ConfigError, match="the trace does not exist"):
        check_plan(plan, 0, str(tmp_path))
    (tmp_path / "t.csv").write_text("timestamp_s\n2\n1\n")
    with pytest.raises(ConfigError, match="out of order"):
        check_plan(plan, 0, str(tmp_path))


def test_online_and_batch_workloads_of_an_engine_are_loaded_apart(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "experiments=[{workload: {requests: 4, load: {pattern: saturated}}}]")
    assert [group.online for group in plan.groups] == [False, True]
    assert len({group.load_key for group in plan.groups}) == 2
