"""Classes of arguments from the recorded API: unknown names and wrong types are refused, as the real ones refuse them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

FACTS: dict[str, Any] = json.loads((Path(__file__).parents[3] / "data" / "tensorrt_llm_1_2_1.json").read_text())

SCALARS: dict[str, tuple[type, ...]] = {"int": (int,), "bool": (bool,), "float": (int, float), "str": (str,)}


class Arguments:
    """Base of all of them."""

    model_fields: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, **given: Any) -> None:
        name = type(self).__name__
        for field, value in given.items():
            if field not in self.model_fields:
                raise ValueError(
                    f"1 validation error for {name}\n{field}\n  Extra inputs are not permitted [type=extra_forbidden]"
                )
            problem = refuses(self.model_fields[field]["type"], value)
            if problem:
                raise ValueError(f"1 validation error for {name}\n{field}\n  {problem} [type=wrong]")
        missing = [f for f, fact in self.model_fields.items() if fact["default"] == "REQUIRED" and f not in given]
        if missing:
            raise ValueError(f"1 validation error for {name}\n{missing[0]}\n  Field required [type=missing]")
        defaults = {field: fact["default"] for field, fact in self.model_fields.items()}
        self.__dict__.update(defaults | given)


def arguments_class(name: str, fields: dict[str, dict[str, Any]]) -> type[Arguments]:
    return type(name, (Arguments,), {"model_fields": fields})


def refuses(kind: str, value: Any) -> str | None:
    """Why the annotation ``kind`` does not take the value; None where it does, or is one that is not judged here."""
    optional = re.fullmatch(r"Optional\[(.*)\]", kind)
    if optional:
        return None if value is None else refuses(optional.group(1), value)
    literal = re.fullmatch(r"Literal\[(.*)\]", kind)
    if literal:
        allowed = [word.strip("'\" ") for word in literal.group(1).split(",")]
        return None if value in allowed else f"Input should be {literal.group(1)}"
    if kind in SCALARS:
        right = isinstance(value, SCALARS[kind]) and (kind == "bool" or not isinstance(value, bool))
        return None if right else f"Input should be a valid {kind}"
    return None
