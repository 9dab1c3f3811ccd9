"""Where a model and its tokenizer come from. Looks at files only: needs neither torch nor the network."""

from __future__ import annotations

import difflib
import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from llem_ray.backends.builtin_models import BUILTIN_MODELS
from llem_ray.core.errors import ConfigError
from llem_ray.core.spec import ModelSpec

WEIGHT_FILES: Final = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model that is where the sweep file says, as far as this host can tell without loading it."""

    kind: Literal["hub", "folder", "builtin", "file"]
    """``folder`` is a model folder, ``file`` a config.json alone."""
    location: str
    """Hub id, name of a built-in model, or absolute path."""
    random: bool
    """Weights are drawn, not read."""
    tokenizer: str | None
    """Hub id or absolute folder; None where one is trained locally."""
    tokenizer_optional: bool
    """One is trained locally when ``tokenizer`` turns out to hold none: random weights from the hub."""


def find_model(model: ModelSpec, base_dir: str) -> ModelSource:
    """Resolve ``model`` against the file system.

    An id that starts with `/`, `.` or `~`, or that names an existing folder, is a folder; else a hub id.

    Raises:
        ConfigError: The model is not there, or lacks a file it needs.
    """
    if (model.id is None) == (model.config is None):
        found = "neither" if model.id is None else "both"
        raise ConfigError("a model needs exactly one of `id` and `config`", field="model", found=found, allowed="id or config")
    if model.config is not None:
        return _from_config(model, model.config, Path(base_dir))
    assert model.id is not None
    random = model.weights == "random"
    folder = _folder(model.id, base_dir, "model.id")
    if folder is None:
        return ModelSource(
            kind="hub",
            location=model.id,
            random=random,
            tokenizer=_find_tokenizer(model, base_dir) or model.id,
            tokenizer_optional=random and model.tokenizer is None,
        )
    read_config(folder / "config.json", "model.id")
    if not random and not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise ConfigError(
            "the model folder holds no weights",
            "set `model.weights: random` to draw them",
            file=str(folder),
            field="model.id",
            allowed=" or ".join(WEIGHT_FILES),
        )
    tokenizer = _find_tokenizer(model, base_dir) or _own_tokenizer(folder)
    if tokenizer is None and not random:
        raise ConfigError(
            "the model folder holds no tokenizer",
            "set `model.tokenizer` to a hub id or folder",
            file=str(folder),
            field="model.tokenizer",
            allowed=" or ".join(TOKENIZER_FILES),
        )
    return ModelSource(kind="folder", location=str(folder), random=random, tokenizer=tokenizer, tokenizer_optional=False)


def read_config(path: Path, field: str) -> Mapping[str, Any]:
    """Parse a config.json far enough to know that it is one.

    Raises:
        ConfigError: It is missing, not JSON (with the line), names no model type, or cannot be built.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError("there is no config.json", file=str(path), field=field) from error
    except json.JSONDecodeError as error:
        message = f"not valid JSON: {error.msg} at column {error.colno}"
        raise ConfigError(message, file=str(path), line=error.lineno, field=field) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read as text: {error}", file=str(path), field=field) from error
    if not isinstance(value, dict):
        raise ConfigError("not a model config", file=str(path), field=field, found=type(value).__name__, allowed="a JSON object")
    if not isinstance(value.get("model_type"), str):
        raise ConfigError(
            "the model config has no model_type", file=str(path), field=field, allowed='a name such as "model_type": "llama"'
        )
    inner = value.get("text_config")
    _require_sparse_step(inner if isinstance(inner, dict) else value, path, field)
    return value


def _require_sparse_step(values: Mapping[str, Any], path: Path, field: str) -> None:
    """Refuse a mixture of experts in which every 0-th layer has experts: transformers would divide by it."""
    step = values.get("decoder_sparse_step", 1)
    if values.get("num_experts", 1) and (type(step) is not int or step < 1):
        raise ConfigError(
            "wrong decoder_sparse_step: experts are in every layer whose number it divides",
            file=str(path),
            field=field,
            found=f'"decoder_sparse_step": {json.dumps(step)}',
            allowed="1 and more",
        )


def known_config(source: ModelSource) -> Mapping[str, Any]:
    """The model's config.json, as far as it is known without the network: empty for a hub model."""
    if source.kind == "builtin":
        return {"model_type": "llama", **BUILTIN_MODELS[source.location].config}
    if source.kind == "hub":
        return {}
    path = Path(source.location)
    return read_config(path / "config.json" if source.kind == "folder" else path, "model")


def git_commit(folder: Path) -> str | None:
    """Commit of the git repository that tracks the folder's config.json; None where there is none or git is missing."""
    git = ("git", "-C", str(folder))
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "config.json"], check=True, capture_output=True, timeout=10)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() or None


def model_commit(source: ModelSource, model_config: Any) -> str | None:
    """Commit of the hub snapshot that ``model_config`` was read from, or of the git folder the model lies in."""
    if source.kind == "hub":
        return getattr(model_config, "_commit_hash", None)
    if source.kind == "builtin":
        return None
    path = Path(source.location)
    return git_commit(path if path.is_dir() else path.parent)


def _from_config(model: ModelSpec, config: str, base_dir: Path) -> ModelSource:
    tokenizer = _find_tokenizer(model, str(base_dir))
    if config in BUILTIN_MODELS:
        return ModelSource(kind="builtin", location=config, random=True, tokenizer=tokenizer, tokenizer_optional=False)
    path = (base_dir / Path(config).expanduser()).resolve()
    if path.is_dir():
        path /= "config.json"
    if not path.exists() and "/" not in config and not config.endswith(".json"):
        close = difflib.get_close_matches(config, BUILTIN_MODELS, n=1)
        raise ConfigError(
            "unknown built-in model",
            f"did you mean {close[0]!r}?" if close else None,
            field="model.config",
            found=config,
            allowed=f"{', '.join(BUILTIN_MODELS)}, or the path of a config.json",
        )
    read_config(path, "model.config")
    tokenizer = tokenizer or _own_tokenizer(path.parent)
    return ModelSource(kind="file", location=str(path), random=True, tokenizer=tokenizer, tokenizer_optional=False)


def _find_tokenizer(model: ModelSpec, base_dir: str) -> str | None:
    if model.tokenizer is None:
        return None
    folder = _folder(model.tokenizer, base_dir, "model.tokenizer")
    if folder is None:
        return model.tokenizer
    if _own_tokenizer(folder) is None:
        raise ConfigError(
            "the folder holds no tokenizer", file=str(folder), field="model.tokenizer", allowed=" or ".join(TOKENIZER_FILES)
        )
    return str(folder)


def _own_tokenizer(folder: Path) -> str | None:
    return str(folder) if any((folder / name).exists() for name in TOKENIZER_FILES) else None


def _folder(name: str, base_dir: str, field: str) -> Path | None:
    """The folder that ``name`` means; None when it can only be a hub id."""
    path = (Path(base_dir) / Path(name).expanduser()).resolve()
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError("is a file, not a folder", file=str(path), field=field, found=name, allowed="a folder or a hub id")
    if name.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(name):
        raise ConfigError("the folder does not exist", file=str(path), field=field, found=name, allowed="a folder or a hub id")
    return None
