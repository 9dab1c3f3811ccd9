"""A LoRA adapter with random weights, in the files that PEFT writes: what an adapter costs does not depend on what it learnt."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llem_ray.backends.lora import CONFIG_FILE, LORA_FIELD, LoraArgs
from llem_ray.core.errors import ConfigError, LoadError

_FORMAT: Final = 1


def random_adapter(config: Any, lora: LoraArgs, cache_dir: Path, *, trust_remote_code: bool) -> Path:
    """Folder of the adapter, made by the first who asks.

    Both matrices are drawn as PyTorch initialises linear layers, uniform in +-1/sqrt(inputs), by the CPU's generator.

    Args:
        config: transformers config of the base model.
        lora: Its rank, alpha, modules and seed.
        cache_dir: Where it is kept for the next time.
        trust_remote_code: The base model may bring its own code.

    Raises:
        ConfigError: The model has no such modules.
        LoadError: The folder cannot be written.
    """
    assert lora.rank is not None
    shapes = _linear_shapes(config, lora.target_modules, trust_remote_code)
    facts = {"format": _FORMAT, "rank": lora.rank, "alpha": lora.scaled_alpha, "seed": lora.seed, "shapes": shapes}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    target = cache_dir / "lora-adapters" / key
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(shapes, lora, target)
        except OSError as error:
            if not target.exists():  # else another process was first
                raise LoadError(f"the random adapter cannot be written: {error}", "make the cache folder writable") from error
    return target


def _linear_shapes(config: Any, names: tuple[str, ...], trust_remote_code: bool) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every linear layer that is named."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    linear = {name: module for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
    known = {name.rpartition(".")[2] for name in linear}
    unknown = sorted(set(names) - known)
    if unknown or not names:
        raise ConfigError(
            "the model has no such linear layers",
            field=f"{LORA_FIELD}.target_modules",
            found=", ".join(unknown) or "none",
            allowed=", ".join(sorted(known)),
        )
    return {
        name: (module.out_features, module.in_features) for name, module in linear.items() if name.rpartition(".")[2] in names
    }


def _write(shapes: dict[str, tuple[int, int]], lora: LoraArgs, target: Path) -> None:
    assert lora.rank is not None
    generator = torch.Generator().manual_seed(lora.seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (outputs, inputs) in shapes.items():
        for matrix, shape in (("lora_A", (lora.rank, inputs)), ("lora_B", (outputs, lora.rank))):
            bound = shape[1] ** -0.5
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            tensors[f"base_model.model.{name}.{matrix}.weight"] = drawn
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.scaled_alpha,
        "target_modules": list(lora.target_modules),
        "bias": "none",
    }
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        folder = Path(temporary, "adapter")
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
        folder.replace(target)
