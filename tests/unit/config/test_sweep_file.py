"""Loading a sweep file: what it expands to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llem_ray.config import load_sweep
from llem_ray.core.errors import ConfigError
from llem_ray.core.identity import cell_id
from llem_ray.core.spec import Sweep

BASE = "schema_version: 1\nname: s\nbase: {model: {config: llama-tiny}}\n"
Load = Callable[..., Sweep]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def call(text: str, *, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(text, encoding="utf-8")
        return load_sweep(path, overrides=overrides, environ=environ or {})

    return call


def column(sweep: Sweep, key: str) -> list[Any]:
    """The value of a dotted field in every cell."""
    values = []
    for cell in sweep.cells:
        node: Any = cell.experiment
        for part in key.split("."):
            node = node[part] if isinstance(node, Mapping) else getattr(node, part)
        values.append(node)
    return values


def test_base_alone_is_one_cell_with_defaults_filled_in(load: Load) -> None:
    sweep = load("schema_version: 1\nbase: {model: {config: llama-tiny}, sampling: {temperature: 1}}\n")
    (cell,) = sweep.cells
    assert sweep.name == "sweep"
    assert cell.settings == {}
    assert cell.experiment.model.weights == "random"
    assert repr(cell.experiment.sampling.temperature) == "1.0"
    assert (sweep.repeats, sweep.order, sweep.seed, sweep.measure.min_window_s) == (3, "interleaved", 0, 10.0)
    assert Path(sweep.base_dir).is_absolute()


def test_the_grid_is_the_product_with_the_last_axis_fastest(load: Load) -> None:
    sweep = load(BASE + "sweep:\n  workload.batch_size: [1, 2]\n  workload.output_tokens: [8, 16, 32]\n")
    pairs = list(zip(column(sweep, "workload.batch_size"), column(sweep, "workload.output_tokens"), strict=True))
    assert pairs == list(itertools.product([1, 2], [8, 16, 32]))
    assert sweep.cells[1].settings == {"workload.batch_size": 1, "workload.output_tokens": 16}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("{pow2: [1, 64]}", [1, 2, 4, 8, 16, 32, 64]),
        ("{pow2: [8, 8]}", [8]),
        ("{range: [10, 40, 10]}", [10, 20, 30, 40]),
        ("{range: [10, 39, 10]}", [10, 20, 30]),
        ("{range: [3, 1, -1]}", [3, 2, 1]),
    ],
)
def test_short_forms_of_an_axis(load: Load, values: str, expected: list[int]) -> None:
    assert column(load(BASE + f"sweep: {{workload.batch_size: {values}}}\n"), "workload.batch_size") == expected


def test_a_range_of_fractions_has_no_rounding_error(load: Load) -> None:
    sweep = load(BASE + "sweep: {sampling.temperature: {range: [0, 0.7, 0.1]}}\n")
    assert column(sweep, "sampling.temperature") == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def test_a_dependent_group_sets_several_fields_together(load: Load) -> None:
    text = """schema_version: 1
base: {workload: {prompts: {source: file, path: p.jsonl}}, engine: {engine_args: {kept: 1}}}
sweep:
  pair:
    - {model.id: a, workload: {batch_size: 8, prompts: {column: question}}}
    - {model: {id: b}, engine: {engine_args: {deep: {x: 1}}}}
"""
    first, second = load(text).cells
    assert (first.experiment.model.id, first.experiment.workload.batch_size) == ("a", 8)
    assert first.experiment.workload.prompts.path == "p.jsonl"
    assert first.settings == {"model.id": "a", "workload.batch_size": 8, "workload.prompts.column": "question"}
    assert second.experiment.engine.engine_args == {"kept": 1, "deep": {"x": 1}}


def test_an_axis_may_be_a_section(load: Load) -> None:
    sweep = load("schema_version: 1\nsweep: {model: [{id: a, revision: r}, {config: llama-tiny}]}\n")
    assert column(sweep, "model.id") == ["a", None]
    assert column(sweep, "model.weights") == ["pretrained", "random"]


def test_zip_blocks_advance_together_and_multiply_with_the_grid(load: Load) -> None:
    text = BASE + "zip:\n- {workload.input_tokens: [1, 2], workload.output_tokens: [20, 10]}\n"
    sweep = load(text + "sweep: {workload.batch_size: {pow2: [1, 2]}}\n")
    rows = zip(*(column(sweep, f"workload.{key}") for key in ("batch_size", "input_tokens", "output_tokens")), strict=True)
    assert list(rows) == [(1, 1, 20), (1, 2, 10), (2, 1, 20), (2, 2, 10)]


def test_explicit_experiments_alone_make_no_grid(load: Load) -> None:
    sweep = load(BASE + "experiments:\n- {workload.batch_size: 3}\n- {sampling: {temperature: 0.5}}\n")
    assert column(sweep, "workload.batch_size") == [3, 1]


def test_explicit_experiments_come_after_the_grid_and_are_never_excluded(load: Load) -> None:
    text = (
        BASE
        + "sweep: {workload.batch_size: [1, 2]}\nexclude: [{workload.batch_size: 2}]\nexperiments: [{workload.batch_size: 2}]\n"
    )
    sweep = load(text)
    assert column(sweep, "workload.batch_size") == [1, 2]
    (dropped,) = sweep.dropped
    assert dropped.settings == {"workload.batch_size": 2}
    assert dropped.reason == "excluded: workload.batch_size=2"


def test_a_rule_needs_all_its_fields_and_sees_defaults(load: Load) -> None:
    text = BASE + "sweep: {workload.batch_size: [1, 2, 4], sampling.seed: [0, 1]}\n"
    sweep = load(text + "exclude: [{workload.batch_size: [2, 4], sampling.seed: 1, model.dtype: auto}]\n")
    kept = list(zip(column(sweep, "workload.batch_size"), column(sweep, "sampling.seed"), strict=True))
    assert kept == [(1, 0), (1, 1), (2, 0), (4, 0)]


def test_a_rule_may_drop_combinations_that_would_be_refused(load: Load) -> None:
    text = "schema_version: 1\nsweep: {model.id: [a, null], model.config: [null, llama-tiny]}\n"
    rules = "exclude: [{model.id: a, model.config: llama-tiny}, {model.id: null, model.config: null}]\n"
    sweep = load(text + rules)
    assert [(cell.experiment.model.id, cell.experiment.model.config) for cell in sweep.cells] == [
        ("a", None),
        (None, "llama-tiny"),
    ]
    with pytest.raises(ConfigError, match="either an id or a config"):
        load(text)


def test_equal_cells_run_once_and_the_rest_is_reported(load: Load) -> None:
    sweep = load(BASE + "sweep: {sampling.temperature: [0, 0.0, 1], workload.batch_size: [4]}\n")
    assert column(sweep, "sampling.temperature") == [0.0, 1.0]
    (dropped,) = sweep.dropped
    assert dropped.reason == f"equals cell {sweep.cells[0].cell_id} (sampling.temperature=0.0, workload.batch_size=4)"


def test_a_cell_id_depends_on_the_experiment_alone(load: Load) -> None:
    one = load(BASE + "sweep: {workload.batch_size: [1, 2]}\n")
    other = load("schema_version: 1\nrepeats: 9\nbase: {model: {config: llama-tiny, seed: 0}, workload: {batch_size: 2}}\n")
    assert one.cells[1].cell_id == other.cells[0].cell_id
    assert all(cell.cell_id == cell_id(cell.experiment) and len(cell.cell_id) == 16 for cell in one.cells)


def test_variables_are_typed_when_they_are_the_whole_scalar(load: Load) -> None:
    text = BASE.replace("name: s", "name: s-${NAME:x}") + "repeats: ${N:2}\nsweep:\n  workload.batch_size:\n  - ${B:8}\n  - 1\n"
    assert (load(text).repeats, load(text).name) == (2, "s-x")
    sweep = load(text, environ={"N": "5", "B": "16", "NAME": "y"})
    assert (sweep.repeats, sweep.name, column(sweep, "workload.batch_size")) == (5, "s-y", [16, 1])


@pytest.mark.parametrize(
    ("written", "environ", "expected"),
    [
        ("${V}", {"V": "main"}, "main"),
        ("'${V}'", {"V": "123"}, "123"),
        ("${V:}", {}, None),
        ("${V:a:b}", {"V": ""}, "a:b"),
        ("$${V}-$V", {"V": "x"}, "${V}-$V"),
    ],
)
def test_variables_in_text(load: Load, written: str, environ: dict[str, str], expected: str | None) -> None:
    sweep = load(f"schema_version: 1\nbase:\n  model:\n    id: m\n    revision: {written}\n", environ=environ)
    assert column(sweep, "model.revision") == [expected]


@pytest.mark.parametrize(
    ("written", "expected"),
    [("1e-3", 0.001), ("on", "on"), ("no", "no"), ("010", 10), ("0x10", 16), ("1_000", "1_000"), ("12:30:45", "12:30:45")],
)
def test_scalars_follow_yaml_1_2(load: Load, written: str, expected: object) -> None:
    sweep = load(BASE + f"sweep: {{engine.engine_args.x: [{written}]}}\n")
    (value,) = column(sweep, "engine.engine_args.x")
    assert (value, type(value)) == (expected, type(expected))
    load(BASE + "measure: {gates: {max_cross_check_rel: 1e-3}}\n")


def test_aliases_and_merge_keys(load: Load) -> None:
    text = """schema_version: 1
base: {model: {config: llama-tiny}}
experiments:
- &a {workload.batch_size: 2, sampling.seed: 1}
- {<<: *a, sampling.seed: 2}
"""
    sweep = load(text)
    assert (column(sweep, "workload.batch_size"), column(sweep, "sampling.seed")) == ([2, 2], [1, 2])


def test_overrides(load: Load) -> None:
    text = BASE + "sweep: {workload.batch_size: [1, 2]}\n"
    sweep = load(
        text,
        overrides=[
            "model.dtype=float32",
            "base.workload.prompts.source=builtin",
            "engine.engine_args.attn_implementation=eager",
            "measure.min_window_s=2",
            "sweep.workload.batch_size=[4, 8]",
            "sweep.sampling.seed=[5]",
            "repeats=7",
            "measure.sources=[nvml, rapl]",
        ],
    )
    assert column(sweep, "model.dtype") == ["float32"] * 2
    assert column(sweep, "engine.engine_args.attn_implementation") == ["eager"] * 2
    assert (column(sweep, "workload.batch_size"), column(sweep, "sampling.seed")) == ([4, 8], [5, 5])
    assert (sweep.measure.min_window_s, sweep.repeats, sweep.measure.sources) == (2.0, 7, ("nvml", "rapl"))


def test_a_long_sweep_needs_leave(load: Load) -> None:
    text = BASE + "sweep: {sampling.seed: {range: [1, 60, 1]}, workload.seed: {range: [1, 60, 1]}}\nmax_cells: 3000\n"
    with pytest.raises(ConfigError, match="too many cells") as caught:
        load(text)
    assert "3,600 cells" in str(caught.value.found)
    assert len(load(text, overrides=["max_cells=3600"]).cells) == 3600


AXES = st.fixed_dictionaries(
    {},
    optional={
        "workload.batch_size": st.lists(st.integers(1, 9), min_size=1, max_size=4),
        "workload.output_tokens": st.lists(st.integers(1, 3), min_size=1, max_size=4),
        "sampling.temperature": st.lists(st.sampled_from([0, 0.0, 0.5, 1]), min_size=1, max_size=3),
        "engine.engine_args.x": st.lists(st.sampled_from([1, True, "1", None]), min_size=1, max_size=3),
        "model.dtype": st.lists(st.sampled_from(["auto", "float32"]), min_size=1, max_size=2),
    },
)


@settings(max_examples=60, deadline=None)
@given(axes=AXES, excluded=st.integers(1, 9))
def test_every_point_of_the_grid_is_a_cell_or_dropped(
    tmp_path_factory: pytest.TempPathFactory, axes: dict[str, list[Any]], excluded: int
) -> None:
    content: dict[str, Any] = {"schema_version": 1, "base": {"model": {"config": "llama-tiny"}}, "sweep": axes}
    batch_sizes = axes.get("workload.batch_size", [1])
    if excluded in batch_sizes and set(batch_sizes) != {excluded}:
        content["exclude"] = [{"workload.batch_size": excluded}]
    path = tmp_path_factory.mktemp("grid") / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    sweep = load_sweep(path, environ={})

    points = list(itertools.product(*axes.values()))
    assert len(sweep.cells) + len(sweep.dropped) == len(points)
    kept = {
        tuple((type(value) is bool, value) for value in point)
        for point in points
        if "exclude" not in content or dict(zip(axes, point, strict=True))["workload.batch_size"] != excluded
    }
    assert len(sweep.cells) == len(kept)
    assert len({cell.cell_id for cell in sweep.cells}) == len(sweep.cells)
    assert all(cell.cell_id == cell_id(cell.experiment) for cell in sweep.cells)
    for cell in sweep.cells:
        assert list(cell.settings) == list(axes)
        assert cell.settings.get("workload.batch_size", 1) == cell.experiment.workload.batch_size
    assert load_sweep(path, environ={}) == sweep
