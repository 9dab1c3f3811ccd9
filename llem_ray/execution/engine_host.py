"""Holds one engine with its loaded model and runs many trials on it. A plain class: Ray makes an actor of it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, cast

from llem_ray.core.backend import (
    BackendConfig,
    FollowerBackend,
    InferenceBackend,
    LoadReport,
    Rendezvous,
    Request,
    RequestRecord,
    StepEvent,
)
from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.energy import Window
from llem_ray.core.errors import GenerationError, LlemRayError, LoadError
from llem_ray.core.outcome import Completed, Failed, Outcome, failed_from
from llem_ray.core.plan import LoadGroup
from llem_ray.core.spec import EngineSpec, ModelSpec, PromptSpec, SamplingSpec, WorkloadSpec
from llem_ray.core.step_log import StepLog
from llem_ray.core.units import ns_from_s
from llem_ray.execution.calls import Leased, Loaded, TrialOrder
from llem_ray.execution.engines import make_backend, worker_layout
from llem_ray.execution.spans import SpanLog
from llem_ray.power.host import host_id
from llem_ray.workloads.prompts import batches, build_requests, load_prompts

KEPT_TOKENS = 2_000_000
"""Prompt tokens of other cells that are kept for their repeats; about 36 bytes each."""


class EngineHost:
    """One gang's engine.

    Args:
        model: The model to load.
        engine: The engine to load it with.
        gpus: Whole GPUs that were leased for it.
        base_dir: Folder that relative paths of the sweep start from.
        cache_dir: Writable folder for what we build ourselves; None: this host's own, see ``host_cache_dir``.
        clock: The node's monotonic clock.
        prompts: Texts of prompt files that were read elsewhere; others are read here.
    """

    def __init__(
        self,
        model: ModelSpec,
        engine: EngineSpec,
        gpus: int,
        base_dir: str,
        cache_dir: str | None,
        clock: Clock | None = None,
        prompts: Mapping[PromptSpec, Sequence[str]] | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._base_dir = base_dir
        self._prompts = dict(prompts or {})
        on_gpu = engine.device == "cuda" or (engine.device == "auto" and gpus > 0)
        device: Literal["cpu", "cuda"] = "cuda" if on_gpu else "cpu"
        self._config = BackendConfig(
            model=model,
            engine=engine,
            device=device,
            host=host_id(),
            base_dir=base_dir,
            cache_dir=cache_dir or str(host_cache_dir()),
        )
        self._backend: InferenceBackend | None = None
        self._report: LoadReport | None = None
        self._requests: dict[str, tuple[tuple[Request, ...], ...]] = {}
        self._phase: str | None = None

    def lease(self) -> Leased:
        """Where this host runs."""
        return Leased(node=self._config.host, hostname=socket.gethostname(), pid=os.getpid(), gpu_ids=())

    def load(self, rendezvous: Rendezvous | None = None) -> Loaded:
        """Check the engine's arguments, load the model and say who serves it.

        Args:
            rendezvous: Where this process meets the others of its gang; None when it is alone.

        Raises:
            LlemRayError: What the engine raised; any other exception becomes a LoadError with its text.
        """
        self._phase = "load"
        self._config = replace(self._config, rendezvous=rendezvous)
        try:
            backend = self._backend = make_backend(self._config)
            backend.check()
            self._report = backend.load()
            return Loaded(report=self._report, ranks=backend.identity())
        except LlemRayError:
            raise
        except Exception as error:
            raise LoadError(f"{self._config.engine.backend} failed to load: {type(error).__name__}: {error}") from error
        finally:
            self._phase = None

    def follow(self) -> None:
        """Serve the leading process of the gang until it closes."""
        if self._backend is None:
            raise GenerationError("no model is loaded")
        cast("FollowerBackend", self._backend).follow()

    def run(self, order: TrialOrder) -> Outcome:
        """Run one attempt; whatever goes wrong in it comes back as Failed with the spans so far."""
        spans = SpanLog(self._clock, order.trial_id, order.attempt)
        try:
            return self._run(order, spans)
        except Exception as error:  # noqa: BLE001 - the one border where an engine's error becomes a Failed
            return self._forget_failure(failed_from(error, spans.finish()))
        finally:
            self._phase = None

    def phase(self) -> str | None:
        """What the host does now."""
        return self._phase

    def close(self) -> None:
        """Unload the model."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def _run(self, order: TrialOrder, spans: SpanLog) -> Outcome:
        if self._backend is None:
            raise GenerationError("no model is loaded")
        backend, sampling = self._backend, order.experiment.sampling
        work = self._work(order.experiment.workload)
        if order.warmup_batches:
            self._enter(spans, "warmup")
            for index in range(order.warmup_batches):
                for _ in backend.run(work[index % len(work)], sampling):
                    pass
            backend.reset()
        self._guard(spans, order.guard_s)
        begin_ns = self._enter(spans, "measured")
        log = StepLog() if order.record_steps else None
        requests, steps, passes = self._measure(backend, work, sampling, begin_ns + ns_from_s(order.min_window_s), log)
        end_ns = self._guard(spans, order.guard_s)
        if order.cooldown_s:
            entered_ns = self._enter(spans, "cooldown")
            self._clock.sleep_until_ns(entered_ns + ns_from_s(order.cooldown_s))
        window = Window(node=self._config.host, begin_ns=begin_ns, end_ns=end_ns)
        return Completed(window=window, spans=spans.finish(), requests=requests, steps=steps, passes=passes, step_log=log)

    def _measure(
        self,
        backend: InferenceBackend,
        work: tuple[tuple[Request, ...], ...],
        sampling: SamplingSpec,
        until_ns: int,
        log: StepLog | None,
    ) -> tuple[tuple[RequestRecord, ...], int, int]:
        """Whole passes over the workload until the window is long enough; steps are told to ``log``."""
        requests: list[RequestRecord] = []
        steps = passes = 0
        while True:
            for batch in work:
                for event in backend.run(batch, sampling):
                    if isinstance(event, StepEvent):
                        steps += 1
                        if log is not None:
                            log.add(event)
                    else:
                        requests.append(replace(event, request_id=f"{passes}-{event.request_id}"))
            passes += 1
            if self._clock.monotonic_ns() >= until_ns:
                return tuple(requests), steps, passes

    def _work(self, workload: WorkloadSpec) -> tuple[tuple[Request, ...], ...]:
        """The workload's batches as token ids; repeats of a cell reuse them."""
        key = json.dumps(asdict(workload), sort_keys=True)
        if key not in self._requests:
            assert self._backend is not None
            assert self._report is not None
            requests = build_requests(
                workload,
                encode=self._backend.encode,
                vocab_size=self._report.vocab_size,
                context_tokens=self._report.context_tokens,
                prompts=self._texts(workload.prompts),
                special_token_ids=self._report.special_token_ids,
            )
            if sum(map(_tokens, self._requests.values())) > KEPT_TOKENS:
                self._requests.clear()
            self._requests[key] = tuple(batches(requests, workload.batch_size))
        return self._requests[key]

    def _texts(self, spec: PromptSpec) -> Sequence[str]:
        return self._prompts[spec] if spec in self._prompts else load_prompts(spec, self._base_dir)

    def _guard(self, spans: SpanLog, guard_s: float) -> int:
        entered_ns = self._enter(spans, "guard")
        self._clock.sleep_until_ns(entered_ns + ns_from_s(guard_s))
        return entered_ns

    def _enter(self, spans: SpanLog, phase: Literal["warmup", "guard", "measured", "cooldown"]) -> int:
        self._phase = phase
        return spans.enter(phase)

    def _forget_failure(self, failed: Failed) -> Failed:
        """Free what a failed batch left on the device, so that the next trial starts clean; an engine that cannot is done for."""
        try:
            if self._backend is not None:
                self._backend.reset()
        except Exception as error:  # noqa: BLE001 - the same border: the first failure must not be hidden by the second
            message = f"{failed.message}; the engine could not be reset afterwards: {type(error).__name__}: {error}"
            return replace(failed, kind="engine_died", message=message)
        return failed


def host_cache_dir() -> Path:
    """Where this host keeps tokenizers and checkpoints that are built here: ``LLEM_RAY_CACHE``, or the user's cache folder."""
    if named := os.environ.get("LLEM_RAY_CACHE"):
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llem-ray"


def check_group(group: LoadGroup, base_dir: str, cache_dir: str | None, *, alone: bool = False) -> None:
    """Refuse an engine, its arguments or its model that cannot work here. Loads nothing.

    Args:
        group: Whose engine.
        base_dir: Folder that relative paths start from.
        cache_dir: Writable folder; None: this host's own.
        alone: One process must serve the whole gang.

    Raises:
        PluginError: The engine is unknown or not installed; the hint is the pip command.
        ConfigError: An engine argument, a model or an interpreter is wrong.
    """
    engine = group.experiment.engine
    on_gpu = engine.device == "cuda" or (engine.device == "auto" and group.gpus > 0)
    config = BackendConfig(
        model=group.experiment.model,
        engine=engine,
        device="cuda" if on_gpu else "cpu",
        host=host_id(),
        base_dir=base_dir,
        cache_dir=cache_dir or str(host_cache_dir()),
        rendezvous=None if alone else _pretended(engine),
    )
    backend = make_backend(config)
    try:
        backend.check()
    finally:
        backend.close()


def _pretended(engine: EngineSpec) -> Rendezvous | None:
    """What the first of a gang's processes is told, before there is a gang; None where it is the only one."""
    size = engine.world_size if worker_layout(engine) == "rank" else engine.nodes or 1
    if size == 1:
        return None
    me = host_id()
    return Rendezvous(
        rank=0, world_size=size, local_rank=0, hosts=(me,) * size, master_addr="127.0.0.1", master_port=1, node_addr="127.0.0.1"
    )


def _tokens(work: tuple[tuple[Request, ...], ...]) -> int:
    return sum(len(request.prompt_token_ids) for batch in work for request in batch)
