"""`validate` and `plan` look at the prompts, lengths and traces that a sweep names, and say what is wrong with which line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llem_ray.cli import remote
from llem_ray.config.sweep import load_sweep
from llem_ray.core.errors import ConfigError

SWEEP = """\
schema_version: 1
name: asked
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu}
  workload: {WORKLOAD}
"""
TRACE = "load: {pattern: trace, trace: data/t.jsonl}"
MOONCAKE = '{"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}\n'

BAD = {
    "no trace": (TRACE, {}, "data/t.jsonl: workload.load.trace: the trace does not exist"),
    "line of a trace": (
        TRACE,
        {"t.jsonl": MOONCAKE + '{"timestamp": 5, "input_length": 0, "output_length": 2}\n'},
        "data/t.jsonl:2: workload.load.trace: input_length is not a length",
    ),
    "trace out of order": (TRACE, {"t.jsonl": MOONCAKE.replace("0,", "9,", 1) + MOONCAKE}, "data/t.jsonl:2: .*out of order"),
    "ids of a trace": (
        TRACE,
        {"t.jsonl": MOONCAKE + MOONCAKE.replace("[1, 2]", "[1]")},
        "data/t.jsonl:2: workload.load.trace: hash_ids do not cover the prompt",
    ),
    "prefix of a trace that shares": (
        f"shared_prefix_tokens: 8, {TRACE}",
        {"t.jsonl": MOONCAKE},
        "workload.shared_prefix_tokens: the trace's hash_ids say what prompts begin with",
    ),
    "short trace": (f"requests: 3, {TRACE}", {"t.jsonl": MOONCAKE}, "workload.requests: the trace is too short"),
    "long trace": (
        TRACE,
        {"t.jsonl": MOONCAKE + MOONCAKE.replace("0,", "9000000,", 1)},
        "measure.trial_timeout_s: .* lasts 9000 s",
    ),
    "no prompts": ("prompts: {source: file, path: data/p.jsonl}", {}, "data/p.jsonl: workload.prompts.path: .*does not exist"),
    "line of prompts": (
        "prompts: {source: file, path: data/p.jsonl}",
        {"p.jsonl": '{"prompt": "a"}\n{"prompt": 3}\n'},
        "data/p.jsonl:2: workload.prompts: is not a prompt",
    ),
    "column of prompts": (
        "prompts: {source: file, path: data/p.parquet, column: txt}",
        {},
        r"data/p.parquet: workload.prompts.column: has no column 'txt'\n  found: columns text",
    ),
    "column of a data set": (
        "prompts: {source: dataset, dataset: data/p.parquet, column: txt}",
        {},
        r"workload.prompts.column: has no column 'txt'\n  found: columns text",
    ),
    "no data set": ("prompts: {source: dataset, dataset: ./none}", {}, "workload.prompts.dataset: the data set does not exist"),
    "no lengths": (
        "output_tokens: {distribution: empirical, path: data/l.csv}",
        {},
        "data/l.csv: workload.output_tokens.path: the file of lengths does not exist",
    ),
    "line of lengths": (
        "output_tokens: {distribution: empirical, path: data/l.csv}",
        {"l.csv": "3\n0\n"},
        "data/l.csv:2: workload.output_tokens.path: not a length",
    ),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A sweep in a folder of its own: what it names is relative to it, not to where the command runs."""

    def call(workload: str, files: dict[str, str]) -> Path:
        folder = tmp_path / "study"
        (folder / "data").mkdir(parents=True)
        for name, text in files.items():
            (folder / "data" / name).write_text(text)
        pq.write_table(pa.table({"text": ["a b c"]}), folder / "data" / "p.parquet")
        (folder / "sweep.yaml").write_text(SWEEP.replace("WORKLOAD", workload))
        return folder / "sweep.yaml"

    return call


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_file_is_said_before_it_is_run(llem: Any, write: Callable[..., Path], name: str) -> None:
    workload, files, says = BAD[name]
    sweep = write(workload, files)
    told = llem("validate", sweep)
    assert (told.code, told.out) == (2, "")
    assert told.err.startswith("error: ")
    assert told.err.count("error") == 1
    assert re.search(says, told.err), told.err
    assert (llem("plan", sweep).code, llem("plan", sweep).err) == (2, told.err)
    with pytest.raises(ConfigError, match=says):
        remote.tell_unseen(load_sweep(sweep))


def test_good_files_are_valid(llem: Any, write: Callable[..., Path]) -> None:
    sweep = write(TRACE, {"t.jsonl": MOONCAKE})
    told = llem("validate", sweep)
    assert (told.code, told.err) == (0, "")
    assert "valid: 1 cell" in told.out
    assert json.loads(llem("plan", sweep, "--json").out)["counts"]["cells"] == 1


def test_what_may_lie_elsewhere_is_a_note(llem: Any, write: Callable[..., Path]) -> None:
    sweep = write("prompts: {source: file, path: /only/there.jsonl}, load: {pattern: trace, trace: /only/t.csv}", {})
    told = llem("validate", sweep)
    assert told.code == 0
    assert told.err.splitlines() == [
        "note: workload.prompts.path: /only/there.jsonl is not on this machine: it must be where the sweep runs",
        "note: workload.load.trace: /only/t.csv is not on this machine: it must be where the sweep runs",
    ]
    assert llem("submit", "--inline", sweep).code == 2


@pytest.mark.parametrize("field", ["input_tokens", "output_tokens", "turns"])
def test_lengths_that_lie_elsewhere_are_not_held_against_the_context(llem: Any, write: Callable[..., Path], field: str) -> None:
    sweep = write(f"{field}: {{distribution: empirical, path: /only/there.txt}}", {})
    told = llem("validate", sweep, "--set", "engine.backend=transformers")
    assert (told.code, told.err) == (
        0,
        f"note: workload.{field}.path: /only/there.txt is not on this machine: it must be where the sweep runs\n",
    )


def test_a_data_set_of_the_hub_is_not_fetched_to_validate(llem: Any, write: Callable[..., Path]) -> None:
    told = llem("validate", write("prompts: {source: dataset, dataset: org/data}", {}))
    assert (told.code, told.err) == (0, "")
