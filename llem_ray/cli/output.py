"""What every command prints the same way: JSON, and errors with their exit codes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any, Final

import click

from llem_ray.core.errors import LlemRayError

INTERNAL: Final = 1
SOME_FAILED: Final = 3
INTERRUPTED: Final = 130

LOG = logging.getLogger(__name__)


def echo_json(value: Any) -> None:
    """Print ``value`` on stdout. Numbers that are not finite are null: JSON has none."""
    click.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False, default=str))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def tell_error(error: Exception) -> int:
    """Print the one message about ``error`` on stderr; returns the exit code."""
    if isinstance(error, LlemRayError):
        click.echo(f"error: {error}", err=True)
        LOG.debug("where it was raised", exc_info=error)
        return error.exit_code
    LOG.debug("internal error", exc_info=error)
    message = f"internal error: {type(error).__name__}: {error}"
    click.echo(f"{message}\n  hint: this is a bug in llem-ray; --verbose before the command shows where", err=True)
    return INTERNAL
