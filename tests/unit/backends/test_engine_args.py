from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from llem_ray.backends.engine_args import parse_engine_args
from llem_ray.core.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "bee"]
    count: int = 1


@dataclass(frozen=True)
class Args:
    rate: float = 1.0
    threads: int | None = None
    name: str = "x"
    on: bool = False
    ids: tuple[str, ...] | None = None
    inner: Inner | None = None


def test_defaults_and_values() -> None:
    assert parse_engine_args(Args, {}) == Args()
    values = {"rate": 2, "threads": 3, "on": True, "ids": ["u", "v"], "inner": {"kind": "bee"}}
    parsed = parse_engine_args(Args, values)
    assert parsed == Args(rate=2.0, threads=3, on=True, ids=("u", "v"), inner=Inner("bee"))
    assert type(parsed.rate) is float
    assert parse_engine_args(Args, {"threads": None, "inner": None}) == Args()


@pytest.mark.parametrize(
    ("values", "field", "allowed"),
    [
        ({"rate": "fast"}, "rate", "float"),
        ({"rate": True}, "rate", "float"),
        ({"threads": 2.5}, "threads", "int"),
        ({"threads": True}, "threads", "int"),
        ({"on": 1}, "on", "bool"),
        ({"name": None}, "name", "str"),
        ({"ids": "u"}, "ids", "a list"),
        ({"ids": ["u", 7]}, "ids[1]", "str"),
        ({"inner": 3}, "inner", "a mapping"),
        ({"inner": {"kind": "be"}}, "inner.kind", "a, bee"),
        ({"inner": {"count": 2}}, "inner", "kind, count"),
    ],
)
def test_wrong_values_name_field_and_allowed(values: dict[str, Any], field: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_engine_args(Args, values)
    assert caught.value.field == f"engine.engine_args.{field}"
    assert caught.value.allowed == allowed


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_engine_args(Args, {"thread": 1})
    assert caught.value.hint == "did you mean 'threads'?"
    assert "rate" in str(caught.value.allowed)
