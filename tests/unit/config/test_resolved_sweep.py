"""A resolved sweep as text and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llem_ray.config import load_sweep
from llem_ray.config.resolved import dump_sweep, load_resolved
from llem_ray.core.errors import ConfigError
from llem_ray.core.spec import Sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        """schema_version: 1
name: r
base: {model: {id: mødel}, engine: {engine_args: {list: [1, {a: null}], text: "ü"}}}
sweep: {workload.batch_size: [1, 1, 2, 4], sampling.temperature: [0, 0.5]}
exclude: [{workload.batch_size: 4}]
measure: {sources: [nvml, rapl], edge_guard_s: 0.25}
rates: {watts_per_gpu: 300}
footprint: {country: FRA, pue: 1.2}
order: shuffled
seed: 3
""",
        encoding="utf-8",
    )
    return load_sweep(path)


def test_it_comes_back_equal(sweep: Sweep) -> None:
    text = dump_sweep(sweep)
    back = load_resolved(text)
    assert back == sweep
    assert dump_sweep(back) == text
    assert len(sweep.cells) == 4
    assert len(sweep.dropped) == 4


def test_sections_are_written_once_and_shared_when_read(sweep: Sweep) -> None:
    text = dump_sweep(sweep)
    assert len(json.loads(text)["specs"]["model"]) == 1
    assert len({id(cell.experiment.model) for cell in load_resolved(text).cells}) == 1


def test_ids_are_kept_as_written(sweep: Sweep) -> None:
    text = dump_sweep(sweep).replace(sweep.cells[0].cell_id, "0123456789abcdef")
    assert load_resolved(text).cells[0].cell_id == "0123456789abcdef"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("{\n", "", "is not JSON"),
        ('"schema_version": 1', '"schema_version": 2', "found: 2\n  allowed: 1"),
        ('"batch_size": 2', '"batch_size": "2"', "batch_size: the resolved sweep is broken\n  found: '2'"),
        ('"batch_size": 2', '"batch": 2', "batch: the resolved sweep is broken"),
        ('"model": 0', '"model": 9', "the resolved sweep is broken: IndexError"),
        ('"dropped"', '"gone"', "the resolved sweep is broken: KeyError: 'dropped'"),
    ],
)
def test_a_broken_text_is_one_error(sweep: Sweep, old: str, new: str, says: str) -> None:
    text = dump_sweep(sweep)
    assert old in text
    with pytest.raises(ConfigError) as caught:
        load_resolved(text.replace(old, new, 1))
    assert says in str(caught.value)


def test_any_other_json_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a resolved sweep"):
        load_resolved("[]")
