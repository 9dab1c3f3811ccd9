"""What the weight files of a checkpoint hold, from their headers alone."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from llem_ray.backends.model_source import ModelSource, known_config
from llem_ray.core.spec import ModelSpec

FLOAT_BYTES: Final[Mapping[str, int]] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Formats that are converted to the number format of the weights when they are loaded."""

_BYTES: Final[Mapping[str, float]] = {
    "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5, "F6_E2M3": 0.75, "F6_E3M2": 0.75, **FLOAT_BYTES,
}  # fmt: skip
_LAYER: Final = re.compile(r"\blayers\.(\d+)\.")
_OTHER_PARTS: Final = re.compile(r"(^|[._])(vision|visual|audio|image|multi_modal|mtp)|rotary_emb|\.inv_freq$")
_LONGEST_HEADER: Final = 100_000_000
"""As in the safetensors library."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredWeights:
    """The tensors of a checkpoint that a text model loads."""

    float_numbers: int
    """Numbers in formats that are converted when they are loaded."""
    float_bytes: int
    """What these take in the files."""
    packed_bytes: int
    """What all others take: quantised weights and their scales."""

    def loaded_bytes(self, element_bytes: int | None) -> int:
        """Bytes in memory with floats of ``element_bytes``; None: as in the files."""
        floats = self.float_bytes if element_bytes is None else self.float_numbers * element_bytes
        return floats + self.packed_bytes


def read_stored_weights(folder: Path, layers: int, *, tied: bool) -> StoredWeights | None:
    """Add up the safetensors files of a model folder; None where there are none, or where they are not all there.

    What a text model may leave out is not counted: other modalities, layers beyond its last, an output embedding that is tied.

    Args:
        folder: With the checkpoint.
        layers: The model's number of layers.
        tied: Output and input embeddings are one.
    """
    try:
        files = sorted(_files(folder))
        tensors = [item for path in files for item in _header(path).items() if item[0] != "__metadata__"]
        counted = [_size(tensor) for name, tensor in dict(tensors).items() if _is_loaded(name, layers, tied=tied)]
    except (OSError, ValueError, TypeError, KeyError, struct.error):
        return None
    if not counted:
        return None
    floats = [(numbers, kind) for numbers, kind in counted if kind in FLOAT_BYTES]
    return StoredWeights(
        float_numbers=sum(numbers for numbers, _ in floats),
        float_bytes=sum(numbers * FLOAT_BYTES[kind] for numbers, kind in floats),
        packed_bytes=int(sum(numbers * _BYTES[kind] for numbers, kind in counted if kind not in FLOAT_BYTES)),
    )


def find_snapshot(model: ModelSpec) -> Path | None:
    """The folder of a hub model in this host's cache of the hub, without the network; None where it is not there."""
    if model.id is None:
        return None
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    repository = cache / f"models--{model.id.replace('/', '--')}"
    revision = model.revision or "main"
    try:
        commit = (repository / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = revision
    folder = repository / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None


def local_config(source: ModelSource, model: ModelSpec) -> tuple[Mapping[str, Any], Path | None]:
    """The model's config.json, and the folder of its weights; empty and None where it is not on this host."""
    if source.kind != "hub":
        return known_config(source), Path(source.location) if source.kind == "folder" else None
    folder = find_snapshot(model)
    if folder is None:
        return {}, None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, None
    return config if isinstance(config, dict) else {}, folder


def _files(folder: Path) -> Iterator[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        yield from (folder / name for name in set(names))
    elif (single := folder / "model.safetensors").exists():
        yield single  # others beside it are copies in other forms
    else:
        yield from folder.glob("*.safetensors")


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LONGEST_HEADER:
            raise ValueError(f"{path}: no safetensors file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise TypeError(f"{path}: no safetensors file")
    return header


def _size(tensor: Mapping[str, Any]) -> tuple[int, str]:
    if tensor["dtype"] not in _BYTES:
        raise KeyError(tensor["dtype"])
    return prod(tensor["shape"]), tensor["dtype"]


def _is_loaded(name: str, layers: int, *, tied: bool) -> bool:
    layer = _LAYER.search(name)
    if _OTHER_PARTS.search(name) or (layer is not None and int(layer[1]) >= layers):
        return False
    return not (tied and name.endswith("lm_head.weight"))
