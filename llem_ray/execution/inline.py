"""Runs a plan in this process: no Ray, no second process. For debugging, and for fast tests.

The engine shares the interpreter with everything else, so its timings are perturbed and a hang cannot be killed.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Generic, ParamSpec, TypeVar

from llem_ray.core.outcome import Outcome
from llem_ray.core.plan import LoadGroup
from llem_ray.core.power import SamplerInfo
from llem_ray.execution.calls import (
    Call,
    Fetched,
    Gang,
    Leased,
    Loaded,
    Node,
    PowerSeen,
    Sampler,
    SamplerSettings,
    TrialOrder,
    WarmupProgress,
)
from llem_ray.execution.context import unsure_workloads
from llem_ray.execution.engine_host import EngineHost
from llem_ray.execution.sampler_host import SamplerHost
from llem_ray.planning.packing import Seat

T = TypeVar("T")
P = ParamSpec("P")


class _Answer(Generic[T]):
    """A Call that a thread of this process answers."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def result(self, timeout_s: float) -> T:
        return self._future.result(timeout_s)

    @property
    def done(self) -> bool:
        return self._future.done()


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

    def lease(self) -> _Answer[tuple[Leased, ...]]:
        """Answered at once."""
        return self._worker.ask(lambda: (self._host.lease(),))

    def load(self) -> _Answer[Loaded]:
        """Load the model."""
        return self._worker.ask(self._host.load)

    def run(self, order: TrialOrder) -> _Answer[Outcome]:
        """Run one attempt."""
        return self._worker.ask(self._host.run, order)

    def phase(self) -> str | None:
        """What the engine does now."""
        return self._host.phase()

    def tell_warmup(self, trial_id: str, attempt: int, seen: PowerSeen | None) -> _Answer[WarmupProgress]:
        """Tell the engine, on the caller's thread."""
        future: Future[WarmupProgress] = Future()
        future.set_result(self._host.tell_warmup(trial_id, attempt, seen))
        return _Answer(future)

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

    def __init__(self, settings: SamplerSettings) -> None:
        self._worker = _Worker("llem-ray-sampler-calls")
        self._host = SamplerHost(settings.sources, settings.sample_hz)

    def host(self) -> _Answer[str]:
        """This host."""
        return self._worker.ask(self._host.host)

    def describe(self, skip: Sequence[str] = (), min_epoch: int = 1) -> _Answer[SamplerInfo]:
        """Answered when calibrated."""
        return self._worker.ask(self._host.describe, skip, min_epoch)

    def fetch(self, after_seq: int, epoch: int) -> _Answer[Fetched]:
        """Batches after ``after_seq``."""
        return self._worker.ask(self._host.fetch, after_seq, epoch)

    def probe(self) -> _Answer[tuple[int, int]]:
        """This host's clock."""
        return self._worker.ask(self._host.probe)

    def alive(self, pids: Sequence[int]) -> _Answer[tuple[int, ...]]:
        """Processes that still exist."""
        return self._worker.ask(self._host.alive, pids)

    def close(self, *, force: bool = False) -> None:
        """Stop polling."""
        with contextlib.suppress(Exception):
            self._worker.ask(self._host.close).result(0.0 if force else 10.0)
        self._worker.end()


class InlineExecutor:
    """Everything on this host, in this process."""

    def start(self) -> None:
        """Nothing to reach."""

    def nodes(self) -> tuple[Node, ...]:
        """This process, without GPUs."""
        return (Node(node_id="inline", hostname=socket.gethostname(), address="127.0.0.1", gpus=0),)

    def open_sampler(self, _node: Node, settings: SamplerSettings) -> Sampler:
        """A sampler on a thread."""
        return InlineSampler(settings)

    def check(self, groups: Sequence[LoadGroup], base_dir: str, cache_dir: str) -> None:
        """Nothing: whoever submits has checked in this very process."""

    def open_gang(self, group: LoadGroup, _seats: Sequence[Seat], base_dir: str, cache_dir: str) -> Gang:
        """One engine, on a thread."""
        experiment = group.experiment
        unsure, all_unsure = unsure_workloads(group, base_dir)
        return InlineGang(
            EngineHost(
                experiment.model,
                experiment.engine,
                0,
                base_dir,
                cache_dir,
                online=group.online,
                unsure=unsure,
                all_unsure=all_unsure,
            )
        )

    def quarantine(self, node_id: str, gpu_uuid: str) -> None:
        """Nothing: there is no GPU."""

    def ask_for_nodes(self, groups: Sequence[LoadGroup]) -> None:
        """Nothing: there are no others."""

    def wait(self, calls: Sequence[Call[Any]], timeout_s: float) -> Sequence[Call[Any]]:
        """Those that are answered."""
        until = time.monotonic() + timeout_s
        while not all(call.done for call in calls if isinstance(call, _Answer)) and time.monotonic() < until:
            time.sleep(min(0.005, timeout_s))
        return [call for call in calls if isinstance(call, _Answer) and call.done]

    def is_gone(self) -> bool:
        """It is this process."""
        return False

    def facts(self) -> Mapping[str, str]:
        """For the environment record."""
        return {"executor": "inline", "pid": str(os.getpid())}

    def close(self) -> None:
        """Gangs and samplers are closed by whoever opened them."""
