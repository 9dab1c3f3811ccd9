"""Builds the model: from a checkpoint, or with random weights from its config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llem_ray.backends.transformers.arguments import TransformersArgs
from llem_ray.backends.transformers.builtin_models import BUILTIN_MODELS
from llem_ray.backends.transformers.memory import require_host_memory
from llem_ray.backends.transformers.source import ModelSource
from llem_ray.core.errors import LoadError
from llem_ray.core.spec import ModelSpec

UNLIMITED_CONTEXT_TOKENS = 1 << 20
"""Context assumed for models that name no limit."""

# A subclass stands before its base.
HUB_HINTS = (
    (GatedRepoError, "accept its licence on huggingface.co, then set HF_TOKEN to a token of that account"),
    (RevisionNotFoundError, "check `model.revision`"),
    (RepositoryNotFoundError, "check the id; a private model needs HF_TOKEN"),
    (OfflineModeIsEnabled, "it is not in the local cache and HF_HUB_OFFLINE is set: download it first with `hf download`"),
    (LocalEntryNotFoundError, "the hub cannot be reached and it is not in the local cache: download it first with `hf download`"),
    (EntryNotFoundError, "the repository is not a transformers model"),
)


def read_model_config(source: ModelSource, model: ModelSpec) -> Any:
    """The model's transformers config, with ``initializer_range`` applied.

    Raises:
        OSError: It is not there.
        ValueError: It is not a config that transformers knows.
    """
    if source.kind == "builtin":
        config = AutoConfig.for_model("llama", **BUILTIN_MODELS[source.location].config)
    else:
        config = AutoConfig.from_pretrained(
            source.location, revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        )
    if model.initializer_range is not None:
        config.initializer_range = model.initializer_range
        config.get_text_config().initializer_range = model.initializer_range
    return config


def build_model(
    source: ModelSource, model: ModelSpec, args: TransformersArgs, config: Any, device: torch.device
) -> PreTrainedModel:
    """The model on its device, ready for inference.

    Random weights depend on the seed, the device's kind and the torch version.

    Raises:
        DeviceMemoryError: The host's memory cannot hold it.
    """
    dtype = _dtype(source, model, config, device)
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    if device.type == "cpu":
        _require_memory(config, dtype, model.trust_remote_code)
    if source.random:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            stack.enter_context(device)
            torch.manual_seed(model.seed)
            built = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    else:
        if device.type == "cuda":
            options["device_map"] = {"": device}
        built = AutoModelForCausalLM.from_pretrained(
            source.location, config=config, revision=model.revision or "main", dtype=dtype, **options
        )
    return built.eval()


def context_tokens(config: Any) -> int:
    """Longest prompt plus output: the config's position limit, else ``UNLIMITED_CONTEXT_TOKENS``."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else UNLIMITED_CONTEXT_TOKENS


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Ids that end a text by the model's generation config; empty where it names none."""
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config.get_text_config(), "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset(ids) if isinstance(ids, list | tuple) else frozenset((ids,))


def load_error(what: str, error: BaseException) -> LoadError:
    """A LoadError with the engine's own first sentence, and a hint where the cause is a known one of the hub."""
    causes = list(_causes(error))
    hint = next((hint for cls, hint in HUB_HINTS for cause in causes if isinstance(cause, cls)), None)
    return LoadError(f"{what} cannot be loaded: {first_line(error)}", hint)


def first_line(error: BaseException) -> str:
    """The first lines of an exception's text that say something, at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _dtype(source: ModelSource, model: ModelSpec, config: Any, device: torch.device) -> Any:
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    if source.random:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return config.dtype or "auto"


def _require_memory(config: Any, dtype: Any, trust_remote_code: bool) -> None:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    parameters = skeleton.num_parameters()
    element_bytes = (dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize
    require_host_memory(
        parameters * element_bytes, "the model", f"{parameters} parameters x {element_bytes} B = {parameters * element_bytes} B"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
