"""`engine_args.lora`: one LoRA adapter that every request of a trial uses, from a folder or with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llem_ray.backends.engine_args import FIELD, parse_engine_args
from llem_ray.backends.model_shape import linear_layers
from llem_ray.core.errors import ConfigError

LORA_FIELD: Final = f"{FIELD}.lora"
CONFIG_FILE: Final = "adapter_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraArgs:
    """What `engine_args.lora` may hold: a path, or a rank."""

    path: str | None = None
    """Folder of an adapter as PEFT saves it, relative to the sweep file."""
    rank: int | None = None
    """Rank of an adapter with random weights."""
    alpha: int | None = None
    """Its scale is alpha / rank. Default: twice the rank."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers that a random adapter changes."""
    seed: int = 0
    """Of a random adapter."""

    @property
    def scaled_alpha(self) -> int:
        """Alpha of a random adapter."""
        return self.alpha if self.alpha is not None else 2 * (self.rank or 0)


def parse_lora(engine_args: Mapping[str, Any], base_dir: str) -> LoraArgs | None:
    """The adapter that is asked for; its path is absolute afterwards.

    Raises:
        ConfigError: An argument is unknown, wrong or missing, or the folder holds no adapter.
    """
    if engine_args.get("lora") is None:
        return None
    lora = parse_engine_args(LoraArgs, engine_args["lora"], LORA_FIELD)
    if (lora.path is None) == (lora.rank is None):
        raise ConfigError("name a folder or a rank", field=LORA_FIELD, allowed="`path` of an adapter, or `rank` of a random one")
    if lora.path is None:
        for name, value in (("rank", lora.rank), ("alpha", lora.scaled_alpha)):
            if value is not None and value < 1:
                raise ConfigError("wrong value", field=f"{LORA_FIELD}.{name}", found=str(value), allowed="1 and more")
        return lora
    folder = Path(base_dir, lora.path).expanduser().absolute()
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"no adapter: there is no {CONFIG_FILE}", field=f"{LORA_FIELD}.path", found=str(folder))
    return LoraArgs(path=str(folder))


def adapter_rank(lora: LoraArgs) -> int | None:
    """The adapter's rank; None where its file does not tell.

    Raises:
        ConfigError: The file of the adapter cannot be read.
    """
    if lora.path is None:
        return lora.rank
    rank = _saved(lora.path)["r"]
    return rank if type(rank) is int else None


def require_lora_fits(lora: LoraArgs, model_config: Mapping[str, Any], *, by_rank: bool = True) -> None:
    """Refuse an adapter that is not the model's, as far as both configs tell. Its weights tell the rest once they are read.

    Args:
        lora: As ``parse_lora`` returned it.
        model_config: The model's config.json; nothing is refused where its layers are not known.
        by_rank: A rank that is larger than a layer is refused, too.

    Raises:
        ConfigError: The model has none of the layers that the adapter changes, or a rank is larger than one of them.
    """
    rank, layers = adapter_rank(lora), linear_layers(model_config)
    if layers is None:
        return
    saved = lora.path is not None
    named = _saved(lora.path).get("target_modules") if lora.path is not None else lora.target_modules
    if not isinstance(named, list | tuple):
        return  # a pattern
    targets = [str(name).rpartition(".")[2] for name in named]
    unknown = sorted({name for name in targets if name not in layers})
    if saved and "embed_tokens" in unknown:
        return
    if unknown and (not saved or len(unknown) == len(set(targets))):  # a saved one may name layers of other models besides
        raise ConfigError(
            "the adapter is of another model: this one has no such layers" if saved else "the model has no such linear layers",
            field=f"{LORA_FIELD}.path" if saved else f"{LORA_FIELD}.target_modules",
            found=", ".join(unknown) if not saved else f"{lora.path} for {', '.join(unknown)}",
            allowed=", ".join(sorted(layers)),
        )
    limits = {min(layers[name]): name for name in targets if name in layers}
    if by_rank and rank is not None and limits and rank > min(limits):
        raise ConfigError(
            f"the rank is larger than the layers {limits[min(limits)]}, which have {min(limits)}",
            field=f"{LORA_FIELD}.path" if saved else f"{LORA_FIELD}.rank",
            found=f"rank {rank}",
            allowed=f"1 to {min(limits)}",
        )


def _saved(path: str) -> Mapping[str, Any]:
    """The adapter's config, with a rank in it."""
    try:
        config: Mapping[str, Any] = json.loads(Path(path, CONFIG_FILE).read_text(encoding="utf-8"))
        _ = config["r"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"not an adapter of PEFT: {error!r}", field=f"{LORA_FIELD}.path", found=path) from error
    return config
