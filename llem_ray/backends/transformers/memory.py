"""How much memory a batch needs, and how much there is: refuse before Linux kills the process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from llem_ray.core.errors import DeviceMemoryError

CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


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


def estimate_batch_memory(
    config: Any, *, rows: int, prompt_tokens: int, new_tokens: int, element_bytes: int, eager: bool
) -> BatchMemory | None:
    """Memory of one padded batch of a decoder-only transformer; None where the config does not tell the dimensions.

    The cache grows by copying one layer at a time, hence one layer more than the model has. Activations are those alive
    together at the widest point of one layer of the prefill: two hidden states and three of the MLP's width, or the
    attention scores in the weights' format and in float32 where eager attention writes them out.

    Args:
        config: transformers' text config.
        rows: Requests in the batch.
        prompt_tokens: Padded length of the prompts.
        new_tokens: Tokens generated for each row.
        element_bytes: Size of one weight.
        eager: Attention scores are materialised.
    """
    layers, hidden, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    vocab = getattr(config, "vocab_size", None)
    if not (layers and hidden and heads and vocab):
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    tokens = prompt_tokens + new_tokens
    kv_cache = 2 * (layers + 1) * kv_heads * head_dim * tokens * rows * element_bytes
    activations = rows * prompt_tokens * (2 * hidden + 3 * width) * element_bytes
    wide = f"{rows} rows x {prompt_tokens} tokens x (2 x {hidden} + 3 x {width}) x {element_bytes} B"
    if eager and (scores := rows * heads * prompt_tokens**2 * (element_bytes + 4)) > activations:
        activations = scores
        wide = f"scores of {rows} rows x {heads} heads x {prompt_tokens} x {prompt_tokens} tokens x {element_bytes + 4} B"
    logits = rows * vocab * (element_bytes + 4)
    return BatchMemory(
        kv_cache_bytes=kv_cache,
        activation_bytes=activations,
        logits_bytes=logits,
        arithmetic=(
            f"KV cache 2 x {layers + 1} layers x {kv_heads} heads x {head_dim} x {tokens} tokens x {rows} rows x"
            f" {element_bytes} B = {_size(kv_cache)}; activations {wide} = {_size(activations)};"
            f" logits {rows} rows x {vocab} x {element_bytes + 4} B = {_size(logits)}"
        ),
    )


def available_host_bytes() -> int:
    """Memory this process can still take: the host's, or what is left of its cgroup's limit if that is less."""
    available = int(psutil.virtual_memory().available)
    for files in CGROUP_FILES:
        left = _left_in_cgroup(*map(Path, files))
        if left is not None:
            available = min(available, left)
    return available


def require_host_memory(needed_bytes: int, what: str, arithmetic: str) -> None:
    """Refuse what the host cannot hold.

    Raises:
        DeviceMemoryError: More is needed than is available; the message shows the arithmetic.
    """
    available = available_host_bytes()
    if needed_bytes > available:
        raise DeviceMemoryError(
            f"{what} needs about {_size(needed_bytes)}, but {_size(available)} of memory are available: {arithmetic}"
        )


def _left_in_cgroup(limit_file: Path, usage_file: Path, stat_file: Path) -> int | None:
    try:
        limit, usage = int(limit_file.read_text()), int(usage_file.read_text())
        stat = dict(line.split() for line in stat_file.read_text().splitlines())
    except (OSError, ValueError):
        return None  # no such cgroup version, or the limit is "max"
    # File pages count as usage but are dropped under pressure.
    reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(0, limit - usage + reclaimable)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 1000 or unit == "PB":
            break
        value /= 1000
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
