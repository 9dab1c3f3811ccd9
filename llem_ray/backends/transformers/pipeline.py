"""Layers over several ranks: what transformers' pipeline leaves to whoever calls `forward` with a cache of their own."""

from __future__ import annotations

from typing import Any, Final

from transformers import DynamicCache

from llem_ray.core.errors import ConfigError

PIPELINE_MODELS: Final[frozenset[str]] = frozenset(
    [
        "cohere",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt_oss",
        "granite",
        "hunyuan_v1_dense",
        "llama",
        "ministral",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    ]
)
"""Model types whose logits in two stages equal those in one: `tests/contract/test_transformers_families.py`.

transformers splits any model that has `embed_tokens`, `layers` and `norm`, and gives wrong logits for some of them, silently.
"""


class StageCache(DynamicCache):
    """The cache of one stage. Asked how long it is by way of a layer of another stage, it answers for one of its own.

    Args:
        config: Of the model.
        layers: The layers of this stage.
    """

    def __init__(self, config: Any, layers: range) -> None:
        super().__init__(config=config)
        self._stage = layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache."""
        return super().get_seq_length(layer_idx if layer_idx in self._stage else self._stage[0])

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a layer like ``layer_idx`` sees: with a sliding window, or without."""
        return super().get_mask_sizes(query_length, self._own(layer_idx))

    def _own(self, layer: int) -> int:
        if layer in self._stage:
            return layer
        sliding = self.is_sliding
        return next((own for own in self._stage if sliding[own] == sliding[layer]), layer)


def new_cache(model: Any) -> DynamicCache:
    """An empty cache for this process's part of ``model``."""
    stage = getattr(model, "_pp_stage", None)
    if stage is None:
        return DynamicCache(config=model.config)
    return StageCache(model.config, range(*stage.layer_range_for_rank(stage.pp_rank, len(model.base_model.layers))))


def require_pipeline(model_type: str, size: int) -> None:
    """Refuse models that transformers would split wrongly.

    Raises:
        ConfigError: It is none of those that were compared.
    """
    if model_type not in PIPELINE_MODELS:
        raise ConfigError(
            "layers of this kind of model cannot be spread over devices: transformers' result was not compared, or is wrong",
            "use tensor_parallel or data_parallel, or another engine",
            field="engine.pipeline_parallel",
            found=f"{size}, model type {model_type}",
            allowed=f"1; more for {', '.join(sorted(PIPELINE_MODELS))}",
        )
