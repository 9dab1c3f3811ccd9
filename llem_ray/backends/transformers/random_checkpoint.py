"""Random weights on disk: transformers splits a model over ranks only while it reads a checkpoint.

They are drawn by the CPU's generator, so that they are the same on every host and device.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import AutoModelForCausalLM

from llem_ray.core.errors import LoadError
from llem_ray.core.spec import ModelSpec

_WRITE_S: Final = 3600.0
"""Longest wait for another process of this host that writes the same checkpoint."""
_POLL_S: Final = 0.05
_FORMAT: Final = 1
_SET_BY_USE: Final = ("architectures", "dtype", "distributed_config")
"""transformers writes them into a config when a model is made of it."""


def random_checkpoint(model: ModelSpec, config: Any, dtype: torch.dtype, bytes_needed: int, cache_dir: Path) -> Path:
    """Folder with random weights for ``config``, written by the first process of the host that asks.

    Args:
        model: Its seed is used.
        config: transformers config, ``initializer_range`` applied.
        dtype: Of the weights.
        bytes_needed: Size of the weights.
        cache_dir: Where it is kept for the next time.

    Raises:
        LoadError: The folder cannot be written, or has no room.
    """
    folder = cache_dir / "random-checkpoints"
    target = folder / _key(model, config, dtype)
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{target.name}.lock"):
            if not target.exists():
                _require_room(folder, bytes_needed)
                _write(model, config, dtype, target)
    except OSError as error:
        raise LoadError(
            f"a model with random weights cannot be split without a copy on disk, and {folder} cannot be written: {error}",
            "set LLEM_RAY_CACHE to a folder that can",
        ) from error
    return target


def _key(model: ModelSpec, config: Any, dtype: torch.dtype) -> str:
    written = json.loads(config.to_json_string(use_diff=False))
    facts = {
        "format": _FORMAT,
        "config": {name: value for name, value in written.items() if name not in _SET_BY_USE},
        "seed": model.seed,
        "dtype": str(dtype),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _write(model: ModelSpec, config: Any, dtype: torch.dtype, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(model.seed)
            built = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code)
        built.save_pretrained(Path(temporary, "model"))
        Path(temporary, "model").replace(target)


def _require_room(folder: Path, bytes_needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if bytes_needed > free:
        raise LoadError(f"random weights of {bytes_needed} B are to be written to {folder}, which has {free} B left")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    deadline_s = time.monotonic() + _WRITE_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise LoadError(f"another process holds {path} for {_WRITE_S:g} s") from None
                time.sleep(_POLL_S)
        yield
