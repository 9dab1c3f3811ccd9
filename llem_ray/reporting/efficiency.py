"""The table of what prefill and decode cost, how busy the devices were, and what a million tokens emits and costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llem_ray.reporting.intervals import Uncertain, mean_interval
from llem_ray.reporting.labels import NARROW, Label
from llem_ray.reporting.numbers import count_noun, format_uncertain, format_value

Row = Mapping[str, Any]

EFFICIENCY_COLUMNS: Final = (
    "prefill_energy_j", "decode_energy_j", "phase_rest_energy_j", "total_energy_j", "prompt_tokens", "output_tokens",
    "phase_method", "mfu", "joules_per_flop", "carbon_g", "energy_cost", "currency", "prefill_energy_u_j", "decode_energy_u_j",
    "phase_residual_rel", "phase_reason",
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
_SIGMAS: Final[Mapping[str, Callable[[Row], float | None]]] = {
    "prefill_joules_per_prompt_token": _per("prefill_energy_u_j", "prompt_tokens"),
    "decode_joules_per_output_token": _per("decode_energy_u_j", "output_tokens"),
}
"""One sigma of a value of one repeat. The table shows intervals of these alone: it has no room for more."""
_HEADINGS: Final[Mapping[str, tuple[str, float]]] = {
    "prefill_joules_per_prompt_token": ("prefill\nmJ/tok", 1e3),
    "decode_joules_per_output_token": ("decode\nmJ/tok", 1e3),
    "phase_rest_share": ("rest %", 100.0),
    "mfu": ("MFU %", 100.0),
    "joules_per_flop": ("pJ/FLOP", 1e12),
    "carbon_g_per_million_output_tokens": ("gCO2\n/Mtok", 1.0),
    "cost_per_million_output_tokens": ("cost\n/Mtok", 1.0),
}


def mean_efficiency(rows: Iterable[Row]) -> dict[str, float | None]:
    """Means over a cell's completed trials; a value that no trial has is None, and so are costs in several currencies."""
    rows = list(rows)
    if len({row.get("currency") for row in rows if row.get("energy_cost") is not None}) > 1:
        rows = [{**row, "energy_cost": None} for row in rows]
    found = {name: [value for row in rows if (value := read(row)) is not None] for name, read in _VALUES.items()}
    return {name: fmean(values) if values else None for name, values in found.items()}


def efficiency_intervals(rows: Iterable[Row]) -> dict[str, Uncertain | None]:
    """Of the means: over repeats, or of a single one by the sigma of its fit; None where neither is there."""
    rows = list(rows)
    found: dict[str, Uncertain | None] = {}
    for name, read in _VALUES.items():
        known = [(value, row) for row in rows if (value := read(row)) is not None]
        sigma = _SIGMAS[name](known[0][1]) if len(known) == 1 and name in _SIGMAS else None
        found[name] = mean_interval([value for value, _ in known], sigma)
    return found


def efficiency_table(
    cells: Sequence[tuple[str, Mapping[str, float | None], Mapping[str, Uncertain | None]]],
    methods: Sequence[str],
    currencies: Sequence[str],
    residual_rel: float | None = None,
    why_no_phases: Sequence[str] = (),
) -> RenderableType | None:
    """What is known of phases, FLOP, carbon and cost; None where nothing is.

    Args:
        cells: Label of each cell, and what ``mean_efficiency`` and ``efficiency_intervals`` gave for it.
        methods: How phases were told apart.
        currencies: Of the costs.
        residual_rel: What the worst fit left over of a tick's energy.
        why_no_phases: Of trials with valid energy whose phases were not told apart.
    """
    shown = [name for name in _VALUES if any(values[name] is not None for _, values, _ in cells)]
    if not shown:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left", title_style="bold")
    table.title = "efficiency"
    table.add_column("cell", min_width=NARROW)
    for name in shown:
        table.add_column(_HEADINGS[name][0], justify="right", no_wrap=True)
    for label, values, intervals in cells:
        table.add_row(Label(label), *(Text(_value(name, values[name], intervals[name])) for name in shown))
    lines = []
    if methods:
        left = "" if residual_rel is None else f", which leaves up to {100 * residual_rel:.2g} % of a tick's energy"
        lines.append(f"Prefill by prompt tokens, decode by output tokens, told apart by {', '.join(methods)}{left}.")
        shared = ", and with steps that mix both what all their tokens share" if _MIXED in methods else ""
        lines.append(f"rest %: of the energy, in neither of them: the time between steps{shared}.")
    if why_no_phases:
        where, others = ("" if not methods else " everywhere"), len(why_no_phases) - 1
        more = f"; {count_noun(others, 'other reason')} in phase_reason" if others else ""
        lines.append(f"Prefill and decode are not told apart{where}: {why_no_phases[0]}{more}.")
    kinds = {one.kind for _, _, intervals in cells for name, one in intervals.items() if one is not None and name in _SIGMAS}
    told = {"t95": "half the width of the 95 % t-interval of the mean over repeats", "U": "2 sigma of the fit of a single repeat"}
    if kinds:
        lines.append("± of prefill and decode is " + ", or ".join(told[kind] for kind in told if kind in kinds) + ".")
    if "carbon_g_per_million_output_tokens" in shown or "cost_per_million_output_tokens" in shown:
        paid = f", cost in {', '.join(currencies)}" if currencies else ""
        lines.append(f"Mtok: a million output tokens{paid}, by the inputs of footprint.")
    return Group(table, *(Text(line, style="dim") for line in lines))


def _value(name: str, value: float | None, uncertain: Uncertain | None) -> str:
    scale = _HEADINGS[name][1]
    if value is not None and uncertain is not None and uncertain.half_width and name in _SIGMAS:
        return format_uncertain(value * scale, uncertain.half_width * scale, 4)
    return format_value(None if value is None else value * scale, 3)
