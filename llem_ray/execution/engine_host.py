"""Holds one engine with its loaded model and runs many trials on it. A plain class: Ray makes an actor of it."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, replace
from typing import Literal

from llem_ray.core.backend import BackendConfig, InferenceBackend, LoadReport, Request, RequestRecord, StepEvent
from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.energy import Window
from llem_ray.core.errors import GenerationError, LlemRayError, LoadError
from llem_ray.core.outcome import Completed, Failed, Outcome, failed_from
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec, WorkloadSpec
from llem_ray.core.units import ns_from_s
from llem_ray.execution.calls import Leased, Loaded, TrialOrder
from llem_ray.execution.engines import make_backend
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
        cache_dir: Writable folder for what we build ourselves.
        clock: The node's monotonic clock.
    """

    def __init__(
        self, model: ModelSpec, engine: EngineSpec, gpus: int, base_dir: str, cache_dir: str, clock: Clock | None = None
    ) -> None:
        self._clock = clock or SystemClock()
        self._base_dir = base_dir
        on_gpu = engine.device == "cuda" or (engine.device == "auto" and gpus > 0)
        device: Literal["cpu", "cuda"] = "cuda" if on_gpu else "cpu"
        self._config = BackendConfig(
            model=model, engine=engine, device=device, host=host_id(), base_dir=base_dir, cache_dir=cache_dir
        )
        self._backend: InferenceBackend | None = None
        self._report: LoadReport | None = None
        self._requests: dict[str, tuple[tuple[Request, ...], ...]] = {}
        self._phase: str | None = None

    def lease(self, gpu_ids: tuple[str, ...] = ()) -> Leased:
        """Where this host runs and which GPUs the scheduler gave it."""
        return Leased(node=self._config.host, hostname=socket.gethostname(), pid=os.getpid(), gpu_ids=gpu_ids)

    def load(self) -> Loaded:
        """Check the engine's arguments, load the model and say who serves it.

        Raises:
            LlemRayError: What the engine raised; any other exception becomes a LoadError with its text.
        """
        self._phase = "load"
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
        requests, steps, passes = self._measure(backend, work, sampling, begin_ns + ns_from_s(order.min_window_s))
        end_ns = self._guard(spans, order.guard_s)
        if order.cooldown_s:
            entered_ns = self._enter(spans, "cooldown")
            self._clock.sleep_until_ns(entered_ns + ns_from_s(order.cooldown_s))
        window = Window(node=self._config.host, begin_ns=begin_ns, end_ns=end_ns)
        return Completed(window=window, spans=spans.finish(), requests=requests, steps=steps, passes=passes)

    def _measure(
        self, backend: InferenceBackend, work: tuple[tuple[Request, ...], ...], sampling: SamplingSpec, until_ns: int
    ) -> tuple[tuple[RequestRecord, ...], int, int]:
        """Whole passes over the workload until the window is long enough."""
        requests: list[RequestRecord] = []
        steps = passes = 0
        while True:
            for batch in work:
                for event in backend.run(batch, sampling):
                    if isinstance(event, StepEvent):
                        steps += 1
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
                prompts=load_prompts(workload.prompts, self._base_dir),
                special_token_ids=self._report.special_token_ids,
            )
            if sum(map(_tokens, self._requests.values())) > KEPT_TOKENS:
                self._requests.clear()
            self._requests[key] = tuple(batches(requests, workload.batch_size))
        return self._requests[key]

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


def _tokens(work: tuple[tuple[Request, ...], ...]) -> int:
    return sum(len(request.prompt_token_ids) for batch in work for request in batch)
