"""A host of a gang that another host leads: only vLLM's workers run here, which the engine of the first host talks to."""

from __future__ import annotations

import threading
import time
import warnings
from typing import Any, Final

import torch
import vllm
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from llem_ray.backends.model_source import model_commit
from llem_ray.backends.process.wire import unpack_each
from llem_ray.backends.vllm.engine import Prepared, meet_others, release_process_state
from llem_ray.backends.vllm.failures import load_failure
from llem_ray.backends.vllm.gang import LOAD_S, Gang
from llem_ray.backends.vllm.leftovers import remove_segments, shared_segments
from llem_ray.core.backend import BackendConfig, LoadReport, Rank
from llem_ray.core.errors import GenerationError, LlemRayError

CLOSE_S: Final = 10.0
GRACE_S: Final = 2.0
"""How long workers may take to end after SIGTERM."""


class Follower:
    """This host's workers.

    Args:
        executor: Holds them.
        gang: With the connection to the host that leads.
        ranks: The workers, as they told the leading host.
    """

    def __init__(self, executor: MultiprocExecutor, gang: Gang, ranks: tuple[Rank, ...]) -> None:
        self._executor: MultiprocExecutor | None = executor
        self._gang = gang
        self.ranks = ranks
        self._segments = shared_segments((rank.pid for rank in ranks), rings=True)
        self._serving = threading.Lock()
        self._closing = False

    def follow(self) -> None:
        """See ``FollowerBackend.follow``."""
        with self._serving:
            try:
                self._gang.hear("close", None, "a wait for orders")
            except LlemRayError as error:
                self._end_workers()
                if self._closing:
                    return
                raise GenerationError(error.message, error.hint) from error
            self._gang.begin_end()
            self._end_workers()
            self._gang.tell_closed()

    def close(self) -> None:
        """End the workers, in whichever thread that is; who follows is set free."""
        self._closing = True
        self._gang.close()
        if not self._serving.acquire(timeout=CLOSE_S):
            return  # it ends the workers
        try:
            self._end_workers()
        finally:
            self._serving.release()

    def _end_workers(self) -> None:
        executor, self._executor = self._executor, None
        if executor is None:
            return
        shut_down(executor)
        self._gang.end_processes()
        remove_segments(self._segments)
        release_process_state()


def load_follower(config: BackendConfig, prepared: Prepared, import_s: float) -> tuple[Follower, LoadReport]:
    """Start this host's workers, which load their share of the model together with those of the other hosts.

    Raises:
        LoadError: They could not be loaded here, or on another host.
        DeviceMemoryError: A device is too small.
    """
    gang = meet_others(config, prepared)
    assert gang is not None
    begin_s = time.monotonic()
    executor: MultiprocExecutor | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            executor = MultiprocExecutor(prepared.vllm_config, monitor_workers=False)
        for worker in executor.workers:
            gang.watch_process(worker.proc.sentinel, f"worker {worker.rank} (pid {worker.proc.pid})")
        constructed_s = time.monotonic()
        ranks = unpack_each(Rank, gang.hear("loaded", LOAD_S, "loading"))
    except Exception as error:
        failure = gang.give_up(error, load_failure(config, prepared.source, error))
        if executor is not None:
            shut_down(executor)
        gang.close()
        release_process_state()
        raise failure from error
    report = _report(config, prepared, import_s, constructed_s - begin_s, time.monotonic() - constructed_s)
    return Follower(executor, gang, ranks), report


def shut_down(executor: Any) -> None:
    """End the workers. They listen to the leading host only, so a signal tells them; who does not end soon is killed."""
    processes = [worker.proc for worker in executor.workers]
    for process in processes:
        process.terminate()
    deadline_s = time.monotonic() + GRACE_S
    for process in processes:
        process.join(max(0.0, deadline_s - time.monotonic()))
        process.kill()
    executor.shutdown()


def _report(config: BackendConfig, prepared: Prepared, import_s: float, construct_s: float, warm_s: float) -> LoadReport:
    model = prepared.vllm_config.model_config
    return LoadReport(
        import_s=import_s,
        construct_s=construct_s,
        compile_s=None,
        warm_s=warm_s,
        context_tokens=int(model.max_model_len),
        vocab_size=int(model.get_vocab_size()),
        parameters=None,
        weight_bytes=None,
        dtype=str(model.dtype).removeprefix("torch."),
        device=config.device,
        model_commit=model_commit(prepared.source, prepared.model_config),
        random_weights=prepared.source.random,
        notes={"engine": f"vllm {vllm.__version__}", "torch": str(torch.__version__), "model": prepared.source.location},
    )
