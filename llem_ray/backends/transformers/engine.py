"""A loaded transformers model. Importing this module imports torch and transformers; the backend does so when it loads."""

from __future__ import annotations

import contextlib
import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
import transformers

from llem_ray.backends.batch_checks import require_valid
from llem_ray.backends.flop_formula import flop_model
from llem_ray.backends.host_memory import host_limit_bytes
from llem_ray.backends.memory_need import require_fit
from llem_ray.backends.model_config import (
    context_tokens,
    count_parameters,
    first_line,
    load_error,
    quieten,
    read_model_config,
)
from llem_ray.backends.model_source import ModelSource, model_commit
from llem_ray.backends.quantized_bits import weight_bits
from llem_ray.backends.tokenizer import encode_chats, find_tokenizer, special_token_ids
from llem_ray.backends.transformers.arguments import TransformersArgs, check_shape
from llem_ray.backends.transformers.decoding import PaddedBatch, generate_batch
from llem_ray.backends.transformers.forwarding import Forwarding
from llem_ray.backends.transformers.loading import build_model, eos_token_ids, weight_bytes
from llem_ray.backends.transformers.memory import BatchMemory, HostMemory, estimate_batch_memory
from llem_ray.backends.transformers.serving import Server
from llem_ray.core.backend import BackendConfig, ChatMessage, LoadReport, LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.errors import BackendError, DeviceMemoryError, GenerationError, LlemRayError, LoadError, NumericsError
from llem_ray.core.spec import SamplingSpec

if TYPE_CHECKING:
    from llem_ray.backends.transformers.replica import Replica

WARM_PROMPT_TOKENS = 8
WARM_STEPS = 2
CLOSE_S = 10.0
"""How long ``close`` waits for a step of continuous batching."""

ENGINE_ERRORS = (RuntimeError, MemoryError, ValueError, TypeError, IndexError)
"""What model code raises; anything else is a defect of ours."""
OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "out of memory", "not enough memory")
"""What torch's plain RuntimeErrors of the CPU allocator and of CUDA libraries say."""


class Engine:
    """A model, or one rank's share of it, and its tokenizer on one device.

    Args:
        model: Ready for inference.
        tokenizer: Of transformers.
        threads_before: CPU threads of torch before this engine was loaded; set again by ``close``.
        replica: The other ranks that share the model, or None where this process has all of it.
        forwarding: How steps of a batch are computed.
        server: For requests that come one by one, or None.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        threads_before: int,
        replica: Replica | None = None,
        forwarding: Forwarding | None = None,
        server: Server | None = None,
    ) -> None:
        self._forwarding = forwarding or Forwarding(model)
        self._server = server
        self._replica = replica
        self._threads_before = threads_before
        self._model = model
        self._tokenizer = tokenizer
        self._vocab_size = int(model.config.get_text_config().vocab_size)
        self._context_tokens = context_tokens(model.config)
        self._eos_token_ids = eos_token_ids(model)
        self._host_memory = HostMemory()
        self._needs: dict[tuple[int, int, int, bool], BatchMemory | None] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, nothing cut."""
        return [list(ids) for ids in self._tokenizer(list(texts), add_special_tokens=True)["input_ids"]]

    def encode_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        """Token ids of each chat by the model's own template."""
        return encode_chats(self._tokenizer, chats)

    def require_valid(self, requests: Sequence[Request]) -> None:
        """Refuse what the model cannot serve.

        Raises:
            GenerationError: A request is wrong, or there are none.
        """
        require_valid(requests, vocab_size=self._vocab_size, context_tokens=self._context_tokens)

    def run(self, requests: Sequence[Request], sampling: SamplingSpec) -> Iterator[StepEvent | RequestRecord]:
        """See ``InferenceBackend.run``, without a schedule."""
        self.require_valid(requests)
        if self._server is not None:
            self._server.drop()
            self._server.require_usable()
        need = self._memory(requests)
        if need is not None and self._model.device.type == "cpu":
            self._host_memory.require(need.total_bytes, f"a batch of {len(requests)} requests", need.arithmetic)
        with self._replica.batch() if self._replica is not None else contextlib.nullcontext():
            try:
                yield from generate_batch(
                    self._model,
                    requests,
                    sampling,
                    self._eos_token_ids,
                    self._context_tokens - 1,
                    self._replica,
                    self._forwarding,
                )
            except BackendError:
                raise
            except ENGINE_ERRORS as error:
                failure = _failure(error, len(requests), need)
                self._forwarding.release()
                free_after(error)
                raise failure from error

    def serve(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule
    ) -> Iterator[StepEvent | RequestRecord]:
        """See ``InferenceBackend.run``, with a schedule."""
        if self._server is None:
            raise GenerationError("the model was not loaded for requests that come one by one")
        self.require_valid(requests)
        self._forwarding.release()
        try:
            yield from self._server.run(requests, sampling, schedule)
        except BackendError:
            raise
        except ENGINE_ERRORS as error:
            failure = _failure(error, len(requests), None)
            free_after(error)
            raise failure from error

    def follow(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, chosen: Callable[[], Sequence[int] | None]) -> None:
        """Compute this rank's share of a batch that another rank leads.

        Args:
            prompts: Token ids of each row.
            max_new_tokens: Steps the batch may take.
            chosen: Waits for the tokens of the last step; None when there is no further one.

        Raises:
            DeviceMemoryError: It does not fit here.
            GenerationError: The engine failed.
        """
        try:
            batch = PaddedBatch(self._model, prompts, max_new_tokens, self._context_tokens - 1, self._forwarding)
            batch.forward()
            while (tokens := chosen()) is not None:
                batch.feed(tokens)
                batch.forward()
            if self._model.device.type == "cuda":
                torch.cuda.synchronize(self._model.device)  # what went wrong there is raised here
        except ENGINE_ERRORS as error:
            failure = _failure(error, len(prompts), None)
            free_after(error)
            raise failure from error

    def warm(self) -> None:
        """One short batch, so that the first measured one meets libraries that have been set up."""
        steps = min(WARM_STEPS, self._context_tokens - 1)
        if steps < 1:
            return
        prompt = [index % self._vocab_size for index in range(min(WARM_PROMPT_TOKENS, self._context_tokens - steps))]
        request = Request(request_id="warm", prompt_token_ids=tuple(prompt), max_new_tokens=steps)
        with contextlib.suppress(NumericsError):  # a trial will report it
            for _ in self.run([request], SamplingSpec()):
                pass
            if self._server is not None:
                for _ in self.serve([request], SamplingSpec(), LoadSchedule(max_in_flight=1)):
                    pass
                self._server.pause()

    def release_memory(self) -> None:
        """Give memory that nothing uses any more back to the device."""
        self._forwarding.release()
        if self._server is not None:
            self._server.pause()
        release_memory()

    def notes(self) -> dict[str, str]:
        """Of the load report."""
        notes = self._server.notes() if self._server is not None else {}
        if places := getattr(self._model, "hf_device_map", None):
            devices = dict.fromkeys(str(place) for place in places.values())
            notes["device_map"] = ", ".join(devices)
        return notes

    def close(self) -> None:
        """Drop the model and give its memory back to the device."""
        if self._server is not None:
            self._server.drop(CLOSE_S)
        self._forwarding.close()
        del self._model, self._tokenizer, self._forwarding, self._server
        torch.set_num_threads(self._threads_before)
        release_memory()

    def _memory(self, requests: Sequence[Request]) -> BatchMemory | None:
        rows = len(requests)
        prompt_tokens = max(len(request.prompt_token_ids) for request in requests)
        new_tokens = max(request.max_new_tokens for request in requests)
        eager = self._model.config._attn_implementation == "eager"
        size = rows, prompt_tokens, new_tokens, eager
        if size not in self._needs:
            self._needs[size] = estimate_batch_memory(
                self._model.config.get_text_config(),
                rows=rows,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                element_bytes=self._model.dtype.itemsize,
                eager=eager,
            )
        return self._needs[size]


def load_engine(
    config: BackendConfig, source: ModelSource, args: TransformersArgs, import_s: float, replica: Replica | None = None
) -> tuple[Engine, LoadReport]:
    """Load model and tokenizer, run a short batch, and report. A rank that is led runs none: it is not told to yet.

    Raises:
        LoadError: One of them could not be loaded.
        DeviceMemoryError: The device is too small.
    """
    quieten()
    begin_s = time.monotonic()
    device = find_device(config)
    threads_before = torch.get_num_threads()
    engine: Engine | None = None
    try:
        model_config = read_model_config(source, config.model)
        check_shape(config.engine, model_config.get_text_config().to_dict())
        require_fit(config, model_config.to_dict(), _memory_bytes(device), random=source.random)
        tokenizer, origin = find_tokenizer(config, source, model_config)
        shared = replica is not None and device.type == "cpu"
        if threads := args.num_threads or (replica.cpu_threads if replica is not None and shared else None):
            torch.set_num_threads(threads)
        if replica is None:
            model = build_model(config, source, args, model_config, device)
        else:
            model = replica.build(source, args, model_config)
        engine = Engine(
            model,
            tokenizer,
            threads_before,
            replica if replica is not None and replica.circle.members else None,
            Forwarding(model, static=args.static_cache, compiled=args.compile),
            Server(model, args.online, eos_token_ids(model), args.step_timeout_s) if config.online else None,
        )
        constructed_s = time.monotonic()
        leads = replica is None or replica.layout.place == 0
        warm_s, compile_s = _warm(engine, compiled=args.compile is not None) if leads else (0.0, None)
    except Exception as error:  # model code of third parties may raise anything; here it becomes one typed error
        if engine is not None:
            engine.close()
        if isinstance(error, GenerationError):
            raise LoadError(f"the model does not run: {error.message}", error.hint) from error
        if isinstance(error, LlemRayError):
            raise
        free_after(error)
        if is_out_of_memory(error):
            raise DeviceMemoryError(f"the model does not fit: {first_line(error)}") from error
        what = (
            f"hub model {source.location!r} (no folder has that name)" if source.kind == "hub" else f"model {source.location!r}"
        )
        raise load_error(what, error) from error
    return engine, LoadReport(
        import_s=import_s,
        construct_s=constructed_s - begin_s,
        compile_s=compile_s,
        warm_s=warm_s,
        context_tokens=context_tokens(model.config),
        vocab_size=int(model.config.get_text_config().vocab_size),
        parameters=model.num_parameters() if replica is None else _count(config, model_config, model),
        weight_bytes=weight_bytes(model) if replica is None else replica.weight_bytes,
        dtype=str(model.dtype).removeprefix("torch."),
        device=device.type,
        model_commit=model_commit(source, model_config),
        random_weights=source.random,
        special_token_ids=special_token_ids(tokenizer),
        notes=_notes(model, source, origin) | _extras(args, config, model) | engine.notes(),
        flop_model=flop_model(model.config.get_text_config()),
    )


def _warm(engine: Engine, *, compiled: bool) -> tuple[float, float | None]:
    """Run a short batch; seconds of that, and of compilation: the first such batch less another one."""
    begin_s = time.monotonic()
    engine.warm()
    first_s = time.monotonic() - begin_s
    if not compiled:
        return first_s, None
    engine.warm()
    again_s = time.monotonic() - begin_s - first_s
    return again_s, max(0.0, first_s - again_s)


def gpu_uuids(config: BackendConfig, *, spread: bool) -> list[str]:
    """NVML's UUIDs of the devices the engine runs on.

    Args:
        config: Of this process.
        spread: Layers may be on every visible device.
    """
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if spread else [find_device(config)]
    return [f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in devices]


def free_after(error: BaseException) -> None:
    """Free what the frames of a failed call still hold, so that the next batch finds the memory."""
    traceback.clear_frames(error.__traceback__)
    release_memory()


def release_memory() -> None:
    """Give memory that nothing uses any more back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of device or host memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)


def _failure(error: Exception, rows: int, need: BatchMemory | None) -> BackendError:
    if is_out_of_memory(error):
        arithmetic = f" (estimate: {need.arithmetic})" if need is not None else ""
        return DeviceMemoryError(f"a batch of {rows} requests does not fit: {first_line(error)}{arithmetic}")
    return GenerationError(f"the engine failed: {first_line(error)}")


def find_device(config: BackendConfig) -> torch.device:
    """The device of this process: the first visible one, or the one of its number on this host where it sees several.

    Raises:
        LoadError: There is none.
    """
    if config.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LoadError(
            f"the engine is to run on CUDA, but torch {torch.__version__} sees no CUDA device",
            "set `engine.device: cpu`, or install a CUDA build of torch and check `nvidia-smi`",
        )
    number, visible = config.rendezvous.local_rank if config.rendezvous is not None else 0, torch.cuda.device_count()
    if visible > 1 and number >= visible:
        raise LoadError(f"process {number} of this host has no GPU of its own: {visible} are visible")
    return torch.device("cuda", number if visible > 1 else 0)


def _memory_bytes(device: torch.device) -> int:
    """All memory of the device."""
    return host_limit_bytes() if device.type == "cpu" else int(torch.cuda.get_device_properties(device).total_memory)


def _count(config: BackendConfig, model_config: Any, share: Any) -> int:
    adapter = sum(parameter.numel() for name, parameter in share.named_parameters() if ".lora_" in name)
    return count_parameters(model_config, trust_remote_code=config.model.trust_remote_code) + adapter


def _notes(model: Any, source: ModelSource, tokenizer_origin: str) -> dict[str, str]:
    return {
        "engine": f"transformers {transformers.__version__}",
        "torch": str(torch.__version__),  # a TorchVersion would make whoever unpickles the report import torch
        "attention": model.config._attn_implementation,
        "model": source.location,
        "tokenizer": tokenizer_origin,
        "threads": str(torch.get_num_threads()),
    }


def _extras(args: TransformersArgs, config: BackendConfig, model: Any) -> dict[str, str]:
    extras: dict[str, str] = {}
    method, _ = weight_bits(model.config.to_dict(), config.model)  # a checkpoint may be quantised already
    if method is not None:
        extras["quantization"] = method
    if config.model.quantization is not None:
        extras["bitsandbytes"] = version("bitsandbytes")
    if args.lora is not None:
        kind = "random" if args.lora.path is None else args.lora.path
        extras["lora"] = f"{kind}{', merged' if args.merge_lora else ''}; peft {version('peft')}"
    if args.static_cache:
        extras["cache"] = "static"
    if args.compile is not None:
        extras["compile"] = f"decode steps, {args.compile.backend}, {args.compile.mode}"
    return extras
