"""Loads engines and power sources by entry point, ours by the same door as third-party ones."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final, Literal

from llem_ray.core.errors import PluginError

Group = Literal["llem_ray.backends", "llem_ray.power_sources"]

EXTRAS: Final = {
    "transformers": "transformers",
    "vllm": "vllm",
    "tensorrt": "tensorrt-llm",
    "codecarbon": "codecarbon",
}
"""Plug-in name -> the extra of llem-ray that installs what it needs."""


def install_command(*extras: str) -> str:
    """The pip command for extras of llem-ray. It is on no package index: the checkout that runs is named, else any will do."""
    checkout = Path(__file__).resolve().parents[2]
    wanted = f"[{','.join(extras)}]"
    if (checkout / "pyproject.toml").is_file():
        return f"pip install '{checkout}{wanted}'"
    return f"pip install '.{wanted}' in a checkout of llem-ray"


def plugin_names(group: Group) -> tuple[str, ...]:
    """Names registered under ``group``, sorted. Imports none of them."""
    return tuple(sorted({entry.name for entry in entry_points(group=group)}))


def find_plugin(group: Group, name: str) -> EntryPoint:
    """The entry point called ``name``.

    Raises:
        PluginError: No such plug-in; the message lists those there are.
    """
    for entry in entry_points(group=group):
        if entry.name == name:
            return entry
    known = ", ".join(plugin_names(group)) or "none"
    kind = "engine" if group == "llem_ray.backends" else "power source"
    raise PluginError(f"unknown {kind} {name!r}; known: {known}")


def load_plugin(group: Group, name: str) -> Any:
    """Import the plug-in's module and return its factory.

    Raises:
        PluginError: It is unknown, or a package it needs is not installed; the hint is the exact pip command.
    """
    entry = find_plugin(group, name)
    try:
        return entry.load()
    except (ImportError, OSError) as error:  # OSError: a shared library of the package is broken
        extra = EXTRAS.get(name)
        hint = install_command(extra) if extra else None
        raise PluginError(f"{name!r} cannot be imported: {error}", hint) from error
