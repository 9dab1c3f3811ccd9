"""Lengths that are known before prompts are made, against the prompts that are made then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import LengthSpec, LoadSpec, PromptSpec, WorkloadSpec
from llem_ray.workloads.extents import extents_of, require_context
from llem_ray.workloads.online import build_online
from llem_ray.workloads.prompts import build_requests, load_prompts
from llem_ray.workloads.traces import Arrival

SYNTHETIC = PromptSpec(source="synthetic")
SPREAD = LengthSpec(distribution="lognormal", mean=20, std=30)
SATURATED = LoadSpec(pattern="saturated")
TRACE = LoadSpec(pattern="trace", trace="t.jsonl")
LENGTHS = ((30, 4), (600, 7), (None, 9), (12, None))
ARRIVALS = tuple(Arrival(at_s=i, input_tokens=a, output_tokens=b, line=i + 1) for i, (a, b) in enumerate(LENGTHS))


def encode(texts: Any) -> list[list[int]]:
    return [[1, *(3 + len(word) for word in text.split())] for text in texts]


@pytest.mark.parametrize(
    "asked",
    [
        {"input_tokens": 12, "output_tokens": 5, "batch_size": 3},
        {"input_tokens": SPREAD, "output_tokens": SPREAD, "requests": 40, "shared_prefix_tokens": 6},
        {"input_tokens": SPREAD, "output_tokens": 4, "requests": 12, "batch_size": 2, "turns": 3, "shared_prefix_tokens": 2},
        {"input_tokens": 3, "output_tokens": SPREAD, "requests": 12, "turns": 4, "load": SATURATED},
        {"input_tokens": 8, "output_tokens": 6, "load": TRACE},
        {"input_tokens": 8, "output_tokens": 6, "load": replace(TRACE, trace_max_input_tokens=50), "requests": 3},
    ],
)
def test_lengths_are_those_of_the_prompts_to_come(asked: dict[str, Any]) -> None:
    workload = WorkloadSpec(prompts=SYNTHETIC, seed=3, **asked)
    arrivals = ARRIVALS[: workload.requests] if workload.load.pattern == "trace" else ()
    if workload.load.online:
        requests = build_online(workload, encode, 100, 10**6, trace=arrivals).requests
    else:
        requests = build_requests(workload, encode, 100, 10**6)
    made = [(len(request.prompt_token_ids), request.max_new_tokens) for request in requests]
    assert [(extent.prompt_tokens, extent.output_tokens) for extent in extents_of(workload, arrivals)] == made
    longest = max(prompt + output for prompt, output in made)
    require_context(workload, arrivals, longest, "the limit")
    with pytest.raises(ConfigError, match=rf"= {longest} tokens[^$]*allowed: at most {longest - 1} tokens together, the limit"):
        require_context(workload, arrivals, longest - 1, "the limit")


def test_prompts_of_natural_length_are_never_refused_too_early() -> None:
    workload = WorkloadSpec(output_tokens=10, requests=5)
    require_context(workload, (), 11, "the limit")
    built = build_requests(workload, encode, 10**6, 10**6, load_prompts(workload.prompts))
    assert all(len(request.prompt_token_ids) > 1 for request in built)
    with pytest.raises(ConfigError, match=r"workload.output_tokens: .* 1 prompt \+ 10 output = 11 tokens"):
        require_context(workload, (), 10, "the limit")


@pytest.mark.parametrize(
    ("asked", "field", "found"),
    [
        ({"input_tokens": 90, "output_tokens": 20}, "workload.input_tokens", "90"),
        ({"input_tokens": 20, "output_tokens": 90}, "workload.output_tokens", "90"),
        ({"input_tokens": 2, "output_tokens": 2, "shared_prefix_tokens": 101}, "workload.shared_prefix_tokens", "101"),
        ({"input_tokens": 40, "output_tokens": 20, "turns": 2}, "workload.input_tokens", "40"),
        ({"output_tokens": 60, "turns": 2}, "workload.turns", "2"),
        ({"input_tokens": LengthSpec(distribution="uniform", min=99, max=200)}, "workload.input_tokens", None),
    ],
)
def test_the_field_to_change_is_named(asked: dict[str, Any], field: str, found: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        require_context(WorkloadSpec(**asked), (), 100, "the limit")
    assert caught.value.field == field
    assert caught.value.found == found or (found is None and str(caught.value.found).endswith(" tokens"))


def test_an_arrival_that_is_too_long_is_named_by_its_line() -> None:
    workload = WorkloadSpec(prompts=SYNTHETIC, input_tokens=8, load=TRACE)
    with pytest.raises(ConfigError, match=r"t.jsonl:2: workload.load.trace: an arrival .* 600 prompt \+ 7 output = 607 tokens"):
        require_context(workload, ARRIVALS, 100, "the limit")
