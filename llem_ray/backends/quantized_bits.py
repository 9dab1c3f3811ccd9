"""How many bits a quantised weight has at least, by the name of the method or the checkpoint's own word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llem_ray.core.spec import ModelSpec

_BITS: Final = (("4bit", 4), ("fp4", 4), ("int4", 4), ("awq", 4), ("8bit", 8), ("fp8", 8), ("int8", 8))
"""Part of a method's name -> bits. The first that matches counts; methods that do not tell are in none."""


def weight_bits(config: Mapping[str, Any], model: ModelSpec) -> tuple[str | None, int | None]:
    """Method of quantisation, None without; and bits of its narrowest weights, None where that is not known.

    Args:
        config: The model's config.json.
        model: What the sweep asks for.
    """
    own = config.get("quantization_config")
    stored: Mapping[str, Any] = own if isinstance(own, Mapping) else {}
    named = stored.get("quant_method", "unnamed")
    method = model.quantization or (str(getattr(named, "value", named)) if stored else None)  # transformers makes it an enum
    if method is None:
        return None, None
    for name in ("bits", "w_bit"):
        if isinstance(stored.get(name), int):
            return method, stored[name]
    for name, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if stored.get(name):
            return method, bits
    return method, next((bits for part, bits in _BITS if part in method.lower()), None)
