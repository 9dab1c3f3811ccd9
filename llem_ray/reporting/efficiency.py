"""The table of what prefill and decode cost, how busy the devices were, and what a million tokens emits and costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llem_ray.reporting.numbers import format_value

Row = Mapping[str, Any]

EFFICIENCY_COLUMNS: Final = (
    "prefill_energy_j", "decode_energy_j", "phase_rest_energy_j", "total_energy_j", "prompt_tokens", "output_tokens",
    "phase_method", "mfu", "joules_per_flop", "carbon_g", "energy_cost", "currency",
)  # fmt: skip
"""Columns of ``trials`` that the table is made from."""

_MIXED: Final = "phase_token_regression"
_MILLION: Final = 1e6


def _per(numerator: str, denominator: str, scale: float = 1.0) -> Callable[[Row], float | None]:
    def ratio(row: Row) -> float | None:
        top, bottom = row.get(numerator), row.get(denominator)
        return None if top is None or not bottom else scale * top / bottom

    return ratio


_VALUES: Final[Mapping[str, Callable[[Row], float | None]]] = {
    "prefill_joules_per_prompt_token": _per("prefill_energy_j", "prompt_tokens"),
    "decode_joules_per_output_token": _per("decode_energy_j", "output_tokens"),
    "phase_rest_share": _per("phase_rest_energy_j", "total_energy_j"),
    "mfu": lambda row: row.get("mfu"),
    "joules_per_flop": lambda row: row.get("joules_per_flop"),
    "carbon_g_per_million_output_tokens": _per("carbon_g", "output_tokens", _MILLION),
    "cost_per_million_output_tokens": _per("energy_cost", "output_tokens", _MILLION),
}
_HEADINGS: Final[Mapping[str, tuple[str, float]]] = {
    "prefill_joules_per_prompt_token": ("prefill J/tok", 1.0),
    "decode_joules_per_output_token": ("decode J/tok", 1.0),
    "phase_rest_share": ("rest %", 100.0),
    "mfu": ("MFU %", 100.0),
    "joules_per_flop": ("pJ/FLOP", 1e12),
    "carbon_g_per_million_output_tokens": ("gCO2/Mtok", 1.0),
    "cost_per_million_output_tokens": ("cost/Mtok", 1.0),
}


def mean_efficiency(rows: Iterable[Row]) -> dict[str, float | None]:
    """Means over a cell's completed trials; a value that no trial has is None."""
    rows = list(rows)
    found = {name: [value for row in rows if (value := read(row)) is not None] for name, read in _VALUES.items()}
    return {name: fmean(values) if values else None for name, values in found.items()}


def efficiency_table(
    cells: Sequence[tuple[str, Mapping[str, float | None]]], methods: Sequence[str], currencies: Sequence[str]
) -> RenderableType | None:
    """What is known of phases, FLOP, carbon and cost; None where nothing is.

    Args:
        cells: Label of each cell, and what ``mean_efficiency`` gave for it.
        methods: How phases were told apart.
        currencies: Of the costs.
    """
    shown = [name for name in _VALUES if any(values[name] is not None for _, values in cells)]
    if not shown:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left", title_style="bold")
    table.title = "efficiency"
    table.add_column("cell", overflow="fold", min_width=12)
    for name in shown:
        table.add_column(_HEADINGS[name][0], justify="right", no_wrap=True)
    for label, values in cells:
        scaled = ((values[name], _HEADINGS[name][1]) for name in shown)
        table.add_row(Text(label), *(Text(format_value(None if value is None else value * scale, 3)) for value, scale in scaled))
    lines = []
    if methods:
        lines.append(f"Prefill by prompt tokens, decode by output tokens, told apart by {', '.join(methods)}.")
        shared = ", and with steps that mix both what all their tokens share" if _MIXED in methods else ""
        lines.append(f"rest %: of the energy, in neither of them: the time between steps{shared}.")
    if "carbon_g_per_million_output_tokens" in shown or "cost_per_million_output_tokens" in shown:
        paid = f", cost in {', '.join(currencies)}" if currencies else ""
        lines.append(f"Mtok: a million output tokens{paid}, by the inputs of footprint.")
    return Group(table, *(Text(line, style="dim") for line in lines))
