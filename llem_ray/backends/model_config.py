"""A model's transformers config and what follows from it, for every engine that reads models in this form."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM

from llem_ray.backends.builtin_models import BUILTIN_MODELS
from llem_ray.backends.cache_file import write_atomically
from llem_ray.backends.context_limit import rope_factor
from llem_ray.backends.model_source import ModelSource
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
        if hasattr(config, "rope_theta"):  # transformers 4 knows no rope_parameters
            config.rope_theta = BUILTIN_MODELS[source.location].config["rope_parameters"]["rope_theta"]
    else:
        config = AutoConfig.from_pretrained(
            source.location, revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        )
    if model.initializer_range is not None:
        config.initializer_range = model.initializer_range
        config.get_text_config().initializer_range = model.initializer_range
    return config


def context_tokens(config: Any) -> int:
    """Longest prompt plus output: the config's positions, times what scales them, else ``UNLIMITED_CONTEXT_TOKENS``."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not limit:
        return UNLIMITED_CONTEXT_TOKENS
    return int(
        limit * rope_factor({name: getattr(text, name, None) for name in ("model_type", "rope_parameters", "rope_scaling")})
    )


def weight_dtype(source: ModelSource, model: ModelSpec, config: Any, device: Literal["cpu", "cuda"]) -> torch.dtype | None:
    """Number format of the weights by the rule of ``ModelSpec.dtype``, for every engine; None where nothing names one."""
    if model.dtype != "auto":
        return cast("torch.dtype", getattr(torch, model.dtype))
    if source.random:
        return torch.bfloat16 if device == "cuda" else torch.float32
    return cast("torch.dtype | None", config.dtype)


def count_parameters(config: Any, *, trust_remote_code: bool) -> int:
    """Exact number of parameters, tied ones once, without memory for them."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return int(skeleton.num_parameters())


def known_parameters(config: Any, *, trust_remote_code: bool) -> int | None:
    """Exact number of parameters; None for a model that only the engine knows."""
    try:
        return count_parameters(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError, AttributeError):
        return None


def model_folder(source: ModelSource, config: Any, cache_dir: Path) -> str:
    """Hub id or folder to hand to an engine that reads models by itself; a config without a folder is written to the cache.

    Raises:
        LoadError: It cannot be written.
    """
    if source.kind in ("hub", "folder"):
        return source.location
    if not config.architectures:
        model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
        config.architectures = [model_class.__name__]
    text = config.to_json_string()
    folder = cache_dir / "configs" / hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        write_atomically(folder / "config.json", text)
    except OSError as error:
        raise LoadError(f"the model's config cannot be written: {error}", "make the cache folder writable") from error
    return str(folder)


def quieten() -> None:
    """Progress bars and log lines of the libraries would drown our own."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()


def load_error(what: str, error: BaseException) -> LoadError:
    """A LoadError with the engine's own first sentence, and a hint where the cause is a known one of the hub."""
    causes = list(_causes(error))
    hint = next((hint for cls, hint in HUB_HINTS for cause in causes if isinstance(cause, cls)), None)
    return LoadError(f"{what} cannot be loaded: {first_line(error)}", hint)


def first_line(error: BaseException) -> str:
    """The first lines of an exception's text that say something, at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
