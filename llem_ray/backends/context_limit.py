"""The longest prompt plus output that an engine will take, by the model's config.json alone and before anything is loaded.

None stands for what only the engine knows. What is told here is never less than what the engine will allow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from llem_ray.core.spec import EngineSpec, ModelSpec

_UNSCALED: Final = frozenset({"default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"})
"""Kinds of rotary embeddings whose configs state the whole context: vLLM 0.32's ``_get_and_verify_max_len``."""
_VLLM_KEYS: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Where vLLM 0.32 looks for a limit; the smallest counts, but for ``model_max_length``, which goes before all others."""
_GPT: Final = frozenset({"gpt2", "gptj", "codegen", "gpt_bigcode", "imagegpt", "openai-gpt", "ctrl"})
"""Families that write ``n_positions`` for ``max_position_embeddings``."""
_LIMITS: Final[Mapping[str, str]] = {"vllm": "max_model_len", "tensorrt": "max_seq_len"}
"""Engine -> the argument by which the sweep sets the limit."""


class ContextLimit(NamedTuple):
    """Longest prompt plus output."""

    tokens: int
    origin: str
    """What sets it."""


def context_limit(config: Mapping[str, Any], model: ModelSpec, engine: EngineSpec) -> ContextLimit | None:
    """The limit that the engine will set itself for the model; None where that cannot be told.

    Args:
        config: A config.json as transformers writes it; empty where it is not known.
        model: As the sweep names it.
        engine: Its backend and its arguments.
    """
    if engine.backend not in ("transformers", *_LIMITS):
        return None
    args, named = engine.engine_args, _LIMITS.get(engine.backend)
    asked = args.get(named) if named is not None else None
    if asked is not None and asked != -1:  # -1: what fits into the memory, at most the model's
        known = type(asked) is int and asked > 0
        return ContextLimit(asked, f"engine.engine_args.{named}") if known else None
    if any(name in args for name in ("hf_overrides", "hf_config_path", "config_format", "model_kwargs")) or (
        model.trust_remote_code and config.get("auto_map")
    ):
        return None
    inner = config.get("text_config")
    values = inner if isinstance(inner, Mapping) else config
    limit = _vllm_limit(values, args) if engine.backend == "vllm" else _positions(values)
    return None if limit is None else ContextLimit(int(limit), "the model's context")


def rope_factor(values: Mapping[str, Any]) -> float:
    """How many times its positions a model's context is: of rotary embeddings that are scaled linearly or as they grow.

    Args:
        values: Config of the text model, with ``rope_parameters`` as transformers 5 writes it, or ``rope_scaling``.
    """
    if "gemma3" in str(values.get("model_type")):  # states the whole context
        return 1.0
    return max((factor for kind in ("rope_parameters", "rope_scaling") for factor in _factors(values.get(kind))), default=1.0)


def _factors(stated: Any) -> Iterator[float]:
    if not isinstance(stated, Mapping):
        return
    if any(isinstance(part, Mapping) for part in stated.values()):  # one for each type of layer
        for part in stated.values():
            yield from _factors(part)
        return
    kind, factor = stated.get("rope_type", stated.get("type", "default")), stated.get("factor")
    if kind not in _UNSCALED and isinstance(factor, int | float) and not isinstance(factor, bool):
        yield max(1.0, float(factor))


def _positions(values: Mapping[str, Any]) -> float | None:
    """As ``model_config.context_tokens``."""
    limit = _number(values, "max_position_embeddings")
    if limit is None and values.get("model_type") in _GPT:
        limit = _number(values, "n_positions")
    return None if limit is None else limit * rope_factor(values)


def _vllm_limit(values: Mapping[str, Any], args: Mapping[str, Any]) -> float | None:
    limits = [number for name in _VLLM_KEYS if (number := _number(values, name)) is not None]
    limit: float | None = _number(values, "model_max_length") or min(limits, default=None)
    if limit is None:
        return None
    window = _number(values, "sliding_window")
    if args.get("disable_sliding_window") is True and window is not None and values.get("use_sliding_window") is not False:
        limit = min(limit, window)
    return limit * rope_factor(values)


def _number(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    return value if type(value) is int and value > 0 else None
