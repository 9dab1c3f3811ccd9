"""Holds one engine with its loaded model and runs many trials on it. A plain class: Ray makes an actor of it."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Literal, cast

from llem_ray.core.backend import (
    BackendConfig,
    FollowerBackend,
    InferenceBackend,
    LoadReport,
    LoadSchedule,
    ModelOutlook,
    Rendezvous,
    Request,
    RequestRecord,
    Reservation,
    StepEvent,
)
from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.conversation import Histories, completed_record
from llem_ray.core.energy import Window
from llem_ray.core.errors import ConfigError, GenerationError, LlemRayError, LoadError
from llem_ray.core.outcome import Completed, Failed, Outcome, WarmupReport, failed_from
from llem_ray.core.plan import LoadGroup
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec
from llem_ray.core.step_log import StepLog
from llem_ray.core.units import ns_from_s
from llem_ray.core.workload_spec import WorkloadSpec
from llem_ray.execution.calls import Leased, Loaded, PowerSeen, TrialOrder, WarmupProgress
from llem_ray.execution.engines import make_backend, serves_online, worker_layout
from llem_ray.execution.online import OnlineOrder, run_online
from llem_ray.execution.spans import SpanLog
from llem_ray.execution.warmup import WarmupTalk, warm_up
from llem_ray.power.host import host_id
from llem_ray.workloads.online import OnlineWork, build_online
from llem_ray.workloads.prompts import batches, build_requests
from llem_ray.workloads.sources import Sources

KEPT_TOKENS = 2_000_000
"""Prompt tokens of other cells that are kept for their repeats; about 36 bytes each."""
LOOK_AHEAD_S = 60.0
"""How long workloads are looked at before the load: the gang's other processes wait meanwhile, by a deadline of their own."""


class EngineHost:
    """One gang's engine.

    Args:
        model: The model to load.
        engine: The engine to load it with.
        gpus: Whole GPUs that were leased for it.
        base_dir: Folder that relative paths of the sweep start from.
        cache_dir: Writable folder for what we build ourselves; None: this host's own, see ``host_cache_dir``.
        clock: The node's monotonic clock.
        sources: What workloads read from files and data sets, where that was done elsewhere; the rest is read here.
        online: Its trials send requests one by one.
        unsure: Workloads that may turn out to be too long for the model: they are looked at before weights are loaded.
        all_unsure: Its trials have no others: where all are refused nothing is loaded.
    """

    def __init__(
        self,
        model: ModelSpec,
        engine: EngineSpec,
        gpus: int,
        base_dir: str,
        cache_dir: str | None,
        clock: Clock | None = None,
        sources: Sources | None = None,
        *,
        online: bool = False,
        unsure: Sequence[WorkloadSpec] = (),
        all_unsure: bool = True,
    ) -> None:
        self._clock = clock or SystemClock()
        self._base_dir = base_dir
        self._sources = sources or Sources(base_dir)
        on_gpu = engine.device == "cuda" or (engine.device == "auto" and gpus > 0)
        device: Literal["cpu", "cuda"] = "cuda" if on_gpu else "cpu"
        self._config = BackendConfig(
            model=model,
            engine=engine,
            device=device,
            host=host_id(),
            base_dir=base_dir,
            cache_dir=cache_dir or str(host_cache_dir()),
            online=online,
        )
        self._unsure, self._all_unsure = tuple(unsure), all_unsure
        self._backend: InferenceBackend | None = None
        self._model: LoadReport | ModelOutlook | None = None
        self._refused: dict[str, ConfigError] = {}
        self._requests: dict[str, tuple[tuple[Request, ...], ...]] = {}
        self._online: dict[str, OnlineWork] = {}
        self._phase: str | None = None
        self._talk: WarmupTalk | None = None

    def lease(self) -> Leased:
        """Where this host runs."""
        return Leased(node=self._config.host, hostname=socket.gethostname(), pid=os.getpid(), gpu_ids=())

    def load(self, rendezvous: Rendezvous | None = None) -> Loaded:
        """Check the engine's arguments, load the model and say who serves it.

        Args:
            rendezvous: Where this process meets the others of its gang; None when it is alone.

        Raises:
            ConfigError: None of the workloads that were unsure suits the model, and there are no others. Nothing was loaded.
            LlemRayError: What the engine raised; any other exception becomes a LoadError with its text.
        """
        self._phase = "load"
        self._config = replace(self._config, rendezvous=rendezvous)
        try:
            backend = self._backend = make_backend(self._config)
            backend.check()
            if rendezvous is None or rendezvous.rank == 0:
                self._look_ahead(backend)
            report = backend.load()
            if _sizes(report) != _sizes(self._model):
                self._requests.clear()
                self._online.clear()
            self._model = report
            return Loaded(report=report, ranks=backend.identity(), refused=tuple(self._refused.values()))
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

    def tell_warmup(self, trial_id: str, attempt: int, seen: PowerSeen | None) -> WarmupProgress:
        """Take what was seen of power while an attempt warms up; how far it is. May be called while ``run`` runs."""
        talk = self._talk
        return WarmupProgress() if talk is None else talk.tell(trial_id, attempt, seen)

    def close(self) -> None:
        """Unload the model."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def _look_ahead(self, backend: InferenceBackend) -> None:
        """Make the requests of unsure workloads, while they are kept and there is time; those that cannot be made are refused.

        Raises:
            ConfigError: That leaves none of the trials.
        """
        tell = getattr(backend, "outlook", None)
        self._model = tell() if tell is not None and self._unsure else None
        if self._model is None:
            return
        made, deadline_ns = 0, self._clock.monotonic_ns() + ns_from_s(LOOK_AHEAD_S)
        for workload in self._unsure:
            if made > KEPT_TOKENS or self._clock.monotonic_ns() > deadline_ns:
                return
            try:
                work = (self._online_work(workload).requests,) if workload.load.online else self._work(workload)
            except ConfigError as error:
                self._refused[_key(workload)] = error
            else:
                made += _tokens(work)
        if self._all_unsure and len(self._refused) == len(self._unsure):
            first, *others = self._refused.values()
            if others:
                more = f"; so it is with {len(others)} other workload{'s' if len(others) > 1 else ''} of this model"
                raise type(first)(first.message + more, *first.args[1:])
            raise first

    def _run(self, order: TrialOrder, spans: SpanLog) -> Outcome:
        if self._backend is None:
            raise GenerationError("no model is loaded")
        backend, sampling = self._backend, order.experiment.sampling
        if order.experiment.workload.load.online:
            return self._run_online(backend, order, spans)
        work = self._work(order.experiment.workload)
        warmup = self._warm_up(backend, order, spans, work, None)
        self._guard(spans, order.guard_s)
        begin_ns = self._enter(spans, "measured")
        log = StepLog() if order.record_steps else None
        requests, steps, passes = self._measure(backend, work, sampling, begin_ns + ns_from_s(order.min_window_s), log)
        end_ns = self._guard(spans, order.guard_s)
        self._cool_down(spans, order.cooldown_s)
        window = Window(node=self._config.host, begin_ns=begin_ns, end_ns=end_ns)
        return Completed(
            window=window,
            spans=spans.finish(),
            requests=requests,
            steps=steps,
            passes=passes,
            step_log=log,
            warmup=warmup,
        )

    def _run_online(self, backend: InferenceBackend, order: TrialOrder, spans: SpanLog) -> Completed:
        """Requests one by one: the phase ``measured`` is the whole run, the window a part of it."""
        workload, sampling = order.experiment.workload, order.experiment.sampling
        work = self._online_work(workload)
        warmup = self._warm_up(backend, order, spans, work.warmup, LoadSchedule())
        self._guard(spans, order.guard_s)
        begin_ns = self._enter(spans, "measured")
        asked = OnlineOrder(
            work=work, sampling=sampling, load=workload.load, window=order.window, min_window_s=order.min_window_s
        )
        log = StepLog() if order.record_steps else None
        ran = run_online(backend, asked, self._config.host, begin_ns, self._clock, log)
        self._guard(spans, order.guard_s)
        self._cool_down(spans, order.cooldown_s)
        return Completed(
            window=ran.window,
            spans=spans.finish(),
            requests=ran.requests,
            steps=ran.steps,
            passes=1,
            step_log=log,
            warmup=warmup,
            online=ran.online,
        )

    def _warm_up(
        self,
        backend: InferenceBackend,
        order: TrialOrder,
        spans: SpanLog,
        work: Sequence[tuple[Request, ...]],
        schedule: LoadSchedule | None,
    ) -> WarmupReport | None:
        report, spec = None, order.warmup
        if spec.batches or spec.min_s or spec.until_cv is not None:
            self._enter(spans, "warmup")
            talk = self._talk = WarmupTalk(order.trial_id, order.attempt) if order.no_power is None else None
            report = warm_up(spec, work, lambda batch: backend.run(batch, order.experiment.sampling, schedule), self._clock, talk)
            if talk is not None:
                talk.finish()
            if spec.until_cv is not None:
                report = replace(report, no_power=order.no_power)
        backend.reset()  # of an earlier trial too, where nothing warms up
        return report

    def _cool_down(self, spans: SpanLog, cooldown_s: float) -> None:
        if cooldown_s:
            entered_ns = self._enter(spans, "cooldown")
            self._clock.sleep_until_ns(entered_ns + ns_from_s(cooldown_s))

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
        histories = Histories(request for batch in work for request in batch)
        steps = passes = 0
        while True:
            for batch in work:
                asked = {request.request_id: histories.ask(request) for request in batch}
                for event in backend.run(tuple(asked.values()), sampling):
                    if isinstance(event, StepEvent):
                        steps += 1
                        if log is not None:
                            log.add(event)
                    else:
                        histories.answer(event.request_id, event.output_token_ids)
                        requests.append(completed_record(event, asked[event.request_id], passes))
            passes += 1
            if self._clock.monotonic_ns() >= until_ns:
                return tuple(requests), steps, passes

    def _work(self, workload: WorkloadSpec) -> tuple[tuple[Request, ...], ...]:
        """The workload's batches as token ids; repeats of a cell reuse them."""
        key = self._admit(workload)
        if key not in self._requests:
            assert self._backend is not None
            assert self._model is not None
            requests = build_requests(
                self._sources.resolved(workload),
                encode=self._backend.encode,
                vocab_size=self._model.vocab_size,
                context_tokens=self._model.context_tokens,
                prompts=self._sources.prompts(workload),
                special_token_ids=self._model.special_token_ids,
                encode_chats=getattr(self._backend, "encode_chats", None),
            )
            if sum(map(_tokens, self._requests.values())) > KEPT_TOKENS:
                self._requests.clear()
            self._requests[key] = tuple(batches(requests, workload.batch_size))
        return self._requests[key]

    def _online_work(self, workload: WorkloadSpec) -> OnlineWork:
        """What an online workload sends; repeats of a cell reuse it."""
        key = self._admit(workload)
        if key not in self._online:
            assert self._backend is not None
            assert self._model is not None
            if sum(_tokens((work.requests,)) for work in self._online.values()) > KEPT_TOKENS:
                self._online.clear()
            self._online[key] = build_online(
                self._sources.resolved(workload),
                encode=self._backend.encode,
                vocab_size=self._model.vocab_size,
                context_tokens=self._model.context_tokens,
                prompts=self._sources.prompts(workload),
                special_token_ids=self._model.special_token_ids,
                encode_chats=getattr(self._backend, "encode_chats", None),
                trace=self._sources.trace(workload.load.trace),
            )
        return self._online[key]

    def _admit(self, workload: WorkloadSpec) -> str:
        """Key of its requests.

        Raises:
            ConfigError: It was refused before the load.
        """
        key = _key(workload)
        if key in self._refused:
            raise self._refused[key]
        return key

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
        ConfigError: An engine argument, a model or an interpreter is wrong, or an engine for batches is to serve online.
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
        online=group.online,
        rendezvous=None if alone else _pretended(engine),
    )
    if group.online and serves_online(engine) is False:
        raise ConfigError(
            f"{engine.backend} runs batches only: it does not take requests one by one",
            "name an engine that serves online, or leave workload.load out",
            field="workload.load.pattern",
            found=group.experiment.workload.load.pattern,
            allowed="batch",
        )
    backend = make_backend(config)
    try:
        backend.check()
    finally:
        backend.close()


def _pretended(engine: EngineSpec) -> Rendezvous | None:
    """What the first of a gang's processes is told, before there is a gang; None where it is the only one."""
    layout = worker_layout(engine)
    size = engine.nodes or 1 if layout == "host" else engine.world_size
    if size == 1:
        return None
    me = host_id()
    return Rendezvous(
        rank=0,
        world_size=size,
        local_rank=0,
        hosts=(me,) * size,
        master_addr="127.0.0.1",
        master_port=1,
        node_addr="127.0.0.1",
        reservation=Reservation(ray_version=_installed("ray"), python_version=platform.python_version())
        if layout == "ray"
        else None,
    )


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _key(workload: WorkloadSpec) -> str:
    return json.dumps(asdict(workload), sort_keys=True)


def _sizes(model: LoadReport | ModelOutlook | None) -> tuple[object, ...]:
    """What requests depend on."""
    return () if model is None else (model.context_tokens, model.vocab_size, tuple(model.special_token_ids))


def _tokens(work: tuple[tuple[Request, ...], ...]) -> int:
    return sum(len(request.prompt_token_ids) for batch in work for request in batch)
