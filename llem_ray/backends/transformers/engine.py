"""A loaded transformers model. Importing this module imports torch and transformers; the backend does so when it loads."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from llem_ray.backends.batch_checks import require_valid
from llem_ray.backends.model_config import context_tokens, first_line, load_error, quieten, read_model_config
from llem_ray.backends.model_source import ModelSource, model_commit
from llem_ray.backends.tokenizer import find_tokenizer, special_token_ids
from llem_ray.backends.transformers.arguments import TransformersArgs
from llem_ray.backends.transformers.decoding import PaddedBatch, generate_batch
from llem_ray.backends.transformers.loading import build_model, eos_token_ids
from llem_ray.backends.transformers.memory import BatchMemory, estimate_batch_memory, require_host_memory
from llem_ray.backends.transformers.sampling import NOT_FINITE, TokenSelector
from llem_ray.core.backend import BackendConfig, LoadReport, Request, RequestRecord, StepEvent
from llem_ray.core.errors import BackendError, DeviceMemoryError, GenerationError, LoadError
from llem_ray.core.spec import SamplingSpec

WARM_PROMPT_TOKENS = 8
WARM_STEPS = 2

OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "out of memory", "not enough memory")
"""What torch's plain RuntimeErrors of the CPU allocator and of CUDA libraries say."""


class Engine:
    """A model and its tokenizer on one device.

    Args:
        model: Ready for inference.
        tokenizer: Of transformers.
        threads_before: CPU threads of torch before this engine was loaded; set again by ``close``.
    """

    def __init__(self, model: Any, tokenizer: Any, threads_before: int) -> None:
        self._threads_before = threads_before
        self._model = model
        self._tokenizer = tokenizer
        self._vocab_size = int(model.config.get_text_config().vocab_size)
        self._context_tokens = context_tokens(model.config)
        self._eos_token_ids = eos_token_ids(model)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, nothing cut."""
        return [list(ids) for ids in self._tokenizer(list(texts), add_special_tokens=True)["input_ids"]]

    def run(self, requests: Sequence[Request], sampling: SamplingSpec) -> Iterator[StepEvent | RequestRecord]:
        """See ``InferenceBackend.run``."""
        require_valid(requests, vocab_size=self._vocab_size, context_tokens=self._context_tokens)
        need = self._memory(requests)
        if need is not None and self._model.device.type == "cpu":
            require_host_memory(need.total_bytes, f"a batch of {len(requests)} requests", need.arithmetic)
        try:
            yield from generate_batch(self._model, requests, sampling, self._eos_token_ids, self._context_tokens - 1)
        except BackendError:
            raise
        except (RuntimeError, MemoryError, ValueError, TypeError, IndexError) as error:
            failure = _failure(error, len(requests), need)
            free_after(error)
            raise failure from error

    def warm(self) -> None:
        """One short batch, so that the first measured one meets libraries that have been set up."""
        steps = min(WARM_STEPS, self._context_tokens - 1)
        prompt = [index % self._vocab_size for index in range(min(WARM_PROMPT_TOKENS, self._context_tokens - steps))]
        selector = TokenSelector(SamplingSpec(), self._model.device)
        batch = PaddedBatch(self._model, [prompt], steps, selector, self._context_tokens - 1)
        for _ in range(steps):
            if NOT_FINITE in batch.step():
                return  # no token to go on with; a trial will report it

    def release_memory(self) -> None:
        """Give memory that nothing uses any more back to the device."""
        release_memory()

    def close(self) -> None:
        """Drop the model and give its memory back to the device."""
        del self._model, self._tokenizer
        torch.set_num_threads(self._threads_before)
        release_memory()

    def _memory(self, requests: Sequence[Request]) -> BatchMemory | None:
        return estimate_batch_memory(
            self._model.config.get_text_config(),
            rows=len(requests),
            prompt_tokens=max(len(request.prompt_token_ids) for request in requests),
            new_tokens=max(request.max_new_tokens for request in requests),
            element_bytes=self._model.dtype.itemsize,
            eager=self._model.config._attn_implementation == "eager",
        )


def load_engine(config: BackendConfig, source: ModelSource, args: TransformersArgs, import_s: float) -> tuple[Engine, LoadReport]:
    """Load model and tokenizer, run a short batch, and report.

    Raises:
        LoadError: One of them could not be loaded.
        DeviceMemoryError: The device is too small.
    """
    quieten()
    begin_s = time.monotonic()
    device = _device(config)
    threads_before = torch.get_num_threads()
    try:
        model_config = read_model_config(source, config.model)
        tokenizer, origin = find_tokenizer(config, source, model_config)
        model = build_model(source, config.model, args, model_config, device)
        engine = Engine(model, tokenizer, threads_before)
        if args.num_threads is not None:
            torch.set_num_threads(args.num_threads)
        constructed_s = time.monotonic()
        engine.warm()
    except BackendError:
        raise
    except Exception as error:  # model code of third parties may raise anything; here it becomes one typed error
        free_after(error)
        if is_out_of_memory(error):
            raise DeviceMemoryError(f"the model does not fit: {first_line(error)}") from error
        what = (
            f"hub model {source.location!r} (no folder has that name)" if source.kind == "hub" else f"model {source.location!r}"
        )
        raise load_error(what, error) from error
    finished_s = time.monotonic()
    return engine, LoadReport(
        import_s=import_s,
        construct_s=constructed_s - begin_s,
        compile_s=None,
        warm_s=finished_s - constructed_s,
        context_tokens=context_tokens(model.config),
        vocab_size=int(model.config.get_text_config().vocab_size),
        parameters=model.num_parameters(),
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=device.type,
        model_commit=model_commit(source, model_config),
        random_weights=source.random,
        special_token_ids=special_token_ids(tokenizer),
        notes=_notes(model, source, origin),
    )


def gpu_uuid() -> str:
    """NVML's UUID of the device the engine runs on: the first that is visible."""
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


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


def _device(config: BackendConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise LoadError(
            f"the engine is to run on CUDA, but torch {torch.__version__} sees no CUDA device",
            "set `engine.device: cpu`, or install a CUDA build of torch and check `nvidia-smi`",
        )
    return torch.device("cuda", 0) if config.device == "cuda" else torch.device("cpu")


def _notes(model: Any, source: ModelSource, tokenizer_origin: str) -> dict[str, str]:
    return {
        "engine": f"transformers {transformers.__version__}",
        "torch": str(torch.__version__),  # a TorchVersion would make whoever unpickles the report import torch
        "attention": model.config._attn_implementation,
        "model": source.location,
        "tokenizer": tokenizer_origin,
        "threads": str(torch.get_num_threads()),
    }
