"""Where an engine runs is a line in the sweep file; the rest of the run does not notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llem_ray.config.sweep import load_sweep
from llem_ray.core.errors import ConfigError, PluginError
from llem_ray.core.identity import load_key
from llem_ray.core.measure_spec import WarmupSpec
from llem_ray.core.outcome import Completed, Failed
from llem_ray.core.spec import EngineSpec, Experiment, ModelSpec
from llem_ray.core.workload_spec import WorkloadSpec
from llem_ray.execution.calls import TrialOrder
from llem_ray.execution.engine_host import EngineHost
from llem_ray.execution.engines import worker_layout
from llem_ray.execution.preflight import check_plan
from llem_ray.planning.plan import make_plan

MODEL = ModelSpec(config="llama-tiny")


def host_of(tmp_path: Path, python: str | None, **args: Any) -> tuple[EngineHost, TrialOrder]:
    engine = EngineSpec(backend="fake", device="cpu", python=python, engine_args={"decode_ms": 1} | args)
    experiment = Experiment(model=MODEL, engine=engine, workload=WorkloadSpec(output_tokens=5))
    order = TrialOrder(
        trial_id="t-r0",
        attempt=1,
        experiment=experiment,
        warmup=WarmupSpec(batches=1),
        guard_s=0.01,
        min_window_s=0.05,
        cooldown_s=0.0,
    )
    return EngineHost(MODEL, engine, 0, str(tmp_path), str(tmp_path / "cache")), order


def test_a_trial_in_a_process_of_its_own_is_measured_the_same_way(tmp_path: Path) -> None:
    host, order = host_of(tmp_path, sys.executable)
    loaded = host.load()
    assert loaded.ranks[0].pid != os.getpid()
    assert loaded.report.notes["interpreter"] == sys.executable
    outcome = host.run(order)
    host.close()
    assert isinstance(outcome, Completed), outcome
    window = outcome.window
    times = [ns for request in outcome.requests for ns in (request.sent_ns, *request.token_times_ns)]
    assert window.begin_ns <= times[0] <= times[-1] <= window.end_ns
    assert times == sorted(times)
    assert outcome.steps == 5 * outcome.passes
    assert len(outcome.requests) == outcome.passes
    assert [span.phase for span in outcome.spans] == ["warmup", "guard", "measured", "guard"]


def test_a_death_in_a_trial_is_a_failure_with_the_spans_so_far(tmp_path: Path) -> None:
    host, order = host_of(tmp_path, sys.executable, fail={"kind": "die", "at_run": 2})
    host.load()
    outcome = host.run(order)
    host.close()
    assert isinstance(outcome, Failed)
    assert outcome.kind == "engine_died"
    assert "code 17 during generation" in outcome.message
    assert [span.phase for span in outcome.spans] == ["warmup", "guard", "measured"]


def test_another_interpreter_is_another_load() -> None:
    keys = {load_key(MODEL, EngineSpec(python=python)) for python in (None, "/a/python", "/b/python")}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("engine.python=/opt/none/python", ConfigError, r"engine\.python: no such interpreter\n  found: /opt/none/python"),
        ("engine={backend: nothing, device: cpu, python: PYTHON}", PluginError, "unknown engine 'nothing'"),
        ("engine={backend: fake, device: cpu, python: PYTHON, engine_args: {decode: 1}}", ConfigError, "unknown engine argument"),
    ],
)
def test_preflight_checks_in_that_interpreter(tmp_path: Path, override: str, error: type[Exception], says: str) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "schema_version: 1\nname: study\nbase:\n  model: {config: llama-tiny}\n  engine: {backend: fake, device: cpu}\n"
    )
    sweep = load_sweep(tmp_path / "sweep.yaml", overrides=(override.replace("PYTHON", sys.executable),))
    with pytest.raises(error, match=says):
        check_plan(make_plan(sweep, gpus_available=0), 0, str(tmp_path / "cache"))


def test_layout_of_workers_is_the_factorys() -> None:
    assert worker_layout(EngineSpec(backend="transformers")) == "rank"
    assert worker_layout(EngineSpec(backend="fake")) == "host"
    assert [worker_layout(EngineSpec(backend="tensorrt", nodes=nodes)) for nodes in (None, 1, 2)] == ["host", "host", "ray"]
    with pytest.raises(PluginError, match="no-such-engine"):
        worker_layout(EngineSpec(backend="no-such-engine"))


def test_layout_is_told_without_the_engines_libraries() -> None:
    code = (
        "import sys\n"
        "from llem_ray.core.spec import EngineSpec\n"
        "from llem_ray.execution.engines import worker_layout\n"
        "print(worker_layout(EngineSpec(backend='transformers')), 'torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert told.stdout.split() == ["rank", "False"]
