"""The plan, as ``llem-ray plan`` prints it before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llem_ray.backends.batch_memory import size_text
from llem_ray.backends.memory_need import MemoryNeed
from llem_ray.core.plan import LoadGroup, Plan
from llem_ray.core.progress import format_setting
from llem_ray.core.spec import DroppedCell
from llem_ray.reporting.numbers import count_noun, format_duration, format_value

SHOWN_TRIALS: Final = 20
SHOWN_LOADS: Final = 20
SHOWN_DROPPED: Final = 10
SHOWN_NEEDS: Final = 3


@dataclass(frozen=True, slots=True)
class LoadMemory:
    """What a model load needs on each device."""

    need: MemoryNeed | None
    unknown: str | None
    """Why there is no need."""
    refusal: str | None
    """Why it cannot fit here."""
    doubt: str | None
    """Why it may not fit here."""


def plan_table(plan: Plan, memory: Sequence[LoadMemory] = (), shown_trials: int = SHOWN_TRIALS) -> RenderableType:
    """Model loads, memory, trials in run order, cells dropped and why, time and energy.

    Args:
        plan: The very object that ``submit`` runs.
        memory: What each of its load groups needs, in their order; empty: not shown.
        shown_trials: Trials listed at most; the rest is counted.
    """
    parts: list[RenderableType] = [_headline(plan), _loads(plan, memory), *_memory(memory), _trials(plan, shown_trials)]
    if plan.dropped:
        parts += _dropped(plan.dropped)
    return Group(*parts, *_estimate(plan))


def _headline(plan: Plan) -> Text:
    trials = plan.trials
    cells = len({trial.cell.cell_id for trial in trials})
    order = plan.order + (f" (seed {plan.seed})" if plan.order == "shuffled" else "")
    repeats = count_noun(plan.repeats, "repeat")
    at_most = ""
    if plan.stopping.half_width_rel is not None:
        repeats, at_most = f"{plan.stopping.first} to {repeats}", "at most "
    counted = f"{count_noun(cells, 'cell')} x {repeats} = {at_most}{count_noun(len(trials), 'trial')}"
    text = f"{plan.run_name}: {counted}, {count_noun(len(plan.groups), 'model load')}, order {order}"
    return Text(text, style="bold")


def _loads(plan: Plan, memory: Sequence[LoadMemory]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("load", justify="right")
    table.add_column("model", overflow="fold")
    table.add_column("engine", overflow="fold")
    table.add_column("dtype")
    table.add_column("GPUs", justify="right")
    if memory:
        table.add_column("memory", justify="right")
    table.add_column("trials", justify="right")
    for number, group in enumerate(plan.groups[:SHOWN_LOADS], start=1):
        experiment = group.experiment
        model = experiment.model
        random = " (random weights)" if model.config is not None or model.weights == "random" else ""
        name = f"{model.id or model.config}{f'@{model.revision}' if model.revision else ''}{random}"
        need = (_need(memory[number - 1]),) if memory else ()
        row = (str(number), Text(name), Text(_engine(group)), model.dtype, str(group.gpus), *need, str(len(group.trials)))
        table.add_row(*row)
    if len(plan.groups) > SHOWN_LOADS:
        table.add_row("", f"... and {count_noun(len(plan.groups) - SHOWN_LOADS, 'more load')}")
    return table


def _need(memory: LoadMemory) -> str:
    need = memory.need
    if need is None:
        return "unknown"
    if need.estimate_bytes is not None:
        return size_text(need.estimate_bytes)
    return f"> {size_text(need.lower_bytes)}" if need.lower_bytes else "unknown"


def _memory(memory: Sequence[LoadMemory]) -> list[Text]:
    """How the needs come about: of loads that do not fit or are not known, and of the first ones."""
    lines = []
    for number, item in enumerate(memory[:SHOWN_LOADS], start=1):
        if item.refusal is not None:
            lines.append(Text(f"Memory: load {number} does not fit here: it {item.refusal}", style="red"))
        elif item.doubt is not None:
            lines.append(Text(f"Memory: load {number} {item.doubt}", style="yellow"))
        elif item.need is None:
            lines.append(Text(f"Memory: load {number} unknown: {item.unknown}"))
        elif number <= SHOWN_NEEDS:
            lines.append(Text(f"Memory: load {number}, on each {item.need.device}: {item.need.arithmetic}"))
    return lines


def _engine(group: LoadGroup) -> str:
    engine = group.experiment.engine
    sizes = (("TP", engine.tensor_parallel), ("PP", engine.pipeline_parallel), ("DP", engine.data_parallel))
    return " ".join([engine.backend, *(f"{name}={size}" for name, size in sizes if size > 1)])


def _trials(plan: Plan, shown: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run order", justify="right")
    table.add_column("load", justify="right")
    table.add_column("trial", no_wrap=True)
    table.add_column("settings", overflow="fold")
    ordered = ((load, trial) for load, group in enumerate(plan.groups, start=1) for trial in group.trials)
    total = len(plan.trials)
    for number, (load, trial) in zip(range(1, min(shown, total) + 1), ordered, strict=False):
        settings = " ".join(f"{key}={format_setting(value)}" for key, value in trial.cell.settings.items())
        table.add_row(str(number), str(load), trial.trial_id, Text(settings or "the base experiment"))
    if total > shown:
        table.add_row("...", "", f"and {total - shown} more", "--json lists all")
    return table


def _dropped(dropped: tuple[DroppedCell, ...]) -> list[RenderableType]:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("dropped cell", overflow="fold")
    table.add_column("why", overflow="fold")
    for cell in dropped[:SHOWN_DROPPED]:
        table.add_row(Text(" ".join(f"{key}={format_setting(value)}" for key, value in cell.settings.items())), Text(cell.reason))
    if len(dropped) > SHOWN_DROPPED:
        table.add_row(f"... and {len(dropped) - SHOWN_DROPPED} more", "--json lists all")
    return [Text(f"{count_noun(len(dropped), 'cell')} dropped", style="bold"), table]


def _estimate(plan: Plan) -> list[Text]:
    estimate = plan.estimate
    time = format_duration(estimate.duration_s)
    energy = f"{format_value(estimate.energy_kwh, 3)} kWh"
    lines = []
    for name, known, text, key in (
        ("Time", estimate.duration_s is not None, time, "duration_s"),
        ("Energy", estimate.energy_kwh is not None, energy, "energy_kwh"),
    ):
        told = f"about {text}, from {estimate.basis}" if known else "unknown: " + estimate.unknown.get(key, "no basis")
        lines.append(Text(f"{name}: {told}"))
    return lines
