"""What an engine host makes of an engine that fails twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from llem_ray.core.outcome import Failed
from llem_ray.core.spec import EngineSpec, Experiment, ModelSpec, WorkloadSpec
from llem_ray.execution import engines
from llem_ray.execution.calls import TrialOrder
from llem_ray.execution.engine_host import EngineHost
from llem_ray.testing.backend import FakeBackend

MODEL = ModelSpec(config="llama-tiny", weights="random")
ENGINE = EngineSpec(backend="fake", device="cpu", engine_args={"fail": {"kind": "generation"}})


class Broken(FakeBackend):
    """After its first failure the device answers nothing any more, as CUDA after an illegal access."""

    def reset(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(("backend", "kind"), [(FakeBackend, "generation"), (Broken, "engine_died")])
def test_an_engine_that_cannot_be_reset_is_done_for(
    backend: type[FakeBackend], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own failure is told all the same, and the next trial gets a fresh engine."""

    def load_plugin(group: str, name: str) -> type[FakeBackend]:
        return backend

    monkeypatch.setattr(engines, "load_plugin", load_plugin)
    host = EngineHost(MODEL, ENGINE, 0, str(tmp_path), str(tmp_path))
    host.load()
    experiment = Experiment(model=MODEL, engine=ENGINE, workload=WorkloadSpec(output_tokens=4))
    order = TrialOrder(trial_id="t-r0", attempt=1, experiment=experiment, guard_s=0.0, min_window_s=0.01, cooldown_s=0.0)
    outcome = host.run(order)
    assert isinstance(outcome, Failed)
    assert outcome.kind == kind
    assert "told to fail" in outcome.message
    assert ("illegal memory access" in outcome.message) == (kind == "engine_died")
