"""Runs a plan in this process: no Ray, no second process. For debugging, and for fast tests.

The engine shares the interpreter with everything else, so its timings are perturbed and a hang cannot be killed.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Generic, ParamSpec, TypeVar

from llem_ray.core.outcome import Outcome
from llem_ray.core.plan import LoadGroup
from llem_ray.core.power import SampleBatch, SamplerInfo
from llem_ray.execution.calls import Gang, Leased, Loaded, Sampler, TrialOrder
from llem_ray.execution.engine_host import EngineHost
from llem_ray.execution.sampler_host import SamplerHost

T = TypeVar("T")
P = ParamSpec("P")


class _Answer(Generic[T]):
    """A Call that a thread of this process answers."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def result(self, timeout_s: float) -> T:
        return self._future.result(timeout_s)


class _Worker:
    """One thread that does what it is asked, in order. A daemon: an engine that hangs in it cannot keep the process alive."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def ask(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> _Answer[T]:
        future: Future[T] = Future()

        def task() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - whoever asked gets it
                future.set_exception(error)

        self._tasks.put(task)
        return _Answer(future)

    def end(self) -> None:
        self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


class InlineGang:
    """An engine on a thread of this process."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host
        self._worker = _Worker("llem-ray-engine")

    def lease(self) -> _Answer[Leased]:
        """Answered at once."""
        return self._worker.ask(self._host.lease)

    def load(self) -> _Answer[Loaded]:
        """Load the model."""
        return self._worker.ask(self._host.load)

    def run(self, order: TrialOrder) -> _Answer[Outcome]:
        """Run one attempt."""
        return self._worker.ask(self._host.run, order)

    def phase(self) -> str | None:
        """What the engine does now."""
        return self._host.phase()

    def close(self, timeout_s: float) -> None:
        """Unload; a thread that does not come back within ``timeout_s`` is left behind."""
        with contextlib.suppress(Exception):
            self._worker.ask(self._host.close).result(timeout_s)
        self._worker.end()

    def last_words(self) -> str | None:
        """None: it cannot die without this process."""
        return None


class InlineSampler:
    """The sampler's own thread, in this process."""

    def __init__(self, sources: Sequence[str] | str, sample_hz: float, epoch: int) -> None:
        self._worker = _Worker("llem-ray-sampler-calls")
        self._host = SamplerHost(sources, sample_hz, epoch)

    def describe(self) -> _Answer[SamplerInfo]:
        """Answered when calibrated."""
        return self._worker.ask(self._host.describe)

    def fetch(self, after_seq: int) -> _Answer[list[SampleBatch]]:
        """Batches after ``after_seq``."""
        return self._worker.ask(self._host.fetch, after_seq)

    def close(self) -> None:
        """Stop polling."""
        with contextlib.suppress(Exception):
            self._worker.ask(self._host.close).result(10.0)
        self._worker.end()


class InlineExecutor:
    """Everything on this host, in this process."""

    def start(self) -> None:
        """Nothing to reach."""

    def gpus_free(self) -> int:
        """0: a gang in this process leases no GPU."""
        return 0

    def open_samplers(self, sources: Sequence[str] | str, sample_hz: float, epoch: int) -> tuple[Sampler, ...]:
        """One sampler, on a thread."""
        return (InlineSampler(sources, sample_hz, epoch),)

    def open_gang(self, group: LoadGroup, base_dir: str, cache_dir: str) -> Gang:
        """One engine, on a thread."""
        experiment = group.experiment
        return InlineGang(EngineHost(experiment.model, experiment.engine, 0, base_dir, cache_dir))

    def facts(self) -> Mapping[str, str]:
        """For the environment record."""
        return {"executor": "inline", "pid": str(os.getpid())}

    def close(self) -> None:
        """Gangs and samplers are closed by whoever opened them."""
