"""Llama models of known size that need no download: random weights from a config alone.

The first three are ours and small enough for a CPU; `llama-1b` has the dimensions of Llama 3.2 1B. All tie input and output
embeddings. Token ids 0, 1, 2 are unknown, begin and end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltinModel:
    """A named Llama configuration."""

    parameters: int
    """Exact number of parameters; tied embeddings count once."""
    config: Mapping[str, Any]
    """Arguments of transformers' LlamaConfig."""


def _llama(
    *, parameters: int, vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, context: int
) -> BuiltinModel:
    return BuiltinModel(
        parameters=parameters,
        config={
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
        },
    )


BUILTIN_MODELS: Final[Mapping[str, BuiltinModel]] = {
    "llama-tiny": _llama(parameters=1_000_576, vocab=2048, hidden=128, mlp=352, layers=4, heads=4, kv_heads=2, context=2048),
    "llama-10m": _llama(parameters=9_966_848, vocab=8192, hidden=256, mlp=768, layers=10, heads=8, kv_heads=4, context=4096),
    "llama-100m": _llama(
        parameters=100_685_568, vocab=16384, hidden=768, mlp=2048, layers=14, heads=12, kv_heads=4, context=8192
    ),
    "llama-1b": _llama(
        parameters=1_235_814_400, vocab=128256, hidden=2048, mlp=8192, layers=16, heads=32, kv_heads=8, context=8192
    ),
}
