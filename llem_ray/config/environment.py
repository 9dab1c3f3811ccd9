"""``${VAR}`` and ``${VAR:default}`` in the text of a sweep file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from llem_ray.core.errors import ConfigError

_VARIABLE: Final = re.compile(r"\$\$\{|\$\{(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<rest>:(?P<default>[^}]*))?\})?")


def substitute(text: str, environ: Mapping[str, str], error: Callable[..., ConfigError]) -> str:
    """Replace variables by their values; ``$${`` stands for a literal ``${``.

    A variable that is unset or empty takes its default. ``error`` makes the ConfigError for this place.

    Raises:
        ConfigError: A variable without a default is not set, or the ``${`` is not closed.
    """
    if "${" not in text:
        return text

    def value(match: re.Match[str]) -> str:
        if match.group() == "$${":
            return "${"
        name = match["name"]
        if name is None:
            raise error("malformed variable", found=repr(text), allowed="${VAR} or ${VAR:default}; $${ for a literal ${")
        if environ.get(name):
            return environ[name]
        if match["rest"] is not None:
            return match["default"]
        if name in environ:
            return ""
        raise error(
            f"environment variable {name} is not set",
            found=f"${{{name}}}",
            hint=f"export {name}=..., or give a default: ${{{name}:default}}",
        )

    return _VARIABLE.sub(value, text)
