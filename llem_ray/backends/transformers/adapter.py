"""A LoRA adapter over a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from llem_ray.backends.lora import LORA_FIELD, LoraArgs, parse_lora
from llem_ray.backends.random_adapter import random_adapter
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import ConfigError, LoadError

WEIGHTS_FILE: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."


def add_adapter(config: BackendConfig, model_config: Any, model: PreTrainedModel, *, merge: bool) -> PreTrainedModel:
    """Put the adapter that the sweep file names over the model.

    Args:
        config: With `engine_args.lora`.
        model_config: transformers config of the model.
        model: Loaded, perhaps with quantised weights.
        merge: Add it to the weights instead of computing it beside them.

    Returns:
        The model, the same object unless it is merged.

    Raises:
        ConfigError: The adapter is of another model, or of a rank that no layer has.
        LoadError: It cannot be read.
    """
    lora = parse_lora(config.engine.engine_args, config.base_dir)
    assert lora is not None
    if lora.path is not None:
        folder = Path(lora.path)
    else:
        folder = random_adapter(model_config, lora, Path(config.cache_dir), trust_remote_code=config.model.trust_remote_code)
    _require_fit(folder, lora, model)
    if merge:
        from peft import PeftModel  # noqa: PLC0415 - of an extra

        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    else:
        model.load_adapter(str(folder))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:  # PEFT keeps them in 32 bits, and would compute with them so
                parameter.data = parameter.data.to(model.dtype)
    return model


def _require_fit(folder: Path, lora: LoraArgs, model: PreTrainedModel) -> None:
    """Refuse an adapter that is not the model's.

    Raises:
        ConfigError: Its matrices are not those of the model's layers, or a rank is larger than the layer.
        LoadError: The file cannot be read.
    """
    field, found = (f"{LORA_FIELD}.path", lora.path) if lora.path is not None else (f"{LORA_FIELD}.rank", str(lora.rank))
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}
    shapes = _shapes(folder)
    if not shapes:
        raise ConfigError("the adapter is empty", field=field, found=found)
    for name, shape in shapes.items():
        layer_name, _, matrix = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        layer = layers.get(layer_name)
        if matrix not in ("A", "B"):
            raise ConfigError("the adapter holds more than LoRA matrices", field=field, found=name, allowed="lora_A and lora_B")
        if layer is None:
            raise ConfigError(f"the adapter is of another model: this one has no layer {layer_name}", field=field, found=found)
        rank, width = shape if matrix == "A" else reversed(shape)
        has = layer.in_features if matrix == "A" else layer.out_features
        if width != has:
            raise ConfigError(
                f"the adapter is of another model: {name} is for {width} features, the layer has {has}", field=field, found=found
            )
        if rank > (limit := min(layer.in_features, layer.out_features)):
            raise ConfigError(
                f"the rank is larger than layer {layer_name}: {rank}, the layer has {limit}",
                field=field,
                found=f"rank {rank}",
                allowed=f"1 to {limit}",
            )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise LoadError(f"the adapter's weights cannot be read: {path}: {error}", "save it in safetensors form") from error
