"""FLOP of a decoder-only transformer from its config: exact for the families that are listed."""

from __future__ import annotations

from typing import Any, Final

from llem_ray.core.flops import FlopModel

GATED: Final = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "stablelm", "cohere"}
)
"""Three matrices in every MLP."""
PLAIN: Final = frozenset({"gpt2", "opt", "gpt_neox", "phi", "starcoder2"})
"""Two matrices in every MLP."""
EXPERTS: Final = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"})
"""Three matrices in every expert, of which each token takes a few."""


def flop_model(config: Any) -> FlopModel | None:
    """Coefficients of a model; None for a family that is not listed.

    Per token and layer: 2 x (query, key, value and output projections + MLP), with the active experts and the router alone
    where there are experts. Per pair of query and key and layer: 4 x heads x head dimension, for scores and their product with
    the values. Per output token: 2 x vocabulary x hidden.

    Args:
        config: transformers' text config.
    """
    if config.model_type not in GATED | PLAIN | EXPERTS:
        return None
    layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    weights = sum(attention + _mlp_weights(config, layer) for layer in range(layers))
    window_tokens = _window_tokens(config)
    sliding = _sliding_layers(config) if window_tokens else 0
    return FlopModel(
        per_token=2.0 * weights,
        per_output=2.0 * config.vocab_size * hidden,
        per_pair=4.0 * heads * head_dim * (layers - sliding),
        per_pair_sliding=4.0 * heads * head_dim * sliding,
        window_tokens=window_tokens if sliding else None,
    )


def _mlp_weights(config: Any, layer: int) -> int:
    """Weights that a token meets in the MLP of a layer."""
    hidden = int(config.hidden_size)
    if config.model_type in PLAIN:
        widths = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
        return 2 * hidden * int(next(filter(None, widths), 4 * hidden))
    if config.model_type in GATED or not _has_experts(config, layer):
        return 3 * hidden * int(config.intermediate_size)
    width = int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    shared = int(getattr(config, "shared_expert_intermediate_size", None) or 0)
    router = hidden * int(config.num_experts) + (hidden if shared else 0)
    return 3 * hidden * (width * int(config.num_experts_per_tok) + shared) + router


def _has_experts(config: Any, layer: int) -> bool:
    every = getattr(config, "decoder_sparse_step", None) or 1
    return layer not in (getattr(config, "mlp_only_layers", None) or ()) and (layer + 1) % every == 0


def _window_tokens(config: Any) -> int | None:
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None) or None


def _sliding_layers(config: Any) -> int:
    kinds = getattr(config, "layer_types", None)
    return int(config.num_hidden_layers) if not kinds else sum(kind == "sliding_attention" for kind in kinds)
