"""What can be refused before anything is started or measured."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from llem_ray.core.errors import ConfigError, PlacementError, PluginError
from llem_ray.core.plan import LoadGroup, Plan
from llem_ray.core.spec import Sweep
from llem_ray.core.units import NS_PER_S
from llem_ray.core.workload_spec import WorkloadSpec
from llem_ray.execution.context import check_contexts
from llem_ray.execution.engine_host import check_group
from llem_ray.execution.footprint import look_up_footprint
from llem_ray.execution.memory import local_devices, require_memory
from llem_ray.workloads.online import taken
from llem_ray.workloads.sources import Part, Sources
from llem_ray.workloads.trace_blocks import blocks_of
from llem_ray.workloads.traces import FIELD

_LENGTHS: Final = (FIELD, "workload.input_tokens", "workload.output_tokens", "workload.turns")
"""Fields whose files tell how long requests are."""


def check_prompts(plan: Plan) -> None:
    """Read every prompt source, file of lengths and trace of the plan; see that requests fit into their models' contexts.

    Raises:
        ConfigError: A file or data set is wrong, or a trace has fewer arrivals than are to be replayed, or outlasts its trial's
            deadline, or a request is longer than the context.
        PluginError: The library that reads a data set is not installed.
    """
    sources = Sources(plan.base_dir)
    for workload in dict.fromkeys(trial.experiment.workload for trial in plan.trials):
        sources.read(workload)
        _check_trace(workload, sources, plan.measure.trial_timeout_s)
    check_contexts((trial.experiment for group in plan.groups for trial in group.trials), sources, plan.base_dir)


def check_files(sweep: Sweep) -> tuple[str, ...]:
    """Read all prompts, lengths, traces and models' configs that lie on this host, as `validate` and `plan` do.

    Data sets of the hub are not looked at, and a path that is absolute and not there may be there where the sweep will run.

    Returns:
        What could not be looked at here, and why.

    Raises:
        ConfigError: A file is missing or wrong, or a trace is too short or outlasts its trial's deadline, or a request is longer
            than its model's context.
    """
    sources, notes = Sources(sweep.base_dir), dict[str, None]()
    seen = set[WorkloadSpec]()
    for workload in dict.fromkeys(cell.experiment.workload for cell in sweep.cells):
        unseen = [note for part in sources.parts(workload) if (note := _look_at(part)) is not None]
        notes |= dict.fromkeys(filter(None, unseen))
        if not any(note.startswith(FIELD) for note in unseen):
            _check_trace(workload, sources, sweep.measure.trial_timeout_s)
        if not any(note.startswith(_LENGTHS) for note in unseen):
            seen.add(workload)
    known = (cell.experiment for cell in sweep.cells if cell.experiment.workload in seen)
    check_contexts(known, sources, sweep.base_dir)
    return tuple(notes)


def _look_at(part: Part) -> str | None:
    """Read a part; a note where that cannot be done here, empty where nobody would expect it."""
    if part.on_hub:
        return ""
    path = None if part.path is None else Path(part.path)
    if path is not None and path.is_absolute() and not path.exists():
        return f"{part.field}: {part.path} is not on this machine: it must be where the sweep runs"
    try:
        part.read()
    except PluginError as error:
        return f"{part.field}: {part.path} was not looked at: {error.message}; {error.hint}"
    return None


def check_plan(plan: Plan, gpus: int, cache_dir: str, *, alone: bool = False) -> None:
    """Check every engine, its arguments, its model and every prompt source of the plan on this host.

    Args:
        plan: The plan.
        gpus: Whole GPUs that this host has.
        cache_dir: Writable folder for what is built here.
        alone: One process must serve a whole gang.

    Raises:
        PluginError: An engine is unknown or not installed; the hint is the pip command.
        ConfigError: An engine argument, a model, a country, a prompts file or an interpreter is wrong.
        PlacementError: A gang needs more GPUs than there are, or a model more memory than they have.
    """
    check_prompts(plan)
    look_up_footprint(plan.footprint)
    for group in plan.groups:
        check_load(group, gpus, plan.base_dir, cache_dir, alone=alone)
    require_memory(plan.groups, plan.base_dir, local_devices())


def check_load(group: LoadGroup, gpus: int, base_dir: str, cache_dir: str, *, alone: bool = False) -> None:
    """Check one model load on this host: its GPUs, engine, arguments and model. Not its memory.

    Args:
        group: The load.
        gpus: Whole GPUs that this host has.
        base_dir: Folder that relative paths start from.
        cache_dir: Writable folder for what is built here.
        alone: One process must serve a whole gang.

    Raises:
        PluginError: As in ``check_plan``.
        ConfigError: As in ``check_plan``.
        PlacementError: The gang needs more GPUs than there are.
    """
    if group.gpus > gpus:
        label = group.experiment.model.id or group.experiment.model.config
        raise PlacementError(
            f"the gang for {label} needs {group.gpus} GPU{'' if group.gpus == 1 else 's'}, this host has {gpus}",
            "set engine.device: cpu, or run it where the GPUs are",
        )
    check_group(group, base_dir, cache_dir, alone=alone)


def _check_trace(workload: WorkloadSpec, sources: Sources, timeout_s: float) -> None:
    arrivals = taken(workload, sources.trace(workload.load.trace))
    blocks_of(arrivals, workload)
    lasts_s = (arrivals[-1].at_s - arrivals[0].at_s) / workload.load.trace_speed if arrivals else 0.0
    if lasts_s >= timeout_s:
        raise ConfigError(
            f"a trial takes longer than its deadline: the trace {workload.load.trace} lasts {lasts_s:g} s",
            "raise measure.trial_timeout_s or workload.load.trace_speed, or set workload.requests to replay its first arrivals",
            field="measure.trial_timeout_s",
            found=f"{timeout_s:g} s",
            allowed=f"more than {lasts_s:g} s",
        )


def process_start_ns() -> int:
    """When this process started, in ns of the monotonic clock; to 10 ms."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    started_ns = int(fields[19]) * NS_PER_S // os.sysconf("SC_CLK_TCK")
    return time.monotonic_ns() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - started_ns)
