"""Rows of ``loads`` to one summary per engine: where the time to the first token went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from llem_ray.reporting.numbers import count_noun

LOAD_PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "startup": ("startup_s",),
    "queue": ("queue_s",),
    "placement": ("place_s",),
    "idle baselines and guard": ("bare_idle_s", "resident_idle_s", "guard_s"),
    "process": ("process_start_s",),
    "import": ("import_s",),
    "construct": ("construct_s",),
    "compile": ("compile_s",),
    "engine warm-up": ("warm_s",),
    "rest of the load": ("load_rest_s",),
    "prompts": ("prepare_s",),
    "warm-up batches": ("warmup_s",),
    "first token": ("first_token_s",),
}
"""Part as ``show`` names it -> columns of ``loads``; together they are ``submit_to_first_token_s``."""

SHOWN_S: Final = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSummary:
    """Loads of one engine that reached a first token; times are means over them."""

    backend: str
    loads: int
    failed: int
    """Loads without a first token."""
    parts_s: Mapping[str, float | None]
    """Key of ``LOAD_PARTS`` -> time; None where no load has it."""
    submit_to_first_token_s: float | None

    def text(self) -> str:
        """One sentence; parts of less than 5 ms are left out."""
        if self.submit_to_first_token_s is None:
            return f"{self.backend}: no first token after {count_noun(self.failed, 'load')}"
        failed = f", {self.failed} without one" if self.failed else ""
        mean = "mean of " if self.loads > 1 else ""
        shown = {name: value for name, value in self.parts_s.items() if value is not None and value >= SHOWN_S}
        parts = ", ".join(f"{name} {value:.2f}" for name, value in shown.items())
        loads = f"{mean}{count_noun(self.loads, 'load')}{failed}"
        return f"{self.backend}: {self.submit_to_first_token_s:.2f} s from submit to first token ({loads}): {parts}"


def summarise_loads(rows: Iterable[Mapping[str, Any]]) -> tuple[LoadSummary, ...]:
    """One summary per engine, in the order they were first loaded."""
    by_backend: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_backend.setdefault(str(row["backend"]), []).append(row)
    return tuple(_summarise(backend, loads) for backend, loads in by_backend.items())


def _summarise(backend: str, rows: list[Mapping[str, Any]]) -> LoadSummary:
    reached = [row for row in rows if row["submit_to_first_token_s"] is not None]
    return LoadSummary(
        backend=backend,
        loads=len(reached),
        failed=len(rows) - len(reached),
        parts_s={name: _mean(reached, columns) for name, columns in LOAD_PARTS.items()},
        submit_to_first_token_s=_mean(reached, ("submit_to_first_token_s",)),
    )


def _mean(rows: list[Mapping[str, Any]], columns: tuple[str, ...]) -> float | None:
    """Mean over all loads of the sum of the columns; a null is 0 where another load has a value, so that means add up."""
    known = [[row[column] for column in columns if row[column] is not None] for row in rows]
    return fmean(sum(values) for values in known) if any(known) else None
