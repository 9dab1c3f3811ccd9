"""What a decoder-only model's config.json says of its size. Pure arithmetic: needs neither torch nor the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Final


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedLayers:
    """Layers whose KV cache has the same form."""

    count: int
    heads: int
    """Key-value heads, divided among tensor parallel ranks; 1 where all ranks keep the same latent."""
    elements: int
    """Numbers that one head keeps of one token: key and value, or the latent of multi-head latent attention."""
    window: int | None
    """Tokens that a query sees; None: all."""
    latent: bool = False

    def numbers(self, tokens: int, ranks: int) -> int:
        """Numbers that one of ``ranks`` tensor parallel ranks keeps of a sequence."""
        return self.count * ceil(self.heads / ranks) * self.elements * self.kept(tokens)

    def kept(self, tokens: int) -> int:
        """Tokens of a sequence that stay in the cache: a window's own query is never read from it."""
        return tokens if self.window is None else min(tokens, self.window - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only transformer."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    vocab: int
    mlp: int
    context_tokens: int | None
    """Longest sequence; None where the config names no limit."""
    parameters: int | None
    """Exact number, tied embeddings once; None where this module does not know the architecture."""
    cached: tuple[CachedLayers, ...]
    """What is kept of each token; a guess where ``parameters`` is None."""

    def cache_numbers(self, tokens: int, ranks: int = 1) -> int:
        """Numbers that one of ``ranks`` tensor parallel ranks keeps of one sequence of ``tokens`` tokens."""
        return sum(layers.numbers(tokens, ranks) for layers in self.cached)

    def cache_terms(self, tokens: int, ranks: int = 1) -> str:
        """``cache_numbers`` with its factors."""
        return " + ".join(_term(layers, tokens, ranks) for layers in self.cached)


def read_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape of the model, or of its text part; None where the config does not tell the dimensions.

    Args:
        config: A config.json as transformers writes it.
    """
    inner = config.get("text_config")
    values = inner if isinstance(inner, Mapping) else config
    numbers = [_number(values, name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")]
    if not all(numbers):
        return None
    layers, hidden, heads, vocab = (number or 0 for number in numbers)
    family = str(values.get("model_type"))
    count = _FAMILIES.get(family) if values is config and not _remote_code(config) else None
    return ModelShape(
        model_type=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        vocab=vocab,
        mlp=_number(values, "intermediate_size") or 4 * hidden,
        context_tokens=_number(values, "max_position_embeddings"),
        parameters=count(_Sizes(values, layers, hidden, heads, vocab)) if count is not None else None,
        cached=_cached_layers(values, layers, hidden, heads),
    )


def linear_layers(config: Mapping[str, Any]) -> Mapping[str, tuple[int, int]] | None:
    """Last part of a linear layer's name -> its inputs and outputs; None where this module does not know the architecture.

    Args:
        config: A config.json as transformers writes it.
    """
    shape, family = read_shape(config), config.get("model_type")
    mlp = _number(config, "intermediate_size")
    if shape is None or mlp is None or family not in {"llama", "mistral", "qwen2", "qwen3", "phi3"} or _remote_code(config):
        return None
    dim = _head_dim(config, shape.hidden, shape.heads)
    query, keys = shape.heads * dim, _kv_heads(config, shape.heads) * dim
    common = {"o_proj": (query, shape.hidden), "down_proj": (mlp, shape.hidden), "lm_head": (shape.hidden, shape.vocab)}
    if family == "phi3":
        return common | {"qkv_proj": (shape.hidden, query + 2 * keys), "gate_up_proj": (shape.hidden, 2 * mlp)}
    projections = {"q_proj": query, "k_proj": keys, "v_proj": keys, "gate_proj": mlp, "up_proj": mlp}
    return common | {name: (shape.hidden, outputs) for name, outputs in projections.items()}


@dataclass(frozen=True, slots=True)
class _Sizes:
    """A config with the defaults of transformers' own config classes."""

    config: Mapping[str, Any]
    layers: int
    hidden: int
    heads: int
    vocab: int

    def number(self, name: str, default: int = 0) -> int:
        return (_number(self.config, name) or 0) if name in self.config else default

    def flag(self, name: str) -> bool:
        return bool(self.config.get(name))

    @property
    def embeddings(self) -> int:
        """Input and output embeddings and the last norm."""
        return self.vocab * self.hidden * (1 if self.flag("tie_word_embeddings") else 2) + self.hidden

    def mlp(self, width: int) -> int:
        """A gated MLP: gate, up, down."""
        return 3 * self.hidden * width


def _dense(sizes: _Sizes) -> int:
    bias = 2 * sizes.number("intermediate_size") + sizes.hidden if sizes.flag("mlp_bias") else 0
    each = _attention(sizes) + sizes.mlp(sizes.number("intermediate_size")) + bias + 2 * sizes.hidden
    return sizes.embeddings + sizes.layers * each


def _mixtral(sizes: _Sizes) -> int:
    experts = sizes.number("num_local_experts", 8)
    each = _attention(sizes) + experts * (sizes.mlp(sizes.number("intermediate_size")) + sizes.hidden) + 2 * sizes.hidden
    return sizes.embeddings + sizes.layers * each


def _qwen3_moe(sizes: _Sizes) -> int | None:
    step, dense = sizes.number("decoder_sparse_step", 1), sizes.config.get("mlp_only_layers") or ()
    experts = sizes.number("num_experts", sizes.number("num_local_experts", 128))
    if experts > 0 and not step:
        return None  # which layers have experts cannot be told; the model cannot be built either
    sparse = sum(layer not in dense and experts > 0 and (layer + 1) % step == 0 for layer in range(sizes.layers))
    each = experts * (sizes.mlp(sizes.number("moe_intermediate_size", 768)) + sizes.hidden)
    mlps = sparse * each + (sizes.layers - sparse) * sizes.mlp(sizes.number("intermediate_size"))
    return sizes.embeddings + sizes.layers * (_attention(sizes) + 2 * sizes.hidden) + mlps


def _deepseek_v3(sizes: _Sizes) -> int:
    nope, rope = sizes.number("qk_nope_head_dim", 128), sizes.number("qk_rope_head_dim", 64)
    value, latent = sizes.number("v_head_dim", 128), sizes.number("kv_lora_rank", 512)
    query = sizes.heads * (nope + rope)
    rank = sizes.number("q_lora_rank", 1536) or None
    attention = sizes.hidden * query if rank is None else sizes.hidden * rank + rank + rank * query
    attention += sizes.hidden * (latent + rope) + latent + latent * sizes.heads * (nope + value)
    attention += sizes.heads * value * sizes.hidden
    if sizes.flag("attention_bias"):
        attention += (rank or 0) + latent + rope + sizes.hidden
    experts, width = sizes.number("n_routed_experts", 256), sizes.number("moe_intermediate_size", 2048)
    dense = min(sizes.number("first_k_dense_replace", 3), sizes.layers)
    sparse = sizes.mlp(width) * (experts + sizes.number("n_shared_experts", 1)) + experts * sizes.hidden
    mlps = dense * sizes.mlp(sizes.number("intermediate_size")) + (sizes.layers - dense) * sparse
    return sizes.embeddings + sizes.layers * (attention + 2 * sizes.hidden) + mlps


_FAMILIES: Final[Mapping[str, Callable[[_Sizes], int | None]]] = {
    "llama": _dense,
    "mistral": _dense,
    "phi3": _dense,
    "qwen2": _dense,
    "qwen3": _dense,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
}
"""Architecture -> the number of its parameters; None where the config contradicts itself."""

_KV_HEADS: Final[Mapping[str, int]] = {"mistral": 8, "mixtral": 8, "qwen2": 32, "qwen3": 32, "qwen3_moe": 4}
"""Where a config leaves out `num_key_value_heads`, transformers' default; elsewhere as many as attention heads."""


def _attention(sizes: _Sizes) -> int:
    """Query, key, value and output projections of grouped-query attention, with the biases and norms of the family."""
    family = sizes.config.get("model_type")
    kv_heads, dim = _kv_heads(sizes.config, sizes.heads), _head_dim(sizes.config, sizes.hidden, sizes.heads)
    query, keys = sizes.heads * dim, kv_heads * dim
    count = sizes.hidden * (query + 2 * keys) + query * sizes.hidden
    if family == "qwen2":
        count += query + 2 * keys
    elif sizes.flag("attention_bias") and family in {"llama", "qwen3", "qwen3_moe"}:
        count += query + 2 * keys + sizes.hidden
    return count + (2 * dim if family in {"qwen3", "qwen3_moe"} else 0)


def _cached_layers(config: Mapping[str, Any], layers: int, hidden: int, heads: int) -> tuple[CachedLayers, ...]:
    if config.get("model_type") == "deepseek_v3":
        latent = (_number(config, "kv_lora_rank") or 512) + (_number(config, "qk_rope_head_dim") or 64)
        return (CachedLayers(count=layers, heads=1, elements=latent, window=None, latent=True),)
    kv_heads, elements = _kv_heads(config, heads), 2 * _head_dim(config, hidden, heads)
    window = _number(config, "sliding_window")
    if "sliding_window" not in config and config.get("model_type") == "mistral":
        window = 4096
    sliding = _sliding_layers(config, layers) if window else 0
    parts = ((layers - sliding, None), (sliding, window))
    return tuple(CachedLayers(count=count, heads=kv_heads, elements=elements, window=seen) for count, seen in parts if count)


def _sliding_layers(config: Mapping[str, Any], layers: int) -> int:
    """Layers with a window, of a config that names one."""
    types = config.get("layer_types")
    if isinstance(types, list | tuple):
        return sum(kind == "sliding_attention" for kind in types)
    if str(config.get("model_type")).startswith("qwen"):
        full = _number(config, "max_window_layers")
        return layers - min(layers, 28 if full is None else full) if config.get("use_sliding_window") else 0
    return layers


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    named = _number(config, "num_key_value_heads")
    left_out = "num_key_value_heads" not in config
    return named or (_KV_HEADS.get(str(config.get("model_type")), heads) if left_out else heads)


def _head_dim(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    default = 128 if config.get("model_type") == "qwen3" and "head_dim" not in config else hidden // heads
    return _number(config, "head_dim") or default


def _remote_code(config: Mapping[str, Any]) -> bool:
    """The architecture is whatever the code that comes with the model makes of it; DeepSeek's is that of transformers."""
    return "AutoModelForCausalLM" in (config.get("auto_map") or {}) and config.get("model_type") != "deepseek_v3"


def _number(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _term(layers: CachedLayers, tokens: int, ranks: int) -> str:
    kept = f"{layers.kept(tokens)} tokens{' of the window' if layers.kept(tokens) < tokens else ''}"
    if layers.latent:
        return f"{layers.count} layers x {layers.elements} (latent) x {kept}"
    share = f" / {ranks} ranks" if ranks > 1 else ""
    return f"2 x {layers.count} layers x {layers.heads} heads{share} x {layers.elements // 2} x {kept}"
