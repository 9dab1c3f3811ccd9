"""Whatever Ray says of an actor that does not answer is an error of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from llem_ray.core.errors import EngineDied
from llem_ray.execution.ray.runtime import EMBEDDED, RayCall, prepare_embedded
from llem_ray.execution.ray.runtime import import_ray as _import_ray


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ActorDiedError", ()),
        ("ActorUnavailableError", ("gone for now", b"0" * 16)),
        ("OutOfMemoryError", ("killed: the node was low on memory",)),
        ("RuntimeEnvSetupError", ("no environment",)),
        ("ActorUnschedulableError", ("no room",)),
        ("WorkerCrashedError", ()),
        ("LocalRayletDiedError", ()),
    ],
)
def test_an_actor_that_is_gone_is_an_engine_that_died(
    name: str, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = _import_ray()

    def get(ref: Any, timeout: float) -> None:
        raise getattr(ray.exceptions, name)(*arguments)

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(EngineDied, match="load"):
        RayCall(None, "load").result(1.0)


def test_no_answer_yet_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = _import_ray()

    def get(ref: Any, timeout: float) -> None:
        raise ray.exceptions.GetTimeoutError("not yet")

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(TimeoutError):
        RayCall(None, "load").result(1.0)


@pytest.mark.parametrize(("chosen", "order"), [(None, "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")])
def test_cuda_counts_gpus_as_nvml_does_unless_the_user_says_otherwise(chosen: str | None, order: str) -> None:
    """On a host with two models of GPU the gang would else run on another GPU than the one that is measured."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_ORDER" and not name.startswith("RAY_")}
    imported = "import os; from llem_ray.execution.ray import runtime; runtime.import_embedded()"
    code = f"{imported}; print(os.environ['CUDA_DEVICE_ORDER'])"
    set_by_user = {} if chosen is None else {"CUDA_DEVICE_ORDER": chosen}
    said = subprocess.run([sys.executable, "-c", code], env=env | set_by_user, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == order


def test_an_engine_that_imports_ray_finds_the_settings_of_an_embedded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM does so when its arguments are checked, before Ray is started; from then on they stay as they are."""
    monkeypatch.setattr(os, "environ", {"RAY_AUTH_MODE": "disabled"})
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    prepare_embedded()
    settings = dict(os.environ)
    assert settings.items() >= EMBEDDED.items()
    assert len(settings["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.setitem(sys.modules, "ray", object())
    prepare_embedded()
    assert os.environ == settings
