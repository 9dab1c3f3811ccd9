"""Load groups, run orders, identity."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llem_ray.core.errors import PlanError
from llem_ray.core.identity import cell_id
from llem_ray.core.measure_spec import FootprintSpec, MeasureSpec
from llem_ray.core.plan import Trial
from llem_ray.core.spec import Cell, DroppedCell, EngineSpec, Experiment, ModelSpec, Order, Sweep
from llem_ray.core.workload_spec import WorkloadSpec
from llem_ray.planning import gang_gpus, make_plan, plan_from_dict, plan_to_dict, run_hash


def cell(model: str = "a", batch_size: int = 1, **engine: Any) -> Cell:
    experiment = Experiment(model=ModelSpec(id=model), engine=EngineSpec(**engine), workload=WorkloadSpec(batch_size=batch_size))
    return Cell(cell_id=cell_id(experiment), experiment=experiment, settings={"workload.batch_size": batch_size})


def sweep(*cells: Cell, **changes: Any) -> Sweep:
    made = Sweep(
        name="s",
        schema_version=1,
        cells=cells,
        dropped=(DroppedCell(settings={"x": 1}, reason="excluded"),),
        repeats=3,
        order="interleaved",
        seed=0,
        measure=MeasureSpec(),
    )
    return dataclasses.replace(made, **changes)


def batch_sizes(trials: tuple[Trial, ...]) -> list[int]:
    return [trial.experiment.workload.batch_size for trial in trials]


def test_interleaved_runs_every_other_round_backwards() -> None:
    plan = make_plan(sweep(cell(batch_size=1), cell(batch_size=2), cell(batch_size=4)))
    (group,) = plan.groups
    assert batch_sizes(group.trials) == [1, 2, 4, 4, 2, 1, 1, 2, 4]
    assert [trial.repeat for trial in group.trials] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert group.trials[3].trial_id == f"{group.trials[2].cell.cell_id}-r1"


@given(cells=st.integers(1, 12), pairs=st.integers(1, 4))
def test_a_linear_drift_cancels_over_pairs_of_interleaved_rounds(cells: int, pairs: int) -> None:
    plan = make_plan(sweep(*(cell(batch_size=size) for size in range(1, cells + 1)), repeats=2 * pairs))
    positions: Counter[str] = Counter()
    for position, trial in enumerate(plan.trials):
        positions[trial.cell.cell_id] += position
    assert len(set(positions.values())) == 1


def test_sequential_runs_cell_after_cell() -> None:
    plan = make_plan(sweep(cell(batch_size=2), cell(batch_size=1), order="sequential"))
    assert batch_sizes(plan.trials) == [2, 2, 2, 1, 1, 1]


def test_shuffled_draws_every_round_from_the_seed() -> None:
    cells = [cell(batch_size=size) for size in range(1, 17)]
    plans = [make_plan(sweep(*cells, order="shuffled", seed=seed)) for seed in (0, 0, 1)]
    rounds = [batch_sizes(plans[0].trials)[start : start + 16] for start in (0, 16, 32)]
    assert all(sorted(row) == list(range(1, 17)) for row in rounds)
    assert len({tuple(row) for row in (*rounds, list(range(1, 17)))}) == 4
    assert plans[0] == plans[1]
    assert batch_sizes(plans[2].trials) != batch_sizes(plans[0].trials)


@given(
    order=st.sampled_from(["interleaved", "shuffled", "sequential"]),
    picks=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=12, unique=True),
    repeats=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_every_plan_runs_every_repeat_once_and_loads_once(
    order: Order, picks: list[tuple[str, int, int]], repeats: int, seed: int
) -> None:
    cells = [cell(model, size, tensor_parallel=parallel) for model, size, parallel in picks]
    made = sweep(*cells, order=order, repeats=repeats, seed=seed)
    plan = make_plan(made)
    wanted = {f"{one.cell_id}-r{repeat}" for one in cells for repeat in range(repeats)}
    assert len(plan.trials) == len(wanted)
    assert {trial.trial_id for trial in plan.trials} == wanted
    assert len({group.load_key for group in plan.groups}) == len(plan.groups)
    assert len(plan.groups) == len({(model, parallel) for model, _, parallel in picks})
    for group in plan.groups:
        assert {(trial.experiment.model, trial.experiment.engine.world_size) for trial in group.trials} == {
            (group.experiment.model, group.gpus)
        }
    models = [group.experiment.model.id for group in plan.groups]
    assert len([1 for here, after in itertools.pairwise(models) if here != after]) == len(set(models)) - 1
    assert make_plan(made) == plan


def test_groups_of_a_model_follow_each_other() -> None:
    plan = make_plan(sweep(cell("b"), cell("a"), cell("b", tensor_parallel=2), cell("b", batch_size=2)))
    assert [(group.experiment.model.id, group.gpus, len(group.trials)) for group in plan.groups] == [
        ("b", 1, 6),
        ("b", 2, 3),
        ("a", 1, 3),
    ]


@pytest.mark.parametrize(
    ("engine", "available", "gpus"),
    [
        ({}, None, 1),
        ({}, 0, 0),
        ({}, 8, 1),
        ({"device": "cpu", "tensor_parallel": 2}, 8, 0),
        ({"device": "cuda", "tensor_parallel": 2, "pipeline_parallel": 3}, 0, 6),
        ({"device": "cpu", "gpus": 2}, 8, 2),
    ],
)
def test_gpus_of_a_gang(engine: dict[str, Any], available: int | None, gpus: int) -> None:
    assert gang_gpus(EngineSpec(**engine), available) == gpus
    assert make_plan(sweep(cell(**engine)), gpus_available=available).groups[0].gpus == gpus


def test_the_run_hash_covers_what_is_measured_and_how() -> None:
    made = sweep(cell(), cell(batch_size=2))
    assert len(run_hash(made)) == 8
    assert make_plan(made).run_name == f"s-{run_hash(made)}"
    same = [{"name": "t"}, {"footprint": FootprintSpec(country="FRA")}, {"base_dir": "/elsewhere"}, {"dropped": ()}]
    other = [
        {"cells": made.cells[:1]},
        {"cells": made.cells[::-1]},
        {"repeats": 4},
        {"order": "sequential"},
        {"seed": 1},
        {"measure": MeasureSpec(min_window_s=11.0)},
    ]
    assert {run_hash(dataclasses.replace(made, **change)) for change in same} == {run_hash(made)}
    assert len({run_hash(dataclasses.replace(made, **change)) for change in (*other, {})}) == len(other) + 1


def test_a_plan_comes_back_from_json() -> None:
    measure = MeasureSpec(sources=("nvml", "rapl"), edge_guard_s=0.5)
    plan = make_plan(sweep(cell(engine_args={"x": [1, {"y": None}]}), cell("b", 2), measure=measure))
    data = json.loads(json.dumps(plan_to_dict(plan), allow_nan=False))
    assert plan_from_dict(data) == plan
    assert data["counts"] == {"cells": 2, "trials": 6, "loads": 2, "dropped": 1}
    assert data["groups"][0]["trials"][0] == {
        "trial_id": f"{plan.trials[0].trial_id}",
        "cell_id": plan.trials[0].cell.cell_id,
        "repeat": 0,
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [({"schema_version": 9}, "schema version 9"), ({"cells": {}}, "broken: KeyError"), ({"groups": [3]}, "broken: TypeError")],
)
def test_a_broken_record_is_one_error(change: dict[str, Any], says: str) -> None:
    data = plan_to_dict(make_plan(sweep(cell())))
    with pytest.raises(PlanError, match=says):
        plan_from_dict({**data, **change})
