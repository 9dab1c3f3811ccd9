"""Traces of arrivals: three shapes, and one clear error for each way they are wrong."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from llem_ray.core.backend import Request
from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import LengthSpec, LoadSpec, PromptSpec, WorkloadSpec
from llem_ray.workloads.online import build_online
from llem_ray.workloads.traces import load_trace

OWN = "timestamp_s,input_tokens,output_tokens\n0.5,8,3\n0.75,2,1\n"
MOONCAKE = (
    '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n'
    '{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46]}\n'
)
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "text", "gap_s", "lengths"),
    [
        ("own.csv", OWN, 0.25, [(8, 3), (2, 1)]),
        ("own.csv", "timestamp_s\n1\n2\n", 1.0, [(None, None), (None, None)]),
        ("own.jsonl", '{"timestamp_s": 1}\n\n{"timestamp_s": 4.5, "output_tokens": 7}\n', 3.5, [(None, None), (None, 7)]),
        ("mooncake.jsonl", MOONCAKE, 3.053, [(6955, 52), (6472, 26)]),
        ("azure.csv", AZURE, 4.314579, [(374, 44), (396, 109)]),
    ],
)
def test_shapes(tmp_path: Path, name: str, text: str, gap_s: float, lengths: list[tuple[int | None, int | None]]) -> None:
    arrivals = load_trace(name, written(tmp_path, name, text))
    assert arrivals[1].at_s - arrivals[0].at_s == pytest.approx(gap_s, abs=1e-6)
    assert [(arrival.input_tokens, arrival.output_tokens) for arrival in arrivals] == lengths


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "timestamp_s\n1\n3\n2\n", r"t.csv:4: .*out of order\n  found: 2, 1 s before line 3"),
        ("t.csv", "when\n1\n", r"t.csv:2: .*no time column\n  found: columns when"),
        ("t.csv", "TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,3\n", r"t.csv:2: .*no GeneratedTokens"),
        ("t.jsonl", '{"timestamp": 1, "output_length": 2}\n', r"t.jsonl:1: .*no input_length"),
        ("t.csv", "timestamp_s\nsoon\n", r"t.csv:2: .*timestamp_s is not a time\n  found: 'soon'\n  allowed: seconds"),
        ("t.csv", "timestamp_s\nnan\n", r"timestamp_s is not a time"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n5,3,3\n", r"TIMESTAMP is not a time"),
        ("t.csv", "timestamp_s,output_tokens\n1,0\n", r"t.csv:2: .*output_tokens is not a length\n  found: '0'"),
        ("t.jsonl", '{"timestamp_s": 1, "input_tokens": 2.5}\n', r"t.jsonl:1: .*input_tokens is not a length"),
        ("t.jsonl", '{"timestamp_s": 1, "input_tokens": Infinity}\n', r"t.jsonl:1: .*input_tokens is not a length"),
        ("t.jsonl", '{"timestamp_s": 1' + "0" * 400 + "}\n", r"t.jsonl:1: .*timestamp_s is not a time"),
        ("t.csv", "timestamp_s,input_tokens\n1\n", r"t.csv:2: .*number of columns"),
        ("t.jsonl", "[1]\n", r"t.jsonl:1: .*not an arrival"),
        ("t.jsonl", "{\n", r"t.jsonl:1: .*not JSON"),
        ("t.csv", "timestamp_s\n", r"the trace is empty"),
        ("t.txt", "1\n", r"a trace is CSV or JSON Lines"),
        ("absent.csv", "", r"the trace is empty"),
    ],
)
def test_wrong_traces(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_trace(name, written(tmp_path, name, text))


def test_wall_times_without_a_zone_know_no_summer_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-03-26 01:59:59,3,4\n2023-03-26 03:00:01,3,4\n"
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        first, second = load_trace("azure.csv", written(tmp_path, "azure.csv", text))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert second.at_s - first.at_s == 3602


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the trace does not exist"):
        load_trace("none.csv", tmp_path)


def workload(requests: int | None = None) -> WorkloadSpec:
    load = LoadSpec(pattern="trace", trace="own.csv")
    return WorkloadSpec(prompts=PromptSpec(source="synthetic"), input_tokens=4, output_tokens=9, requests=requests, load=load)


def sizes(request: Request) -> tuple[int, int]:
    return len(request.prompt_token_ids), request.max_new_tokens


def built(tmp_path: Path, requests: int | None = None, context_tokens: int = 20, text: str = OWN):
    trace = load_trace("own.csv", written(tmp_path, "own.csv", text))
    return build_online(workload(requests), lambda _: [], vocab_size=50, context_tokens=context_tokens, trace=trace)


def test_lengths_of_a_trace_go_before_those_of_the_workload(tmp_path: Path) -> None:
    requests = built(tmp_path).requests
    assert [(len(request.prompt_token_ids), request.max_new_tokens) for request in requests] == [(8, 3), (2, 1)]


def test_a_trace_without_lengths_takes_those_of_the_workload(tmp_path: Path) -> None:
    requests = built(tmp_path, text="timestamp_s\n0\n1\n2\n").requests
    assert [(len(request.prompt_token_ids), request.max_new_tokens) for request in requests] == [(4, 9)] * 3


def test_a_trace_with_some_lengths_leaves_the_rest_to_the_workload(tmp_path: Path) -> None:
    text = "timestamp_s,input_tokens,output_tokens\n0,8,\n1,,3\n2,5,2\n"
    assert [sizes(request) for request in built(tmp_path, text=text).requests] == [(8, 9), (4, 3), (5, 2)]


def test_an_open_loop_draws_its_lengths() -> None:
    lengths = LengthSpec(distribution="uniform", min=2, max=6)
    asked = WorkloadSpec(
        prompts=PromptSpec(source="synthetic"),
        input_tokens=lengths,
        output_tokens=lengths,
        requests=30,
        load=LoadSpec(pattern="poisson", rate_per_s=5),
    )
    requests = build_online(asked, lambda _: [], vocab_size=50, context_tokens=20).requests
    drawn = [sizes(request) for request in requests]
    assert {tokens for tokens, _ in drawn} == {tokens for _, tokens in drawn} == set(range(2, 7))


def test_a_trace_may_be_cut_but_not_stretched(tmp_path: Path) -> None:
    assert len(built(tmp_path, 1).requests) == 1
    with pytest.raises(ConfigError, match=r"the trace is too short\n  found: 3\n  allowed: at most 2"):
        built(tmp_path, 3)


def test_tokens_beyond_the_context_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"own.csv:2: .*8 prompt \+ 3 output tokens\n  found: 11 tokens\n  allowed: at most 10"):
        built(tmp_path, context_tokens=10)
