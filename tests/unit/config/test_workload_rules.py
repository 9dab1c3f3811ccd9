"""Workloads that cannot be, and distributions of lengths in a sweep file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from llem_ray.config import load_sweep
from llem_ray.config.resolved import dump_sweep, load_resolved
from llem_ray.core.errors import ConfigError
from llem_ray.core.measure_spec import SloPreset
from llem_ray.core.spec import Sweep
from llem_ray.core.workload_spec import LengthSpec, TimeSpec
from llem_ray.planning.plan import make_plan
from llem_ray.planning.serialise import plan_from_dict, plan_to_dict
from llem_ray.workloads.slo import PRESETS

TOP = "schema_version: 1\nname: s\nbase:\n  model: {config: llama-tiny}\n"  # four lines
Load = Callable[[str], Sweep]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def call(workload: str) -> Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(TOP + workload, encoding="utf-8")
        return load_sweep(path, environ={})

    return call


LENGTHS = {
    "min above max": ("uniform, min: 9, max: 3", ".min", "the bounds are impossible", "min 9, max 3", "min <= max"),
    "std below 0": ("normal, mean: 9, std: -1", ".std", "wrong value for std", "-1", "number >= 0"),
    "mean below min": ("normal, mean: 5, std: 1, min: 6", ".mean", "outside of the bounds", "5", ">= 6"),
    "mean above max": ("lognormal, mean: 50, std: 1, max: 9", ".mean", "outside of the bounds", "50", "1 to 9"),
    "mean below 1": ("normal, mean: 0.5, std: 1", ".mean", "outside of the bounds", "0.5", ">= 1"),
    "no mean": ("normal, std: 1", "", "distribution: normal needs mean", "no mean", "needed: mean, std and possible: max, min"),
    "no max": ("uniform, min: 1", "", "distribution: uniform needs max", "no max", "needed: max, min"),
    "values of a normal": ("normal, mean: 9, std: 1, values: [1]", ".values", "no meaning", "[1]", "needed: mean, std"),
    "fraction": ("fixed, mean: 2.5", ".mean", "a length is a whole number", "2.5", "a whole number >= 1"),
    "zero length": ("uniform, min: 0, max: 3", ".min", "wrong value for min", "0", "integer >= 1"),
    "zero value": ("empirical, values: [3, 0]", ".values", "wrong value for values", "[3, 0]", "list of integer >= 1"),
    "nothing to draw": ("empirical, values: []", ".values", "nothing to draw from", "[]", "at least one length"),
    "no values": ("empirical", "", "from values or from a file", "neither", "values or path"),
    "values and a file": ("empirical, values: [1], path: a.csv", "", "from values or from a file", "both", "values or path"),
    "weights short": ("empirical, values: [1, 2], weights: [1]", ".weights", "has a weight", "1 weights for 2 values", "as many"),
    "weights of a file": (
        "empirical, path: a.csv, weights: [1]",
        ".weights",
        "has a weight",
        "1 weights for 0 values",
        "as many",
    ),
    "weights 0": ("empirical, values: [1, 2], weights: [0, 0]", ".weights", "all weights are 0", "[0.0, 0.0]", "one above 0"),
    "unknown distribution": ("gamma, mean: 3", ".distribution", "wrong value", "'gamma'", "fixed, uniform, normal"),
    "unknown key": ("normal, mena: 3, std: 1", ".mena", "unknown key 'mena'", None, "distribution, mean, std"),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("field", ["input_tokens", "output_tokens"])
def test_a_distribution_that_cannot_be(load: Load, field: str, name: str) -> None:
    told, below, says, found, allowed = LENGTHS[name]
    with pytest.raises(ConfigError) as caught:
        load(f"  workload:\n    {field}:\n      {{distribution: {told}}}\n")
    error = caught.value
    assert says in error.message
    assert error.field == f"base.workload.{field}{below}"
    assert error.found == found
    assert allowed in (error.allowed or "")
    assert error.line == 7 if below else 6


def test_a_mapping_without_a_distribution(load: Load) -> None:
    with pytest.raises(ConfigError, match="distribution is missing") as caught:
        load("  workload: {input_tokens: {mean: 3}}\n")
    assert caught.value.field == "base.workload.input_tokens.distribution"
    with pytest.raises(ConfigError, match="wrong value for input_tokens") as caught:
        load("  workload: {input_tokens: many}\n")
    assert caught.value.allowed == "integer >= 1 or mapping of distribution, mean, std, min, max, values, weights, path or null"


WORKLOADS = {
    "file without a path": ("prompts: {source: file}", "prompts.source", "needs workload.prompts.path"),
    "data set without a name": ("prompts: {source: dataset}", "prompts.source", "needs workload.prompts.dataset"),
    "name of a file": ("prompts: {source: file, path: a, dataset: b}", "prompts.dataset", "no meaning with source: file"),
    "split of a file": ("prompts: {source: file, path: a, split: b}", "prompts.split", "no meaning with source: file"),
    "form of the shipped set": ("prompts: {format: sharegpt}", "prompts.format", "no meaning with source: builtin"),
    "answers twice": (
        "prompts: {source: file, path: a, format: sharegpt, answer_column: b}",
        "prompts.answer_column",
        "has answers of its own",
    ),
    "limit of random ids": ("prompts: {source: synthetic, limit: 2}", "prompts.limit", "no meaning with source: synthetic"),
    "turns of a trace": (
        "turns: 2\n    load: {pattern: trace, trace: t.csv}",
        "turns",
        "conversations are in its prompts already",
    ),
    "answers of no turns": ("turn_answers: known", "turn_answers", "those of conversations"),
    "time to think in a batch": ("turns: 2\n    think_time_s: 1", "think_time_s", "between the turns of an online load"),
    "time to think of no turns": (
        "requests: 4\n    think_time_s: 1\n    load: {pattern: saturated}",
        "think_time_s",
        "between the turns of an online load",
    ),
    "requests of turns that vary": (
        "requests: 4\n    turns: {distribution: uniform, min: 1, max: 3}",
        "requests",
        "cannot be counted where turns vary",
    ),
    "both numbers": ("turns: 2\n    requests: 4\n    conversations: 2", "conversations", "say the same"),
    "conversations of no turns": ("conversations: 2", "conversations", "a conversation is one request"),
    "no number of conversations": (
        "turns: {distribution: uniform, min: 1, max: 3}\n    load: {pattern: closed, concurrency: 1}",
        "load.pattern",
        "needs a number of conversations",
    ),
    "limit of conversations that are drawn": ("turns: 2\n    max_conversation_tokens: 9", "max_conversation_tokens", "recorded"),
    "recorded turns of no file": ("turns: recorded", "turns", "those of conversations in a file"),
    "recorded turns of a length": (
        "turns: recorded\n    input_tokens: 8\n    prompts: {source: file, path: a, format: sharegpt}",
        "input_tokens",
        "recorded messages keep their lengths",
    ),
    "turns of a word": ("turns: recoded", "turns", "wrong value for turns"),
    "turns as an answer": ("turns: {distribution: answer}", "turns.distribution", "one of output tokens"),
    "waits of no load": ("turns: 2\n    think_time_s: {distribution: fixed, mean: 1}", "think_time_s", "an online load"),
    "waits without a mean": (
        "turns: 2\n    requests: 4\n    load: {pattern: saturated}\n    think_time_s: {distribution: exponential}",
        "think_time_s",
        "distribution: exponential needs mean",
    ),
    "waits out of bounds": (
        "turns: 2\n    conversations: 2\n    load: {pattern: closed, concurrency: 1}\n"
        "    think_time_s: {distribution: exponential, mean: 3, max: 2}",
        "think_time_s.mean",
        "outside of the bounds",
    ),
    "no waits": (
        "turns: 2\n    requests: 4\n    load: {pattern: saturated}\n    think_time_s: {distribution: empirical}",
        "think_time_s",
        "draws from values",
    ),
    "no time to think": ("think_time_s: -1", "think_time_s", "wrong value for think_time_s"),
    "blocks of no trace": ("load: {trace_prefixes: false}", "load.trace_prefixes", "no meaning for the pattern batch"),
    "limit of no trace": ("load: {trace_max_input_tokens: 9}", "load.trace_max_input_tokens", "no meaning for the pattern batch"),
    "no prompt of a trace": (
        "load: {pattern: trace, trace: t.csv, trace_max_input_tokens: 0}",
        "load.trace_max_input_tokens",
        "wrong value",
    ),
    "synthetic without length": ("prompts: {source: synthetic}", "prompts.source", "no natural length"),
    "input as an answer": ("input_tokens: {distribution: answer}", "input_tokens.distribution", "one of output tokens"),
    "no answers": ("output_tokens: {distribution: answer}", "output_tokens.distribution", "no known answers"),
    "groups of nothing": ("prefix_groups: 2", "prefix_groups", "groups need a prefix"),
    "half a conversation": ("turns: 3\n    batch_size: 2\n    requests: 8", "requests", "conversations must be whole"),
    "half a conversation online": (
        "turns: 2\n    requests: 5\n    load: {pattern: saturated}",
        "requests",
        "conversations must be whole",
    ),
    "no steady state of conversations": (
        "turns: 4\n    requests: 16\n    load: {pattern: saturated, concurrency: 2}",
        "requests",
        "4 conversations of 4 turns with 2 in flight have no steady state: it takes 6 and more",
    ),
    "no output": ("output_tokens: 0", "output_tokens", "wrong value for output_tokens"),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_fields_that_do_not_go_together(load: Load, name: str) -> None:
    told, field, says = WORKLOADS[name]
    with pytest.raises(ConfigError, match=says) as caught:
        load(f"  workload:\n    {told}\n")
    assert (caught.value.field or "").removeprefix("base.workload.") == field
    assert caught.value.line is not None


SLOS = {
    "unknown preset": ("preset: mlperf-llama2", "slo.preset", "wrong value for preset", "mlperf-llama2-70b"),
    "unknown metric": ("itl_ms: 30", "slo.itl_ms", "unknown key 'itl_ms'", "preset, ttft_ms, tpot_ms, e2e_ms"),
    "no time": ("ttft_ms: 0", "slo.ttft_ms", "wrong value for ttft_ms", "number > 0"),
    "preset and limits": ("preset: mlperf-llama2-70b, e2e_ms: 9", "slo.e2e_ms", "has limits of its own", ""),
}


@pytest.mark.parametrize("name", SLOS)
def test_objectives_that_cannot_be(load: Load, name: str) -> None:
    told, field, says, allowed = SLOS[name]
    with pytest.raises(ConfigError) as caught:
        load(f"measure: {{slo: {{{told}}}}}\n")
    assert says in caught.value.message
    assert caught.value.field == f"measure.{field}"
    assert allowed in (caught.value.allowed or "")
    assert caught.value.line == 5


def test_objectives_change_a_run_and_no_cell(load: Load) -> None:
    plain, limited = load(""), load("measure: {slo: {ttft_ms: 200}}\n")
    assert [cell.cell_id for cell in plain.cells] == [cell.cell_id for cell in limited.cells]
    assert make_plan(plain).run_hash != make_plan(limited).run_hash


def test_every_preset_has_limits() -> None:
    assert set(PRESETS) == set(get_args(SloPreset))
    assert all(limits.ttft_ms and limits.tpot_ms for limits in PRESETS.values())


def test_the_axis_is_blamed_where_it_set_the_distribution(load: Load) -> None:
    with pytest.raises(ConfigError, match="bounds are impossible") as caught:
        load("sweep:\n  workload.output_tokens:\n  - 8\n  - {distribution: uniform, min: 9, max: 3}\n")
    assert caught.value.field == "sweep.workload.output_tokens[1].min"
    assert caught.value.line == 8
    assert "in the cell workload.output_tokens=" in str(caught.value.found)


NORMAL = LengthSpec(distribution="normal", mean=64, std=8)


def test_an_axis_of_numbers_and_distributions(load: Load) -> None:
    sweep = load(
        "sweep:\n  workload.output_tokens:\n  - 8\n  - {distribution: normal, mean: 64, std: 8}\n"
        "  - {distribution: empirical, values: [1, 2], weights: [1, 3]}\n"
    )
    assert [cell.experiment.workload.output_tokens for cell in sweep.cells] == [
        8,
        NORMAL,
        LengthSpec(distribution="empirical", values=(1, 2), weights=(1, 3)),
    ]
    assert sweep.cells[1].settings == {"workload.output_tokens": {"distribution": "normal", "mean": 64.0, "std": 8.0}}
    assert load_resolved(dump_sweep(sweep)) == sweep
    plan = make_plan(sweep)
    assert plan_from_dict(plan_to_dict(plan)) == plan


def test_turns_and_times_that_vary_survive_plans(load: Load) -> None:
    sweep = load(
        "  workload: {conversations: 9, input_tokens: 8, load: {pattern: closed, concurrency: 1}}\n"
        "sweep:\n  workload.turns: [3, {distribution: uniform, min: 1, max: 3}]\n"
        "  workload.think_time_s: [0, 1.5, {distribution: empirical, values: [0.5, 2], weights: [1, 3]}]\n"
    )
    asked = [(cell.experiment.workload.turns, cell.experiment.workload.think_time_s) for cell in sweep.cells]
    waits = TimeSpec(distribution="empirical", values=(0.5, 2.0), weights=(1.0, 3.0))
    turns = LengthSpec(distribution="uniform", min=1, max=3)
    assert asked == [(3, 0.0), (3, 1.5), (3, waits), (turns, 0.0), (turns, 1.5), (turns, waits)]
    assert load_resolved(dump_sweep(sweep)) == sweep
    plan = make_plan(sweep)
    assert plan_from_dict(plan_to_dict(plan)) == plan


def test_a_rule_that_names_a_distribution_drops_its_cell(load: Load) -> None:
    sweep = load(
        "sweep: {workload.output_tokens: [8, {distribution: normal, mean: 64, std: 8}]}\n"
        "exclude: [{workload.output_tokens: {distribution: normal, mean: 64, std: 8}}]\n"
    )
    assert [cell.experiment.workload.output_tokens for cell in sweep.cells] == [8]


def test_the_examples_of_the_docs_are_read(tmp_path: Path) -> None:
    page = Path(__file__).parents[3] / "docs" / "workloads.md"
    examples = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 6
    for example in examples:
        base = "" if "base:" in example else "base:\n  model: {config: llama-tiny}\n"
        (tmp_path / "sweep.yaml").write_text(f"schema_version: 1\n{base}{example}", encoding="utf-8")
        assert load_sweep(tmp_path / "sweep.yaml", environ={}).cells


def test_the_resolved_sweep_of_an_older_release_is_read(load: Load) -> None:
    """It lacks the fields that came later; cells keep their ids."""
    sweep = load("  workload: {input_tokens: 8, prompts: {source: file, path: p.jsonl}}\n")
    text = dump_sweep(sweep)
    for added in (
        '"answer_column": null, "format": "column", "dataset": null, "config": null, "split": "train", "revision": null, '
        '"limit": null, "chat_template": false',
        '"shared_prefix_tokens": 0, "prefix_groups": 1, "turns": 1, "conversations": null, '
        '"max_conversation_tokens": null, "turn_answers": "auto", "think_time_s": 0.0, ',
    ):
        assert added in text
        text = text.replace(added, "").replace(", }", "}")
    assert load_resolved(text) == sweep
