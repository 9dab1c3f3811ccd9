"""How much memory a batch of a decoder-only transformer needs beside the weights."""

from __future__ import annotations

from dataclasses import dataclass

from llem_ray.backends.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchMemory:
    """Bytes a batch needs beside the weights, as a sum that can be read."""

    kv_cache_bytes: int
    activation_bytes: int
    logits_bytes: int
    arithmetic: str
    """The sum with its factors."""

    @property
    def total_bytes(self) -> int:
        """Everything together."""
        return self.kv_cache_bytes + self.activation_bytes + self.logits_bytes


def batch_memory(
    shape: ModelShape, *, rows: int, prompt_tokens: int, new_tokens: int, element_bytes: int, eager: bool
) -> BatchMemory:
    """Memory of one padded batch.

    The cache grows by copying one layer at a time, hence one layer more than the model has. Activations are those alive
    together at the widest point of one layer of the prefill: two hidden states and three of the MLP's width, or the
    attention scores in the weights' format and in float32 where eager attention writes them out.

    Args:
        shape: The model.
        rows: Requests in the batch.
        prompt_tokens: Padded length of the prompts.
        new_tokens: Tokens generated for each row.
        element_bytes: Size of one weight.
        eager: Attention scores are materialised.
    """
    tokens = prompt_tokens + new_tokens
    kept = shape.cache_numbers(tokens) * rows * element_bytes
    kv_cache = kept + kept // shape.layers
    activations = rows * prompt_tokens * (2 * shape.hidden + 3 * shape.mlp) * element_bytes
    wide = f"{rows} rows x {prompt_tokens} tokens x (2 x {shape.hidden} + 3 x {shape.mlp}) x {element_bytes} B"
    if eager and (scores := rows * shape.heads * prompt_tokens**2 * (element_bytes + 4)) > activations:
        activations = scores
        wide = f"scores of {rows} rows x {shape.heads} heads x {prompt_tokens} x {prompt_tokens} tokens x {element_bytes + 4} B"
    logits = rows * shape.vocab * (element_bytes + 4)
    return BatchMemory(
        kv_cache_bytes=kv_cache,
        activation_bytes=activations,
        logits_bytes=logits,
        arithmetic=(
            f"KV cache ({shape.cache_terms(tokens)}) x {rows} rows x {element_bytes} B, and one layer more while it grows"
            f" = {size_text(kv_cache)}; activations {wide} = {size_text(activations)};"
            f" logits {rows} rows x {shape.vocab} x {element_bytes + 4} B = {size_text(logits)}"
        ),
    )


def size_text(count: float) -> str:
    """Bytes with three digits and a decimal unit."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 1000 or unit == "PB":
            break
        value /= 1000
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
