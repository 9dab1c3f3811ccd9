"""Ray as every part of this package uses it: imported with our settings, asked with deadlines, its errors turned into ours."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from llem_ray import __version__
from llem_ray.core.errors import EngineDied, LlemRayError, PlacementError, Unreachable
from llem_ray.execution.calls import Call

T = TypeVar("T")

NAMESPACE: Final = "llem-ray"

EMBEDDED: Final = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # bind to 127.0.0.1 only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # an actor without GPUs sees them all: right for samplers
    "RAY_task_events_shutdown_flush_timeout_ms": "100",  # where its head is gone, they would be waited for in vain for 5 s
    "RAY_worker_niceness": "0",  # Ray's 15 would let any other process slow the engine and delay the sampler
}
"""Settings of an embedded Ray that must be in the environment before Ray is imported."""


def import_ray() -> Any:
    """Ray, imported before by whoever started or joined it."""
    import ray  # noqa: PLC0415 - settings must be in the environment first

    return ray


def prepare_embedded() -> None:
    """The settings of an embedded Ray, and a token that is known to nobody else, unless Ray is imported already.

    They are wanted before an engine is checked: vLLM imports Ray.
    """
    if "ray" not in sys.modules:
        os.environ.update(EMBEDDED)
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # Ray names GPUs by number; CUDA's own order is the fastest first, which is not NVML's.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def import_embedded() -> Any:
    """Import Ray with the settings of an embedded one."""
    prepare_embedded()
    return import_ray()


def first_line(error: BaseException) -> str:
    """The first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def answer_of(ref: Any, timeout_s: float, what: str) -> Any:
    """What an actor's method returned.

    Raises:
        TimeoutError: It has not, within ``timeout_s``.
        EngineDied: The actor, or its node, is gone.
        Unreachable: The same, or it may answer again later.
        PlacementError: llem-ray is not installed where the actor was to run.
        LlemRayError: What the method raised.
    """
    ray = import_ray()
    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise TimeoutError(f"no answer to {what} within {timeout_s} s") from error
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, LlemRayError):
            raise cause from error
        raise LlemRayError(f"{what} failed: {cause!r}", str(error)) from error
    except ray.exceptions.ActorUnavailableError as error:
        raise Unreachable(f"the process cannot be reached for {what}: {first_line(error)}") from error
    except ray.exceptions.RayError as error:
        if "No module named 'llem_ray'" in str(error):
            hint = f"install llem-ray {__version__} in the environment that Ray runs in there, from the same checkout or wheel"
            raise PlacementError("llem-ray is not installed on a node of the cluster", hint) from error
        # Its actor died, or Ray killed it because the host's memory was nearly full
        raise EngineDied(f"the process died during {what}: {first_line(error)}") from error


class RayCall(Generic[T]):
    """A Call that one actor answers."""

    def __init__(self, ref: Any, what: str) -> None:
        self.refs = [ref]
        self._what = what

    def result(self, timeout_s: float) -> T:
        """The actor's answer; EngineDied when the actor is gone."""
        answer: T = answer_of(self.refs[0], timeout_s, self._what)
        return answer


class RayCalls(Generic[T]):
    """A Call that several actors answer, each for itself.

    Args:
        refs: Their answers.
        what: Named in errors.
        joined: Makes one answer of theirs.
    """

    def __init__(self, refs: Sequence[Any], what: str, joined: Callable[[list[Any]], T]) -> None:
        self.refs = list(refs)
        self._what = what
        self._joined = joined

    def result(self, timeout_s: float) -> T:
        """All answers as one. The first error of any of them is raised as soon as it is known."""
        ray = import_ray()
        ready, open_refs = ray.wait(self.refs, num_returns=len(self.refs), timeout=timeout_s, fetch_local=True)
        for ref in ready:
            answer_of(ref, timeout_s, self._what)
        if open_refs:
            raise TimeoutError(f"no answer to {self._what} within {timeout_s} s from {len(open_refs)} of {len(self.refs)}")
        return self._joined([answer_of(ref, timeout_s, self._what) for ref in self.refs])


def wait_for(calls: Sequence[Call[Any]], timeout_s: float) -> Sequence[Call[Any]]:
    """Those of the calls that are answered; returns when all are, or after ``timeout_s``."""
    refs = {ref: None for call in calls for ref in call.refs}  # type: ignore[attr-defined]
    if not refs:
        return ()
    ray = import_ray()
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s, fetch_local=True)
    answered = set(ready)
    return [call for call in calls if answered.issuperset(call.refs)]  # type: ignore[attr-defined]
