"""What can be refused before anything is started or measured."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from llem_ray.core.errors import ConfigError, PlacementError
from llem_ray.core.plan import LoadGroup, Plan
from llem_ray.core.spec import WorkloadSpec
from llem_ray.core.units import NS_PER_S
from llem_ray.execution.engine_host import check_group
from llem_ray.execution.footprint import look_up_footprint
from llem_ray.execution.memory import local_devices, require_memory
from llem_ray.workloads.online import taken
from llem_ray.workloads.sources import Sources
from llem_ray.workloads.traces import Arrival


def check_prompts(plan: Plan) -> None:
    """Read every prompt source, file of lengths and trace of the plan.

    Raises:
        ConfigError: A file or data set is wrong, or a trace has fewer arrivals than are to be replayed, or outlasts its trial's
            deadline.
        PluginError: The library that reads a data set is not installed.
    """
    sources = Sources(plan.base_dir)
    for workload in dict.fromkeys(trial.experiment.workload for trial in plan.trials):
        sources.read(workload)
        _check_deadline(workload, taken(workload, sources.trace(workload.load.trace)), plan.measure.trial_timeout_s)


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


def _check_deadline(workload: WorkloadSpec, arrivals: Sequence[Arrival], timeout_s: float) -> None:
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
