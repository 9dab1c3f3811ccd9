"""Errors of engines name the line of the sweep file, or the flag, as those of the file's own fields do."""

from __future__ import annotations

from pathlib import Path

import pytest

from llem_ray.config.locate import locate, locator
from llem_ray.core.errors import ConfigError

SWEEP = """\
schema_version: 1
base:
  model: {config: llama-tiny}
  engine:
    backend: vllm
    engine_args:
      lora:
        rank: 8
      seed: 1
sweep:
  engine.engine_args.max_num_seqs: [1, 2]
  shapes:
    - {workload.batch_size: 1}
experiments:
  - engine: {engine_args: {seed: 2}}
  - engine.engine_args:
      load_format: dumy
"""


def located(tmp_path: Path, error: ConfigError, *overrides: str) -> ConfigError:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return locate(error, tmp_path / "sweep.yaml", overrides=overrides)


@pytest.mark.parametrize(
    ("field", "found", "line"),
    [
        ("engine.engine_args.lora.rank", "rank 8", 8),
        ("engine.engine_args.lora", None, 7),
        ("engine.engine_args.lora.target_modules", "q", 7),  # left out: its default is wrong for this model
        ("engine.engine_args.max_num_seqs", "2", 11),
        ("engine.engine_args.load_format", "dumy", 17),
        ("engine.engine_args.seed", "2", 15),
        ("engine.backend", "vllm", 5),
        ("workload.batch_size", "1", 13),
        ("model.config", "llama-tiny", 3),
    ],
)
def test_the_line(tmp_path: Path, field: str, found: str | None, line: int) -> None:
    error = located(tmp_path, ConfigError("wrong", "try another", field=field, found=found, allowed="this"))
    assert (error.file, error.line, error.field) == (str(tmp_path / "sweep.yaml"), line, field)
    assert (error.message, error.hint, error.found, error.allowed) == ("wrong", "try another", found, "this")


@pytest.mark.parametrize("later", [None, "base: [", "schema_version: 1\n"])
def test_the_line_is_that_of_the_file_when_the_run_began(tmp_path: Path, later: str | None) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP)
    told = locator(path)
    path.unlink()
    if later is not None:
        path.write_text(later)
    error = told(ConfigError("wrong", field="engine.engine_args.lora.rank"))
    assert (error.file, error.line) == (str(path), 8)


def test_a_flag_is_named(tmp_path: Path) -> None:
    error = located(tmp_path, ConfigError("wrong", field="engine.python"), "engine.python=absent")
    assert (error.file, error.line) == (None, None)
    assert error.message == "wrong (from --set engine.python=absent)"


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("two lines set it", field="engine.engine_args.seed", found="3"),
        ConfigError("a default", field="sampling.temperature"),
        ConfigError("the whole engine", field="engine"),
        ConfigError("no field"),
        ConfigError("of another file", file="config.json", line=2, field="model.config"),
    ],
)
def test_what_cannot_be_told_stays_as_it_is(tmp_path: Path, error: ConfigError) -> None:
    assert located(tmp_path, error) is error


@pytest.mark.parametrize(("found", "line"), [("2", 11), ("4", None)])
def test_a_value_of_an_axis_is_told_from_the_base_s(tmp_path: Path, found: str, line: int | None) -> None:
    field = "engine.engine_args.max_num_seqs"
    error = located(tmp_path, ConfigError("wrong", field=field, found=found), "engine.engine_args.max_num_seqs=4")
    assert error.line == line
    assert (line is None) == ("from --set" in error.message)
