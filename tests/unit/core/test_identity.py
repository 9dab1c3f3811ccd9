"""Content hashes of experiments and loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llem_ray.config.sweep import load_sweep
from llem_ray.core.identity import canonical_json, cell_id, digest, load_key
from llem_ray.core.spec import EngineSpec, Experiment, ModelSpec, SamplingSpec
from llem_ray.core.spec_fields import HASHED_IF_SET
from llem_ray.core.workload_spec import LengthSpec, LoadSpec, PromptSpec, WorkloadSpec
from llem_ray.planning.plan import make_plan

ONE = Experiment(model=ModelSpec(id="a"), engine=EngineSpec(engine_args={"x": 1, "y": [None, {"b": 1.5}]}))


def test_canonical_json_sorts_keys_and_keeps_text() -> None:
    assert canonical_json({"b": (1, 2.5), "a": None, "é": True}) == '{"a":null,"b":[1,2.5],"é":true}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


def test_a_digest_is_the_head_of_sha_256() -> None:
    assert digest("abc", 16) == "ba7816bf8f01cfea"  # FIPS 180-2, appendix B.1
    assert (len(cell_id(ONE)), len(load_key(ONE.model, ONE.engine))) == (16, 16)


def test_the_order_of_keys_does_not_matter() -> None:
    args = {"y": [None, {"b": 1.5}], "x": 1}
    other = dataclasses.replace(ONE, engine=dataclasses.replace(ONE.engine, engine_args=args))
    assert cell_id(other) == cell_id(ONE)


@pytest.mark.parametrize(
    ("change", "same_load"),
    [
        ({"model": ModelSpec(id="a", dtype="float16")}, False),
        ({"engine": EngineSpec(tensor_parallel=2)}, False),
        ({"workload": WorkloadSpec(batch_size=2)}, True),
        ({"sampling": SamplingSpec(seed=1)}, True),
    ],
)
def test_every_field_counts_and_only_model_and_engine_need_a_load(change: dict[str, Any], same_load: bool) -> None:
    other = dataclasses.replace(ONE, **change)
    assert cell_id(other) != cell_id(ONE)
    assert (load_key(other.model, other.engine) == load_key(ONE.model, ONE.engine)) is same_load


def test_ids_of_the_first_release_stay() -> None:
    """Fields that came later are no part of an id until they are used: results and caches of before keep their cells."""
    first = Experiment(model=ModelSpec(config="llama-tiny", weights="random"))
    assert cell_id(first) == "31646fd57e93d0a8"


@pytest.mark.parametrize(
    "workload",
    [
        WorkloadSpec(turns=2),
        WorkloadSpec(turn_answers="generated"),
        WorkloadSpec(think_time_s=1.0),
        WorkloadSpec(load=LoadSpec(trace_prefixes=False)),
        WorkloadSpec(load=LoadSpec(trace_max_input_tokens=9)),
        WorkloadSpec(shared_prefix_tokens=8),
        WorkloadSpec(prefix_groups=2),
        WorkloadSpec(output_tokens=LengthSpec(distribution="fixed", mean=32)),
        WorkloadSpec(prompts=PromptSpec(chat_template=True)),
        WorkloadSpec(prompts=PromptSpec(limit=3)),
    ],
)
def test_an_added_field_counts_once_it_is_used(workload: WorkloadSpec) -> None:
    assert cell_id(dataclasses.replace(ONE, workload=workload)) != cell_id(ONE)


def test_added_fields_have_a_plain_default() -> None:
    for spec in (PromptSpec, WorkloadSpec, LoadSpec):
        added = [item for item in dataclasses.fields(spec) if HASHED_IF_SET in item.metadata]
        assert added
        assert all(item.default is not dataclasses.MISSING for item in added)


def test_fields_that_came_later_leave_older_ids_alone() -> None:
    """Results of older versions are found by these ids: they were computed before online loads and their gates existed."""
    sweep = load_sweep(Path(__file__).parents[3] / "configs" / "careful.yaml")
    plan = make_plan(sweep)
    assert (plan.run_hash, sweep.cells[0].cell_id) == ("775fa85a", "9ae0cbe6c7a6db59")
    assert plan.groups[0].load_key == "0f216d2a0bae2d0f"


def test_a_later_field_counts_once_it_is_set() -> None:
    online = dataclasses.replace(ONE, workload=WorkloadSpec(load=LoadSpec(pattern="saturated")))
    assert cell_id(online) != cell_id(ONE)
    assert load_key(ONE.model, ONE.engine, online=True) != load_key(ONE.model, ONE.engine)
