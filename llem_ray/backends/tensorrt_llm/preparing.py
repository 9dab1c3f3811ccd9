"""What is settled before weights are loaded. Importing this module imports TensorRT-LLM, whose models judge the arguments."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what third-party modules say about each other is not ours to pass on
    import tensorrt_llm
    from tensorrt_llm import LLM, _tensorrt_engine
    from tensorrt_llm.llmapi import KvCacheConfig, TorchLlmArgs, TrtLlmArgs
    from transformers import GenerationConfig

from llem_ray.backends.engine_args import FIELD
from llem_ray.backends.model_config import (
    UNLIMITED_CONTEXT_TOKENS,
    context_tokens,
    load_error,
    model_folder,
    quieten,
    read_model_config,
    weight_dtype,
)
from llem_ray.backends.model_source import ModelSource
from llem_ray.backends.tensorrt_llm.arguments import OWN_NAMES, engine_arguments, foreign_args, own_args
from llem_ray.backends.tensorrt_llm.machine import Gpu
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import ConfigError

ARGUMENT_ERRORS: Final = (TypeError, ValueError, KeyError, AttributeError, NotImplementedError, AssertionError)
"""What TensorRT-LLM's argument models raise; pydantic's errors are ValueErrors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """All that is known before weights are loaded."""

    source: ModelSource
    model_config: Any
    gpus: tuple[Gpu, ...]
    dtype: str
    llm_class: Any
    arguments: Mapping[str, Any]


def prepare(config: BackendConfig, source: ModelSource, gpus: tuple[Gpu, ...]) -> Prepared:
    """Have TensorRT-LLM validate everything it can without weights.

    Raises:
        ConfigError: It refuses an argument; its own message is kept.
        LoadError: The model's config cannot be read.
    """
    quieten()
    try:
        model_config = read_model_config(source, config.model)
    except Exception as error:  # configs of third parties may raise anything
        raise load_error(f"model {source.location!r}", error) from error
    require_rotary(model_config)
    dtype = weight_dtype(source, config.model, model_config, config.device)
    limit = context_tokens(model_config)
    arguments = engine_arguments(
        config,
        source,
        model_folder(source, model_config, Path(config.cache_dir)),
        str(dtype).removeprefix("torch.") if dtype else "auto",
        limit if limit < UNLIMITED_CONTEXT_TOKENS else None,
    )
    on_pytorch = own_args(config).backend == "pytorch"
    args_class: Any = TorchLlmArgs if on_pytorch else TrtLlmArgs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _validate(args_class, arguments, foreign_args(config))
            arguments["kv_cache_config"] = KvCacheConfig(**arguments["kv_cache_config"])
        except (OSError, RuntimeError, MemoryError) as error:
            raise load_error(f"model {source.location!r}", error) from error
    return Prepared(
        source=source,
        model_config=model_config,
        gpus=gpus,
        dtype=str(arguments["dtype"]),
        llm_class=LLM if on_pytorch else _tensorrt_engine.LLM,
        arguments=arguments,
    )


def require_rotary(model_config: Any) -> None:
    """Refuse a config.json of transformers 5 whose rotary settings transformers 4, which TensorRT-LLM brings, would overlook.

    Raises:
        ConfigError: The model would be another one than its config says.
    """
    stated, theta = getattr(model_config, "rope_parameters", None), getattr(model_config, "rope_theta", None)
    if not isinstance(stated, Mapping) or theta is None:
        return
    scaled = stated.get("rope_type", "default") != "default"
    if stated.get("rope_theta", theta) != theta or (scaled and not getattr(model_config, "rope_scaling", None)):
        raise ConfigError(
            f"config.json states rope_parameters, which this TensorRT-LLM overlooks: it would take rope_theta {theta}",
            "state rope_theta, and rope_scaling where there is one, beside them",
            field="model",
            found=f"rope_parameters: {dict(stated)}",
            allowed="rope_theta and rope_scaling, as transformers 4 writes them",
        )


def end_token_ids(prepared: Prepared, config: BackendConfig) -> tuple[int, ...]:
    """Ids that end an answer: those of the generation config, else of the model's config, as in the other engines."""
    ids = None
    if not prepared.source.random and prepared.source.kind in ("hub", "folder"):
        with suppress(OSError, ValueError):
            revision = config.model.revision or "main"
            ids = GenerationConfig.from_pretrained(prepared.source.location, revision=revision).eos_token_id
    if ids is None:
        ids = getattr(prepared.model_config.get_text_config(), "eos_token_id", None)
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def _validate(args_class: Any, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    _require_known(given, args_class, FIELD, OWN_NAMES)
    _require_known(arguments["kv_cache_config"], KvCacheConfig, f"{FIELD}.kv_cache_config", ())
    try:
        args_class(**{**arguments, "kv_cache_config": KvCacheConfig(**arguments["kv_cache_config"])})
    except ARGUMENT_ERRORS as error:
        raise ConfigError(
            f"TensorRT-LLM {tensorrt_llm.__version__} refuses these arguments: {_message(error)}",
            field=FIELD,
            found=", ".join(f"{name}={value!r}" for name, value in given.items()) or "no engine_args",
        ) from error


def _require_known(given: Mapping[str, Any], model: Any, field: str, ours: Sequence[str]) -> None:
    """Names that the library's own model has; asked for beforehand, so that the error can say which was meant."""
    known = [*ours, *model.model_fields]
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise ConfigError(
                "unknown engine argument",
                f"did you mean {close[0]!r}?" if close else None,
                field=f"{field}.{name}",
                found=name,
                allowed=", ".join([*ours, f"the arguments of TensorRT-LLM's {model.__name__}"]),
            )


def _message(error: Exception) -> str:
    """The text of an exception without pydantic's address and dump of the input."""
    lines = (line.partition(" [type=")[0].strip() for line in str(error).splitlines())
    text = " ".join(line for line in lines if line and not line.startswith("For further information")) or type(error).__name__
    return text if len(text) <= 600 else text[:597] + "..."
