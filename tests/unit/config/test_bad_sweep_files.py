"""Bad sweep files: one clear error each, with file, line, field, found and allowed."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest

from llem_ray.config import load_sweep
from llem_ray.core.errors import ConfigError

TOP = "schema_version: 1\nbase:\n  model: {config: llama-tiny}\n"  # three lines


@dataclass
class Bad:
    """A wrong file and what its error must say."""

    text: str
    line: int | None
    says: str
    hint: str = ""
    overrides: tuple[str, ...] = ()


CASES = {
    "unknown top-level key": Bad(TOP + "repeat: 3\n", 4, "unknown key 'repeat'", "did you mean 'repeats'?"),
    "section at the top": Bad(TOP + "workload: {batch_size: 1}\n", 4, "unknown key 'workload'", "move it under base"),
    "unknown key in base": Bad(TOP + "  workload:\n    batchsize: 3\n", 5, "allowed: prompts", "did you mean 'batch_size'?"),
    "unknown section": Bad(TOP + "  modle: {}\n", 4, "base.modle: unknown key 'modle'", "did you mean 'model'?"),
    "field in the wrong place": Bad(TOP + "  batch_size: 3\n", 4, "unknown key 'batch_size'", "'workload.batch_size'"),
    "dotted key in base": Bad(TOP + "  workload.batch_size: 3\n", 4, "unknown key", "nest it"),
    "unknown key in measure": Bad(TOP + "measure:\n  warmup: {batch: 1}\n", 5, "measure.warmup.batch", "did you mean 'batches'?"),
    "wrong type": Bad(TOP + "  workload: {batch_size: '4'}\n", 4, "found: '4'\n  allowed: integer >= 1"),
    "fraction for an integer": Bad(TOP + "repeats: 2.5\n", 4, "repeats: wrong value for repeats\n  found: 2.5"),
    "truth value for an integer": Bad(TOP + "repeats: true\n", 4, "found: True"),
    "out of range": Bad(TOP + "  sampling: {top_p: 1.5}\n", 4, "found: 1.5\n  allowed: number > 0 and <= 1"),
    "yes for true": Bad(TOP + "  workload: {ignore_eos: yes}\n", 4, "found: 'yes'\n  allowed: true or false"),
    "not one of the choices": Bad(TOP + "order: random\n", 4, "allowed: interleaved, shuffled, sequential"),
    "text for a section": Bad(TOP + "  engine: vllm\n", 4, "base.engine: expected a mapping\n  found: 'vllm'"),
    "text for an open mapping": Bad(TOP + "  engine: {engine_args: [1]}\n", 4, "base.engine.engine_args: expected a mapping"),
    "list for a mapping": Bad(TOP + "sweep: [1]\n", 4, "sweep has the wrong type"),
    "mapping for a list": Bad(TOP + "zip: {workload.batch_size: [1]}\n", 4, "zip has the wrong type"),
    "unknown load pattern": Bad(
        TOP + "  workload: {load: {pattern: pareto}}\n", 4, "allowed: batch, saturated, closed, constant, poisson, gamma, trace"
    ),
    "open loop without a rate": Bad(
        TOP + "  workload: {requests: 9, load: {pattern: poisson}}\n", 4, "the pattern poisson needs rate_per_s", "rate_per_s"
    ),
    "rate of a closed loop": Bad(
        TOP + "  workload: {requests: 9, load: {pattern: closed, concurrency: 2, rate_per_s: 1}}\n",
        4,
        "rate_per_s has no meaning for the pattern closed",
        "it belongs to: constant, gamma, poisson",
    ),
    "closed loop without concurrency": Bad(
        TOP + "  workload: {requests: 9, load: {pattern: closed}}\n", 4, "the pattern closed needs concurrency"
    ),
    "burstiness of a Poisson process": Bad(
        TOP + "  workload: {requests: 9, load: {pattern: poisson, rate_per_s: 1, burstiness: 2}}\n",
        4,
        "burstiness has no meaning",
    ),
    "trace without a file": Bad(TOP + "  workload: {load: {pattern: trace}}\n", 4, "the pattern trace needs trace"),
    "speed without a trace": Bad(TOP + "  workload: {load: {trace_speed: 2}}\n", 4, "trace_speed has no meaning"),
    "load without requests": Bad(TOP + "  workload: {load: {pattern: saturated}}\n", 4, "needs a number of requests"),
    "batch size of an online load": Bad(
        TOP + "  workload: {batch_size: 4, requests: 9, load: {pattern: saturated}}\n", 4, "batch_size has no meaning"
    ),
    "too few requests for a steady state": Bad(
        TOP + "  workload: {requests: 17, load: {pattern: saturated, concurrency: 8}}\n",
        4,
        "17 requests with 8 in flight have no steady state: it takes 18 and more",
        "set workload.requests to 32 or more",
    ),
    "steady state of an open loop": Bad(
        TOP + "  workload: {requests: 9, load: {pattern: poisson, rate_per_s: 1}}\nmeasure: {window: {rule: steady_state}}\n",
        5,
        "steady_state is for saturated and closed loads, not for poisson",
    ),
    "steady state of batches": Bad(
        TOP + "measure: {window: {rule: steady_state}}\n", 4, "the rule steady_state is for online loads"
    ),
    "interval without a length": Bad(
        TOP + "measure: {window: {rule: interval, start_s: 1}}\n", 4, "an interval needs length_s", "measure.window.length_s"
    ),
    "length without an interval": Bad(TOP + "measure: {window: {length_s: 1}}\n", 4, "length_s has no meaning for the rule auto"),
    "open loop too short for MLPerf": Bad(
        TOP + "  workload: {requests: 9, load: {pattern: constant, rate_per_s: 2}}\nmeasure: {window: {rule: mlperf}}\n",
        5,
        "9 requests at 2/s last 4.5 s, the window needs 600 s",
        "set workload.requests to 1200 or more",
    ),
    "open loop beyond the deadline": Bad(
        TOP + "  workload: {requests: 900, load: {pattern: constant, rate_per_s: 0.5}}\n",
        1,
        "a trial takes 1800 s and more, its deadline is 1800 s",
        "raise measure.trial_timeout_s",
    ),
    "thinking beyond the deadline": Bad(
        TOP + "  workload: {requests: 40, turns: 4, think_time_s: 120, load: {pattern: closed, concurrency: 2}}\n",
        1,
        "a trial takes 1800 s and more, its deadline is 1800 s",
    ),
    "conversations too short for MLPerf": Bad(
        TOP
        + "  workload: {requests: 900, turns: 3, load: {pattern: poisson, rate_per_s: 1}}\nmeasure: {window: {rule: mlperf}}\n",
        5,
        "300 conversations of 3 turns at 1/s last 300 s, the window needs 600 s",
        "set workload.requests to 1800 or more",
    ),
    "warm-up limit under what is compared": Bad(
        TOP + "measure: {warmup: {until_cv: 0.1, max_batches: 4}}\n", 4, "max_batches is at least 5", "raise it"
    ),
    "cell with too few requests": Bad(
        TOP + "  workload: {requests: 9, load: {pattern: saturated}}\nsweep: {workload.load.concurrency: [2, 4]}\n",
        4,
        "found: in the cell workload.load.concurrency=4",
    ),
    "scalar for an experiment": Bad(TOP + "experiments:\n- 3\n", 5, "experiments[0]: an item of experiments is a mapping"),
    "no schema version": Bad("base: {model: {id: a}}\n", 1, "schema_version is missing", "schema_version: 1"),
    "other schema version": Bad("schema_version: 2\n", 1, "found: 2\n  allowed: 1"),
    "name that is no folder": Bad(TOP + "name: a/b\n", 4, "found: 'a/b'"),
    "top is a list": Bad("- 1\n", 1, "a sweep file is a mapping"),
    "empty file": Bad("", 1, "the file is empty"),
    "comments only": Bad("# nothing\n", 1, "the file is empty"),
    "two documents": Bad(TOP + "---\na: 1\n", 4, "a second YAML document"),
    "no YAML": Bad(TOP + "repeats: [1\nseed: 2\n", 5, "not valid YAML"),
    "tab": Bad("schema_version: 1\n\tname: x\n", 2, "not valid YAML"),
    "control character": Bad("name: \x07\n", None, "not valid YAML"),
    "duplicate key": Bad(TOP + "repeats: 1\nrepeats: 2\n", 5, "duplicate key: first on line 4, again on line 5"),
    "duplicate nested key": Bad(TOP + "  model: {id: a}\n", 4, "base.model: duplicate key: first on line 3"),
    "Python tag": Bad("a: !!python/object/apply:os.system ['false']\n", 1, "found: !!python/object/apply:os.system"),
    "own tag": Bad("a: !env X\n", 1, "YAML tags are not allowed"),
    "unknown alias": Bad("a: *b\n", 1, "alias *b has no anchor"),
    "recursive alias": Bad("a: &b [*b]\n", 1, "alias *b has no anchor before it"),
    "deep nesting": Bad("a: " + "[" * 900_000, 1, "nested too deeply"),
    "list as a key": Bad("[1, 2]: 3\n", 1, "a key must be text"),
    "merge of a scalar": Bad("base: {<<: 3}\n", 1, "a merge key takes a mapping"),
    "infinite": Bad(TOP + "measure: {min_window_s: .inf}\n", 4, "not a finite number"),
    "beyond floating point": Bad(TOP + "measure: {min_window_s: 1e999}\n", 4, "not a finite number"),
    "unset variable": Bad(TOP + "repeats: ${COUNT}\n", 4, "environment variable COUNT is not set", "export COUNT="),
    "unclosed variable": Bad(TOP + "name: x${COUNT\n", 4, "malformed variable"),
    "empty axis": Bad(TOP + "sweep:\n  workload.batch_size: []\n", 5, "this axis is empty"),
    "empty group": Bad(TOP + "sweep:\n  pair: [{}]\n", 5, "this point sets nothing"),
    "scalar axis": Bad(TOP + "sweep:\n  workload.batch_size: 4\n", 5, "an axis is a list", "[4] makes it an axis"),
    "unknown axis": Bad(TOP + "sweep:\n  workload.batchsize: [4]\n", 5, "unknown key", "did you mean 'workload.batch_size'?"),
    "bare field as an axis": Bad(TOP + "sweep:\n  batch_size: [4]\n", 5, "unknown key", "did you mean 'workload.batch_size'?"),
    "wrong value on an axis": Bad(
        TOP + "sweep:\n  workload.batch_size:\n  - 1\n  - two\n", 7, "sweep.workload.batch_size[1]: wrong value for batch_size"
    ),
    "unknown key in a group": Bad(TOP + "sweep:\n  pair:\n  - {sampling: {topp: 1}}\n", 6, "unknown key 'topp'", "'top_p'"),
    "unknown short form": Bad(TOP + "sweep:\n  workload.batch_size: {pow3: [1, 9]}\n", 5, "allowed: a list, {pow2"),
    "pow2 of no power": Bad(TOP + "sweep:\n  workload.batch_size: {pow2: [1, 48]}\n", 5, "pow2 takes two powers of two"),
    "pow2 backwards": Bad(TOP + "sweep:\n  workload.batch_size: {pow2: [8, 1]}\n", 5, "first <= last"),
    "range without end": Bad(TOP + "sweep:\n  workload.batch_size: {range: [1, 9, 0]}\n", 5, "this range is empty"),
    "range away": Bad(TOP + "sweep:\n  workload.batch_size: {range: [1, 9, -1]}\n", 5, "this range is empty"),
    "range of text": Bad(TOP + "sweep:\n  workload.batch_size: {range: [a, b, c]}\n", 5, "range takes three numbers"),
    "endless range": Bad(TOP + "sweep:\n  sampling.temperature: {range: [0, 1, 1e-12]}\n", 5, "1,000,000,000,001 values"),
    "too many cells": Bad(
        TOP + "sweep: {sampling.seed: {range: [1, 200, 1]}, workload.seed: {range: [1, 200, 1]}}\n",
        4,
        "found: 40,000 cells (sweep.sampling.seed: 200, sweep.workload.seed: 200)\n  allowed: up to 10,000",
        "max_cells: 40000",
    ),
    "zip of unequal lists": Bad(
        TOP + "zip:\n- workload.batch_size: [1]\n  sampling.seed: [1, 2]\n",
        5,
        "zip[0]: lists of one zip block differ in length\n  found: workload.batch_size: 1, sampling.seed: 2",
    ),
    "empty zip": Bad(TOP + "zip:\n- {}\n", 5, "this zip block is empty"),
    "two axes on a field": Bad(
        TOP + "sweep:\n  sampling.seed: [1]\n  g: [{sampling.seed: 2}]\n",
        6,
        "sampling.seed is already set by sweep.sampling.seed",
    ),
    "axis above an axis": Bad(
        TOP + "sweep:\n  engine.engine_args.a.b: [1]\n  engine.engine_args.a: [1]\n", 6, "engine.engine_args.a is already set"
    ),
    "set twice in an item": Bad(
        TOP + "experiments:\n- {sampling.seed: 1, sampling: {seed: 2}}\n", 5, "sampling.seed is set twice"
    ),
    "rule on an unknown field": Bad(TOP + "exclude:\n- {model.dtyp: auto}\n", 5, "unknown key", "did you mean 'model.dtype'?"),
    "rule on a section": Bad(TOP + "exclude:\n- {model: {id: a}}\n", 5, "model is a section"),
    "rule with a wrong value": Bad(TOP + "exclude:\n- {model.dtype: [fp8]}\n", 5, "found: 'fp8'"),
    "rule without fields": Bad(TOP + "exclude:\n- {}\n", 5, "this rule is empty"),
    "rule that matches nothing": Bad(TOP + "exclude:\n- {workload.batch_size: 2}\n", 5, "matches no cell", "defaults"),
    "all excluded": Bad(TOP + "exclude:\n- {workload.batch_size: 1}\n", 4, "the sweep expands to nothing: all 1 cells"),
    "no model": Bad("schema_version: 1\nbase:\n  workload: {}\n", 2, "a model needs an id or a config"),
    "id and config": Bad(TOP + "sweep:\n  model.id:\n  - a\n", 3, "either an id or a config, not both"),
    "config with pretrained weights": Bad(
        "schema_version: 1\nbase:\n  model:\n    config: c\n    weights: pretrained\n", 5, "no pretrained weights"
    ),
    "config with a revision": Bad(
        "schema_version: 1\nbase:\n  model:\n    config: c\n    revision: r\n", 5, "belongs to a hub id"
    ),
    "initializer of pretrained weights": Bad(
        "schema_version: 1\nbase:\n  model:\n    id: a\n    initializer_range: 0.1\n", 5, "for random weights"
    ),
    "prompts file without a path": Bad(TOP + "  workload:\n    prompts:\n      source: file\n", 6, "needs workload.prompts.path"),
    "path without source": Bad(TOP + "  workload:\n    prompts:\n      path: p\n", 6, "a path is for source: file"),
    "synthetic prompts of no length": Bad(
        TOP + "sweep:\n  workload.prompts.source:\n  - builtin\n  - synthetic\n",
        7,
        "no natural length (workload.prompts.source)\n  found: in the cell workload.prompts.source=synthetic",
    ),
    "token by key": Bad(TOP + "  engine:\n    engine_args:\n      hf_token: abc\n", 6, "access token", "HF_TOKEN"),
    "token by dotted key": Bad(TOP + "sweep:\n  engine.engine_args.api_key: [abc]\n", 5, "access token", "HF_TOKEN"),
    "token in a list": Bad(TOP + "  engine: {engine_args: {x: [{password: abc}]}}\n", 4, "access token", "HF_TOKEN"),
    "token by its look": Bad(TOP + "name: hf_abcdefghijklmnopqrstuv\n", 4, "found: a token (not shown)", "HF_TOKEN"),
    "GPUs chosen in the engine's interpreter": Bad(
        TOP + "  engine:\n    python: CUDA_VISIBLE_DEVICES=1 /opt/engine/bin/python\n",
        5,
        "base.engine.python: CUDA_VISIBLE_DEVICES must not be set",
    ),
    "GPUs that do not spread over the nodes": Bad(
        TOP + "  engine:\n    gpus: 3\n    tensor_parallel: 3\n    nodes: 2\n",
        7,
        "base.engine.nodes: 3 GPUs cannot be spread evenly over 2 nodes",
    ),
    "workers that do not spread over the nodes": Bad(
        TOP + "  engine:\n    tensor_parallel: 3\n    nodes: 2\n",
        6,
        "base.engine.nodes: 3 workers (tensor x pipeline x data parallel) cannot be spread evenly over 2 nodes",
    ),
    "fewer repeats than the target's first": Bad(
        TOP + "repeats: 4\nstopping: {half_width_rel: 0.02}\n", 4, "repeats: repeats is the most that a cell may get"
    ),
    "a budget smaller than one repeat": Bad(
        TOP + "repeats: 9\nstopping: {half_width_rel: 0.02, budget_s: 9}\n", 5, "the budget is smaller than one repeat"
    ),
    "a budget without a target": Bad(TOP + "repeats: 9\nstopping: {budget_s: 90}\n", 5, "without a target nothing is stopped"),
    "a target of 100 %": Bad(TOP + "repeats: 9\nstopping: {half_width_rel: 1}\n", 5, "stopping.half_width_rel"),
    "too few first repeats": Bad(TOP + "repeats: 9\nstopping: {half_width_rel: 0.1, first: 3}\n", 5, "stopping.first"),
    "a country in words": Bad(TOP + "footprint: {country: France}\n", 4, "country: not a country code\n  found: France"),
    "a country and its grid": Bad(
        TOP + "footprint:\n  grid_gco2_per_kwh: 50\n  country: FRA\n", 6, "either country or grid_gco2_per_kwh, not both"
    ),
    "a grid below zero": Bad(TOP + "footprint: {grid_gco2_per_kwh: -1}\n", 4, "found: -1\n  allowed: number >= 0 or null"),
    "a building that saves power": Bad(TOP + "footprint: {pue: 0.9}\n", 4, "found: 0.9\n  allowed: number >= 1"),
    "a price in no currency": Bad(TOP + "footprint: {price_per_kwh: 0.2}\n", 4, "price_per_kwh and currency go together"),
    "a currency in words": Bad(TOP + "footprint: {price_per_kwh: 0.2, currency: Euro}\n", 4, "not a currency code"),
    "a grid of no date": Bad(TOP + "footprint: {grid_gco2_per_kwh: 50}\n", 4, "numbers without a date", "as_of: the day"),
    "a date that is none": Bad(
        TOP + "footprint: {grid_gco2_per_kwh: 50, as_of: 2026-02-30}\n",
        4,
        "not a date\n  found: 2026-02-30",
    ),
    "an unknown key of the footprint": Bad(TOP + "footprint: {puw: 1.2}\n", 4, "footprint.puw: unknown key", "'pue'"),
    "override without value": Bad(TOP, None, "--set takes key=value", overrides=("repeats",)),
    "override of nothing": Bad(TOP, None, "unknown key 'repeat'", "did you mean 'repeats'?", ("repeat=1",)),
    "override of a bare field": Bad(TOP, None, "unknown key 'batch_size'", "'workload.batch_size'", ("batch_size=1",)),
    "override below": Bad(TOP, None, "unknown key 'batchsize' (from --set", "'batch_size'", ("workload.batchsize=1",)),
    "override of the wrong type": Bad(TOP, None, "(from --set repeats=x)\n  found: 'x'", overrides=("repeats=x",)),
    "override below a value": Bad(TOP, None, "base.model.config is not a mapping", overrides=("model.config.x=1",)),
    "override with bad YAML": Bad(TOP, None, "repeats: not valid YAML: while parsing", overrides=("repeats=[1",)),
    "override that an axis hides": Bad(
        TOP + "sweep: {sampling.seed: [1, 2]}\n",
        None,
        "sweep.sampling.seed sets sampling.seed in the cells (from --set sampling.seed=3)",
        "--set 'sweep.sampling.seed=[...]'",
        ("sampling.seed=3",),
    ),
}


@pytest.mark.parametrize("bad", CASES.values(), ids=CASES)
def test_one_clear_error(tmp_path: Path, bad: Bad) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(bad.text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_sweep(path, overrides=bad.overrides, environ={})
    error = caught.value
    assert bad.says in str(error)
    assert bad.hint in (error.hint or "")
    assert error.line == bad.line
    if not bad.overrides:
        start = f"{path}:{bad.line}: " if bad.line else f"{path}: "
        assert str(error).startswith(start)
    assert error.exit_code == 2
    assert len(str(error)) < 700
    assert "abcdefghij" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_file_of_50_mb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    with path.open("wb") as stream:
        os.truncate(stream.fileno(), 50_000_000)
    with pytest.raises(ConfigError, match=r"too large\n  found: 50,000,000 bytes\n  allowed: up to 1,000,000 bytes"):
        load_sweep(path)


def test_an_endless_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="too large"):
        load_sweep(Path("/dev/zero"))


@pytest.mark.parametrize("kind", ["lists", "merge keys"])
def test_an_alias_bomb_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "lists":
        rows = [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 30)]
        text = "\n".join(["x0: &x0 [1]", *rows])
    else:
        rows = [f"x{i}: &x{i} {{<<: [{', '.join([f'*x{i - 1}'] * 9)}]}}" for i in range(1, 30)]
        text = "\n".join(["x0: &x0 {}", *rows])
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bomb\.yaml:\d+: .*aliases expand to too many values"):
        load_sweep(path)


@pytest.mark.parametrize(
    ("raw", "says", "line"),
    [
        (b"\x7fELF\x02\x01\x01\x00", "found: a NUL byte", 1),
        (b"name: x\n\xff\xfe\x00", "found: byte 0xff at offset 8", 2),
        ("name: x\n# \u00e9".encode("latin-1"), "found: byte 0xe9", 2),
    ],
)
def test_a_binary_file_is_refused(tmp_path: Path, raw: bytes, says: str, line: int) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match="not a text file") as caught:
        load_sweep(path)
    assert says in str(caught.value)
    assert caught.value.line == line


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: No such file"):
        load_sweep(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        load_sweep(tmp_path)


def test_a_file_whose_name_cannot_name_a_run(tmp_path: Path) -> None:
    path = tmp_path / "my sweep.yaml"
    path.write_text(TOP)
    with pytest.raises(ConfigError, match="cannot name a run\n  found: my sweep"):
        load_sweep(path)
