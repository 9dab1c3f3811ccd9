"""Validates `engine.engine_args` against a frozen dataclass: unknown names and wrong types are refused before any load."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from llem_ray.core.errors import ConfigError

T = TypeVar("T")

FIELD = "engine.engine_args"


def parse_engine_args(cls: type[T], values: Mapping[str, Any], field: str = FIELD) -> T:
    """Build the dataclass ``cls`` from ``values``.

    Annotations may be bool, int, float, str, Literal, ``X | None``, ``tuple[X, ...]`` and nested dataclasses. An int is taken
    where a float is asked for, a bool never where a number is.

    Args:
        cls: A dataclass whose annotations are the allowed arguments.
        values: What the sweep file says.
        field: Dotted path of ``values``, for messages.

    Raises:
        ConfigError: An argument is unknown (with a suggestion), missing or of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError("must be a mapping of arguments", field=field, found=_shown(values), allowed="a mapping")
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            raise ConfigError(
                "unknown engine argument",
                f"did you mean {close[0]!r}?" if close else None,
                field=f"{field}.{name}",
                found=str(name),
                allowed=", ".join(names),
            )
    parsed = {name: _parse(hints[name], value, f"{field}.{name}") for name, value in values.items()}
    try:
        return cls(**parsed)
    except TypeError as error:
        required = [
            f.name
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in parsed
        ]
        raise ConfigError(f"missing {', '.join(required)}", field=field, allowed=", ".join(names)) from error


def _parse(hint: Any, value: Any, field: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _parse(inner, value, field)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise _wrong(field, value, "a list")
        return tuple(_parse(arguments[0], item, f"{field}[{index}]") for index, item in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            close = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
            raise _wrong(field, value, ", ".join(str(a) for a in arguments), f"did you mean {close[0]!r}?" if close else None)
        return value
    if dataclasses.is_dataclass(hint):
        return parse_engine_args(hint, value, field)  # type: ignore[arg-type]
    return _parse_scalar(hint, value, field)


def _parse_scalar(hint: Any, value: Any, field: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise _wrong(field, value, hint.__name__)
    return value


def _wrong(field: str, value: Any, allowed: str, hint: str | None = None) -> ConfigError:
    return ConfigError("wrong value", hint, field=field, found=_shown(value), allowed=allowed)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
