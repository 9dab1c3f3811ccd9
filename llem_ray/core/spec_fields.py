"""How fields of a sweep file are declared.

Bounds are ``annotated_types``, which an engine's own interpreter may lack: there they mean nothing, since they were checked where
the sweep file was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

try:
    from annotated_types import Ge, Gt, Le, Lt, MinLen
except ModuleNotFoundError:
    Ge = Gt = Le = Lt = MinLen = lambda bound: bound  # type: ignore[assignment, misc, return-value]

__all__ = ["ADDED", "HASHED_IF_SET", "STRICT", "Ge", "Gt", "Le", "Lt", "MinLen"]

STRICT: Final[Mapping[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

HASHED_IF_SET: Final = "hashed_if_set"

ADDED: Final[Mapping[str, Any]] = {HASHED_IF_SET: True}
"""Of a field that came later: at its default it is in no hash, so that cells and runs from before keep their ids."""
