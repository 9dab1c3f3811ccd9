"""JSON Schema, reference table, samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from llem_ray.config import load_sweep
from llem_ray.config.schema import field_reference, json_schema
from llem_ray.core.errors import ConfigError

ROOT = Path(__file__).parents[3]
SAMPLES = sorted((ROOT / "configs").glob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def errors(content: dict[str, Any]) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors({"schema_version": 1, **content})]


def test_the_schema_is_a_schema_and_the_committed_copy_is_current() -> None:
    VALIDATOR.check_schema(VALIDATOR.schema)
    committed = (ROOT / "docs" / "sweep.schema.json").read_text(encoding="utf-8")
    assert committed == json.dumps(json_schema(), indent=2) + "\n", "write it again: llem-ray schema > docs/sweep.schema.json"


def test_there_are_at_most_ten_samples() -> None:
    assert 1 <= len(SAMPLES) <= 10


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_a_sample_loads_and_fits_the_schema(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=../docs/sweep.schema.json\n")
    VALIDATOR.validate(yaml.safe_load(text))
    sweep = load_sweep(path, environ={})
    assert sweep.name == path.stem
    for cell in sweep.cells:
        prompts = cell.experiment.workload.prompts
        assert prompts.path is None or (Path(sweep.base_dir) / prompts.path).is_file()


@pytest.mark.parametrize(
    "content",
    [
        {"base": {"modle": {}}},
        {"base": {"workload": {"batch_size": "four"}}},
        {"sweep": {"workload.batch_size": ["x"]}},
        {"sweep": {"workload.batch_size": []}},
        {"sweep": {"workload.batchsize": [1]}},
        {"sweep": {"workload.batch_size": {"pow2": [1]}}},
        {"sweep": {"model": ["a"]}},
        {"sweep": {"pair": [{"batch": 1}]}},
        {"zip": [{"sampling.sead": [1]}]},
        {"experiments": [{"x": 1}]},
        {"exclude": [{"model.dtype": "fp8"}]},
        {"exclude": [{}]},
        {"measure": {"sample_hz": 1000}},
        {"order": "random"},
        {"schema_version": 2},
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(content: dict[str, Any], tmp_path: Path) -> None:
    assert errors(content)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"schema_version": 1, **content}))
    with pytest.raises(ConfigError):
        load_sweep(path)


def test_the_schema_takes_short_forms_groups_and_variables() -> None:
    content = {
        "name": "${NAME:x}",
        "repeats": "${N:3}",
        "base": {"engine": {"engine_args": {"any": {"thing": 1}}}, "workload": {"batch_size": "${B:1}"}},
        "sweep": {
            "pair": [{"model.id": "x", "workload": {"batch_size": 2}}],
            "engine.engine_args.deep.er": [1, {"a": 2}],
            "model": [{"id": "a"}],
            "workload.batch_size": {"pow2": [1, 8]},
            "sampling.temperature": {"range": [0, 1, 0.25]},
        },
        "exclude": [{"model.dtype": ["float16", "auto"], "engine.engine_args.x": 1}],
        "measure": {"sources": ["nvml"], "edge_guard_s": 0.5},
    }
    assert errors(content) == []


def test_the_reference_lists_every_field_with_type_default_and_description() -> None:
    rows = {row.key: row for row in field_reference()}
    assert all(row.description and row.type and row.default for row in rows.values())
    assert len(rows) == len(field_reference())
    assert rows["base.workload.batch_size"].type == "integer >= 1"
    assert rows["base.workload.batch_size"].default == "1"
    assert rows["measure.sources"].type == "non-empty list of text or auto"
    assert rows["schema_version"].default == "required"
    assert {"max_cells", "rates.watts_per_gpu", "measure.gates.min_coverage", "exclude"} <= rows.keys()
