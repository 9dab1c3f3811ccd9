"""Sweep to Plan: trials, load groups and their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llem_ray.core.identity import canonical_json, digest, load_key
from llem_ray.core.measure_spec import StoppingSpec
from llem_ray.core.plan import LoadGroup, Plan, Trial
from llem_ray.core.spec import Cell, EngineSpec, Order, Sweep
from llem_ray.planning.estimate import PastRun, estimate_cost


def make_plan(sweep: Sweep, *, past_run: PastRun | None = None, gpus_available: int | None = None) -> Plan:
    """The trials of a sweep, grouped by loaded model and put into run order. Equal sweeps give equal plans.

    Groups keep the order in which their models first appear in the sweep, so that groups of one model follow each other.

    Args:
        sweep: A resolved sweep.
        past_run: What trials cost in an earlier run, for the estimate; else ``sweep.rates`` is used.
        gpus_available: GPUs there are; with 0, ``engine.device: auto`` means the CPU. None when that is not known.
    """
    groups = tuple(
        LoadGroup(
            load_key=key,
            trials=_order_trials(cells, sweep.repeats, sweep.order, f"{sweep.seed}/{key}"),
            gpus=gang_gpus(cells[0].experiment.engine, gpus_available),
        )
        for key, cells in _group_cells(sweep.cells)
    )
    return Plan(
        name=sweep.name,
        run_hash=run_hash(sweep),
        groups=groups,
        dropped=sweep.dropped,
        repeats=sweep.repeats,
        order=sweep.order,
        seed=sweep.seed,
        measure=sweep.measure,
        estimate=estimate_cost(groups, sweep.measure, sweep.rates, past_run),
        base_dir=sweep.base_dir,
        stopping=sweep.stopping,
        footprint=sweep.footprint,
    )


def run_hash(sweep: Sweep) -> str:
    """8 hex digits over what a run measures and how: cells, repeats, order, seed, measure.

    Not its name, rates, footprint or folder.
    """
    identity: dict[str, Any] = {
        "cells": [cell.cell_id for cell in sweep.cells],
        "repeats": sweep.repeats,
        "order": sweep.order,
        "seed": sweep.seed,
        "measure": sweep.measure,
    }
    if sweep.stopping != StoppingSpec():
        identity["stopping"] = sweep.stopping
    return digest(canonical_json(identity), 8)


def trial_id(cell_id: str, repeat: int) -> str:
    """``<cell_id>-r<repeat>``, repeats counted from 0."""
    return f"{cell_id}-r{repeat}"


def gang_gpus(engine: EngineSpec, gpus_available: int | None) -> int:
    """Whole GPUs that a gang of this engine holds; 0 on the CPU."""
    if engine.gpus is not None:
        return engine.gpus
    on_cpu = engine.device == "cpu" or (engine.device == "auto" and gpus_available == 0)
    return 0 if on_cpu else engine.world_size


def _group_cells(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    keys: dict[tuple[int, int, bool], str] = {}
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        # Cells share their section objects, which stay alive in `cells`: hash each pair of objects once.
        online = cell.experiment.workload.load.online
        pair = (id(cell.experiment.model), id(cell.experiment.engine), online)
        key = keys.get(pair)
        if key is None:
            key = keys[pair] = load_key(cell.experiment.model, cell.experiment.engine, online=online)
        groups.setdefault(key, []).append(cell)
    first: dict[str, int] = {}
    for members in groups.values():
        first.setdefault(_model_name(members[0]), len(first))
    return sorted(groups.items(), key=lambda item: first[_model_name(item[1][0])])


def _model_name(cell: Cell) -> str:
    model = cell.experiment.model
    return canonical_json([model.id, model.config])


def _order_trials(cells: Sequence[Cell], repeats: int, order: Order, seed: str) -> tuple[Trial, ...]:
    """Trials of one load group in run order.

    ``interleaved``: rounds of all cells, odd rounds backwards, so that a linear drift cancels over every pair of rounds.
    ``shuffled``: rounds of all cells, each sorted by the hash of seed, round and cell: it depends on nothing else, not on
    the Python version. ``sequential``: cell after cell, each with all its repeats.
    """
    if order == "sequential":
        return tuple(_trial(cell, repeat) for cell in cells for repeat in range(repeats))
    trials: list[Trial] = []
    for repeat in range(repeats):
        if order == "shuffled":
            prefix = f"{seed}/{repeat}/"
            row = sorted(cells, key=lambda cell: digest(prefix + cell.cell_id, 64))
        else:
            row = list(reversed(cells)) if repeat % 2 else list(cells)
        trials.extend(_trial(cell, repeat) for cell in row)
    return tuple(trials)


def _trial(cell: Cell, repeat: int) -> Trial:
    return Trial(trial_id=trial_id(cell.cell_id, repeat), cell=cell, repeat=repeat)
