"""`engine_args.lora`: one LoRA adapter that every request of a trial uses, from a folder or with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llem_ray.backends.engine_args import FIELD, parse_engine_args
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
    try:
        rank = json.loads(Path(lora.path, CONFIG_FILE).read_text(encoding="utf-8"))["r"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"not an adapter of PEFT: {error!r}", field=f"{LORA_FIELD}.path", found=lora.path) from error
    return rank if type(rank) is int else None
