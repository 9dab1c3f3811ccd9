"""Whatever Ray says of an actor that does not answer is an error of ours."""

from __future__ import annotations

from typing import Any

import pytest

from llem_ray.core.errors import EngineDied
from llem_ray.execution.ray.executor import RayCall, _import_ray


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
