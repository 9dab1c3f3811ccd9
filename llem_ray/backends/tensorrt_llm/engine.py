"""A loaded TensorRT-LLM engine. Importing this module imports TensorRT-LLM and torch; the backend does so when it checks."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what third-party modules say about each other is not ours to pass on
    import tensorrt_llm
    from tensorrt_llm import SamplingParams

from llem_ray.backends.batch_checks import require_valid
from llem_ray.backends.flop_formula import flop_model
from llem_ray.backends.model_config import UNLIMITED_CONTEXT_TOKENS, first_line, known_parameters, load_error
from llem_ray.backends.model_source import ModelSource, model_commit
from llem_ray.backends.quantized_bits import weight_bits
from llem_ray.backends.tensorrt_llm import workers
from llem_ray.backends.tensorrt_llm.arguments import cache_arguments, own_args, reads_stats, sampling_arguments
from llem_ray.backends.tensorrt_llm.iteration_stats import steps_of
from llem_ray.backends.tensorrt_llm.preparing import Prepared, end_token_ids
from llem_ray.backends.tensorrt_llm.ray_workers import RayWorkers, start_llm
from llem_ray.backends.tensorrt_llm.serving import Stream
from llem_ray.backends.tensorrt_llm.settings import runs_in_this_process
from llem_ray.backends.tensorrt_llm.waiting import EventLoop, within
from llem_ray.backends.tensorrt_llm.workers import MpiWorkers
from llem_ray.backends.tokenizer import encode_chats, find_tokenizer, special_token_ids
from llem_ray.core.backend import BackendConfig, ChatMessage, LoadReport, LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.errors import BackendError, DeviceMemoryError, EngineDied, GenerationError, LlemRayError, LoadError
from llem_ray.core.spec import SamplingSpec

LOG: Final = logging.getLogger(__name__)

WARM_PROMPT_TOKENS: Final = 8
WARM_NEW_TOKENS: Final = 2

STATS_TIMEOUT_S: Final = 60.0
SHUTDOWN_S: Final = 6.0

OUT_OF_MEMORY_TEXTS: Final = ("out of memory", "insufficient gpu memory", "cudaerrormemoryallocation", "not enough memory")


class Engine:
    """TensorRT-LLM's LLM object with its workers, and the model's tokenizer.

    Args:
        llm: TensorRT-LLM's.
        config: Model, engine and device.
        prepared: What was validated.
        tokenizer: Of transformers.
        crew: The workers of ``llm``.
    """

    def __init__(
        self, llm: Any, config: BackendConfig, prepared: Prepared, tokenizer: Any, crew: MpiWorkers | RayWorkers
    ) -> None:
        self._llm, self._tokenizer, self.crew = llm, tokenizer, crew
        self._step_timeout_s, self._stats_wait_s = own_args(config).step_timeout_s, own_args(config).stats_wait_s
        self._reads_stats = reads_stats(config)
        self._overlapped = own_args(config).backend == "pytorch" and not prepared.arguments.get("disable_overlap_scheduler")
        self._end_token_ids = end_token_ids(prepared, config)
        cache = config.engine.engine_args.get("kv_cache_config") or {}
        self.reuses_blocks = bool(cache_arguments(cache)["enable_block_reuse"])
        self.context_tokens = int(prepared.arguments.get("max_seq_len") or UNLIMITED_CONTEXT_TOKENS)
        self.vocab_size = int(prepared.model_config.get_text_config().vocab_size)
        self.ranks = crew.ranks
        self.stats_problem: str | None = None
        self._epoch = 0
        self._broken: str | None = None
        self._loop = EventLoop()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, nothing cut."""
        return [list(ids) for ids in self._tokenizer(list(texts), add_special_tokens=True)["input_ids"]]

    def encode_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        """Token ids of each chat by the model's own template."""
        return encode_chats(self._tokenizer, chats)

    def run(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule | None
    ) -> Iterator[StepEvent | RequestRecord]:
        """See ``InferenceBackend.run``. Steps come after the run: the engine tells of them late."""
        if self._broken is not None:
            raise EngineDied(f"the engine can serve no more: {self._broken}")
        require_valid(requests, vocab_size=self.vocab_size, context_tokens=self.context_tokens)

        def submit(request: Request, row: int) -> Any:
            params = SamplingParams(**sampling_arguments(request, sampling, row, self._end_token_ids))
            salt = {"cache_salt": f"llem-ray-{self._epoch}"} if self.reuses_blocks else {}
            return self._llm.generate_async(list(request.prompt_token_ids), params, streaming=True, **salt)

        stream = Stream(self._loop, submit, requests, schedule or LoadSchedule(), self._step_timeout_s, self._require_workers)
        try:
            if schedule is not None:
                yield from self._online(stream, requests)
            else:
                records = list(stream.records())
                yield from self._steps(stream, requests, records)
                order = {request.request_id: index for index, request in enumerate(requests)}
                yield from sorted(records, key=lambda record: order[record.request_id])
        except BackendError:
            raise
        except Exception as error:  # the library raises plain exceptions of every kind
            if is_out_of_memory(error):
                raise DeviceMemoryError(f"a run of {len(requests)} requests does not fit: {first_line(error)}") from error
            self._require_workers()
            raise GenerationError(f"TensorRT-LLM failed: {first_line(error)}") from error
        finally:
            if not stream.usable and self._broken is None:
                self._broken = "requests that were given up did not end"

    def warm(self) -> None:
        """One short request, outside of the event loop: the library then keeps statistics where a thread can wait for them."""
        new_tokens = min(WARM_NEW_TOKENS, self.context_tokens - 1)
        prompt = tuple(index % self.vocab_size for index in range(min(WARM_PROMPT_TOKENS, self.context_tokens - new_tokens)))
        request = Request(request_id="warm", prompt_token_ids=prompt, max_new_tokens=new_tokens)
        params = SamplingParams(**sampling_arguments(request, SamplingSpec(), 0, ()))
        within(self._step_timeout_s, "the first request", lambda: self._llm.generate(list(prompt), params, use_tqdm=False))
        if self._reads_stats:
            self._try_stats()

    def _try_stats(self) -> None:
        """Whether they can be read under the Ray orchestrator is not known: releases differ."""
        try:
            self._get_stats()
        except Exception as problem:
            if not isinstance(self.crew, RayWorkers):
                raise
            self._reads_stats = False
            self.stats_problem = first_line(problem)

    def reset(self) -> None:
        """Prefixes cached so far belong to the past: later requests carry another salt. Raises once the engine is broken."""
        if self._broken is not None:
            raise GenerationError(f"the engine can serve no more: {self._broken}")
        self._epoch += 1

    def close(self) -> None:
        """End the workers, free the devices; bounded in time."""
        self._loop.stop()
        shut_down(self._llm)
        self.crew.end()
        del self._llm, self._tokenizer
        if self.crew.in_this_process:
            release_memory()

    def _online(self, stream: Stream, requests: Sequence[Request]) -> Iterator[StepEvent | RequestRecord]:
        records = []
        for record in stream.records():
            records.append(record)
            yield record
        yield from self._steps(stream, requests, records)

    def _steps(self, stream: Stream, requests: Sequence[Request], records: Sequence[RequestRecord]) -> list[StepEvent]:
        """Steps that account for every token of the run; none, with a line in the log, where the statistics do not."""
        if not self._reads_stats:
            return []
        try:
            return steps_of(
                self._get_stats(),
                begin_ns=stream.begin_ns,
                end_ns=max(record.token_times_ns[-1] for record in records),
                wall=datetime.now(),
                now_ns=time.monotonic_ns(),
                overlapped=self._overlapped,
                prompt_tokens=sum(len(request.prompt_token_ids) for request in requests),
                output_tokens=sum(record.output_tokens for record in records),
                prompts_may_be_cached=self.reuses_blocks,
            )
        except Exception as problem:  # noqa: BLE001 - the answers must not be lost for the sake of their steps
            LOG.warning("no steps are recorded for a run of %d requests: %s", len(requests), problem)
            return []

    def _get_stats(self) -> list[Any]:
        return list(within(STATS_TIMEOUT_S, "iteration statistics", lambda: self._llm.get_stats(timeout=self._stats_wait_s)))

    def _require_workers(self) -> None:
        gone = self.crew.gone()
        if gone is not None:
            self._broken = f"the process of worker {gone} ended"
            log = "Ray's log of that worker" if isinstance(self.crew, RayWorkers) else "the engine's log"
            raise EngineDied(f"TensorRT-LLM's worker {gone} of {len(self.ranks)} ended", f"its last words are in {log}")


def load_engine(config: BackendConfig, prepared: Prepared, import_s: float) -> tuple[Engine, LoadReport]:
    """Start the workers, load the model, run a short request, and report.

    Raises:
        LoadError: It could not be loaded.
        DeviceMemoryError: The device is too small.
    """
    begin_s = time.monotonic()
    source = prepared.source
    before = workers.descendants()
    reservation = config.rendezvous.reservation if config.rendezvous is not None else None
    llm: Any = None
    engine: Engine | None = None
    try:
        tokenizer, origin = find_tokenizer(config, source, prepared.model_config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            crew: MpiWorkers | RayWorkers
            if reservation is not None:
                llm = start_llm(prepared.llm_class, prepared.arguments, reservation)
                crew = RayWorkers(llm, config)
            else:
                llm = prepared.llm_class(**prepared.arguments)
                uuids = [gpu.uuid for gpu in prepared.gpus[: config.engine.world_size]]
                crew = MpiWorkers(workers.descendants() - before, config.host, uuids)
            engine = Engine(llm, config, prepared, tokenizer, crew)
            constructed_s = time.monotonic()
            engine.warm()
    except Exception as error:  # the library and model code of third parties may raise anything
        if engine is not None:
            engine.close()
        else:
            shut_down(llm)
            workers.end(pid for pid in workers.descendants() - before if workers.is_alive(pid))
            if runs_in_this_process(config.engine.world_size):
                release_memory()
        raise _load_failure(source, error) from error
    finished_s = time.monotonic()
    parameters = known_parameters(prepared.model_config, trust_remote_code=config.model.trust_remote_code)
    return engine, LoadReport(
        import_s=import_s,
        construct_s=constructed_s - begin_s,
        compile_s=None,
        warm_s=finished_s - constructed_s,
        context_tokens=engine.context_tokens,
        vocab_size=engine.vocab_size,
        parameters=parameters,
        weight_bytes=_weight_bytes(prepared, parameters),
        dtype=prepared.dtype,
        device=config.device,
        model_commit=model_commit(source, prepared.model_config),
        random_weights=source.random,
        special_token_ids=special_token_ids(tokenizer),
        notes=_notes(engine, config, prepared, origin),
        flop_model=flop_model(prepared.model_config.get_text_config()),
    )


def shut_down(llm: Any) -> None:
    """Ask the library to end its workers, and wait ``SHUTDOWN_S`` for that."""
    if llm is not None:
        try:
            within(SHUTDOWN_S, "shutdown", llm.shutdown)
        except Exception as error:  # noqa: BLE001 - whatever it says, its processes are ended next
            LOG.warning("TensorRT-LLM did not shut down in good order: %s", error)


def release_memory() -> None:
    """Give back what a worker in this process held on the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device or the host was too small, said by the exception or one of its causes."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in text for part in OUT_OF_MEMORY_TEXTS):
            return True
        error = error.__cause__
    return False


def _load_failure(source: ModelSource, error: Exception) -> LlemRayError:
    if is_out_of_memory(error):
        return DeviceMemoryError(f"the model does not fit: {first_line(error)}")
    if isinstance(error, LlemRayError) and not isinstance(error, GenerationError):
        return error
    failure = load_error(f"model {source.location!r}", error)
    if "worker" in str(error).lower():
        return LoadError(failure.message, "the cause stands on standard error, or in Ray's log of the worker")
    return failure


def _weight_bytes(prepared: Prepared, parameters: int | None) -> int | None:
    """None for quantised weights, whose size only the library knows."""
    config, source = prepared.model_config, prepared.source
    quantised = getattr(config, "quantization_config", None) is not None
    if source.kind == "folder":
        quantised = quantised or Path(source.location, "hf_quant_config.json").exists()
    dtype = getattr(torch, prepared.dtype, None)
    return None if parameters is None or quantised or dtype is None else parameters * int(dtype.itemsize)


def _notes(engine: Engine, config: BackendConfig, prepared: Prepared, tokenizer_origin: str) -> dict[str, str]:
    cache = cache_arguments(config.engine.engine_args.get("kv_cache_config") or {})
    on_pytorch = own_args(config).backend == "pytorch"
    steps = "from the engine's statistics, read after each run" if reads_stats(config) else "none: iteration_stats is off"
    if engine.stats_problem is not None:
        steps = f"none: the statistics cannot be read: {engine.stats_problem}"
    notes = {
        "engine": f"tensorrt_llm {tensorrt_llm.__version__}",
        "torch": str(torch.__version__),
        "model": prepared.source.location,
        "tokenizer": tokenizer_origin,
        "tensorrt_llm_backend": "pytorch" if on_pytorch else "tensorrt",
        "orchestrator": "ray" if isinstance(engine.crew, RayWorkers) else "mpi",
        "workers": engine.crew.where,
        "prefix_caching": "on, reset between trials" if engine.reuses_blocks else "off",
        "kv_cache": ", ".join(f"{name}={value}" for name, value in sorted(cache.items())),
        "steps": steps,
        "numerics": "NaN and Inf logits are not detected by this engine",
    }
    method, _ = weight_bits(prepared.model_config.to_dict(), config.model)  # a checkpoint may be quantised already
    if method is not None:
        notes["quantization"] = method
    if on_pytorch:
        notes["allreduce_strategy"] = str(prepared.arguments.get("allreduce_strategy") or "AUTO")
    if prepared.source.random:
        notes["weights"] = "TensorRT-LLM's dummy weights: joules don't compare with other engines' or real weights"
    return notes
