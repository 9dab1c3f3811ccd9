"""Prompts that share what a Mooncake trace says they share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llem_ray.core.backend import Request
from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import LoadSpec, PromptSpec, WorkloadSpec
from llem_ray.workloads.online import OnlineWork, build_online
from llem_ray.workloads.prompts import load_prompts
from llem_ray.workloads.trace_blocks import BLOCK_TOKENS
from llem_ray.workloads.traces import Arrival, load_trace

ROWS = [  # the first lines of FAST25-release/traces/toolagent_trace.jsonl, shortened
    {"timestamp": 0, "input_length": 1758, "output_length": 5, "hash_ids": [0, 1, 2, 3]},
    {"timestamp": 0, "input_length": 1322, "output_length": 4, "hash_ids": [0, 14, 15]},
    {"timestamp": 3000, "input_length": 1536, "output_length": 7, "hash_ids": [0, 14, 16]},
    {"timestamp": 3000, "input_length": 1759, "output_length": 3, "hash_ids": [0, 1, 2, 3]},
    {"timestamp": 6000, "input_length": 100, "output_length": 3, "hash_ids": [46]},
]


def encode(texts: Sequence[str]) -> list[list[int]]:
    return [[1, *(3 + sum(word.encode()) % 900 for word in text.split())] for text in texts]


def built(arrivals: Sequence[Arrival], source: Any = "synthetic", **load: Any) -> OnlineWork:
    workload = WorkloadSpec(prompts=PromptSpec(source=source), load=LoadSpec(pattern="trace", trace="t.jsonl", **load))
    return build_online(workload, encode, 1000, 200_000, load_prompts(workload.prompts), (0, 1, 2), arrivals)


@pytest.fixture
def arrivals(tmp_path: Path) -> tuple[Arrival, ...]:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return load_trace("t.jsonl", tmp_path)


def common(first: Request, second: Request) -> int:
    both = zip(first.prompt_token_ids, second.prompt_token_ids, strict=False)
    return next((index for index, (a, b) in enumerate(both) if a != b), min(map(length, (first, second))))


def length(request: Request) -> int:
    return len(request.prompt_token_ids)


@pytest.mark.parametrize("source", ["synthetic", "builtin"])
def test_requests_share_the_blocks_that_the_trace_names(arrivals: tuple[Arrival, ...], source: Any) -> None:
    requests = built(arrivals, source).requests
    assert [(length(request), request.max_new_tokens) for request in requests] == [
        (1758, 5), (1322, 4), (1536, 7), (1759, 3), (100, 3)
    ]  # fmt: skip
    first, second, third, fourth, fifth = requests
    assert BLOCK_TOKENS <= common(first, second) < BLOCK_TOKENS + 20
    assert 2 * BLOCK_TOKENS <= common(second, third) < 2 * BLOCK_TOKENS + 20
    assert common(first, fourth) == 1758
    assert common(first, fifth) < 20
    assert [request.shared_prompt_tokens for request in requests] == [0, 512, 1024, 1758, 0]
    assert requests == built(arrivals, source).requests


def test_a_limit_shortens_prompts_and_what_they_share_by_one_factor(arrivals: tuple[Arrival, ...]) -> None:
    requests = built(arrivals, trace_max_input_tokens=400).requests
    factor = 400 / 1759
    assert [length(request) for request in requests] == [round(row["input_length"] * factor) for row in ROWS]  # type: ignore[operator]
    assert [request.shared_prompt_tokens for request in requests] == [0, 116, 233, 400, 0]
    assert common(requests[1], requests[2]) >= 233
    assert [request.max_new_tokens for request in requests] == [5, 4, 7, 3, 3]
    assert built(arrivals, trace_max_input_tokens=1759).requests == built(arrivals).requests


def test_without_prefixes_each_prompt_is_its_own(arrivals: tuple[Arrival, ...]) -> None:
    requests = built(arrivals, trace_prefixes=False).requests
    assert [length(request) for request in requests] == [1758, 1322, 1536, 1759, 100]
    assert max(common(requests[0], other) for other in requests[1:]) < 5
    assert {request.shared_prompt_tokens for request in requests} == {0}


def test_a_part_of_a_trace_is_shortened_by_its_own_longest(arrivals: tuple[Arrival, ...]) -> None:
    requests = built(arrivals[1:2], trace_max_input_tokens=661).requests
    assert [length(request) for request in requests] == [661]


@given(data=st.data(), most=st.one_of(st.none(), st.integers(1, 3000)))
def test_lengths_are_exact_and_equal_beginnings_stay_equal(data: st.DataObject, most: int | None) -> None:
    chains = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=6))
    trace = []
    for line, chain in enumerate(chains, start=1):
        ids = tuple(hash(tuple(chain[: at + 1])) for at in range(len(chain)))  # chained, as Mooncake's are
        tokens = (len(ids) - 1) * BLOCK_TOKENS + data.draw(st.integers(1, BLOCK_TOKENS))
        trace.append(Arrival(at_s=0.0, input_tokens=tokens, output_tokens=1, line=line, hash_ids=ids))
    requests = built(trace, trace_max_input_tokens=most).requests
    longest = max(arrival.input_tokens or 0 for arrival in trace)
    factor = 1.0 if most is None else min(1.0, most / longest)
    assert [length(request) for request in requests] == [max(1, round((item.input_tokens or 0) * factor)) for item in trace]
    for index, request in enumerate(requests):
        shared = request.shared_prompt_tokens
        assert shared <= max([common(request, other) for other in requests[:index]], default=0)


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"shared_prefix_tokens": 8}, "workload.shared_prefix_tokens"), ({"prompts": None}, "workload.prompts.chat_template")],
)
def test_nothing_goes_before_what_is_shared(arrivals: tuple[Arrival, ...], fields: dict[str, Any], field: str) -> None:
    workload = WorkloadSpec(
        prompts=PromptSpec(source="synthetic", chat_template="prompts" in fields),
        shared_prefix_tokens=fields.get("shared_prefix_tokens", 0),
        load=LoadSpec(pattern="trace", trace="t.jsonl"),
    )
    with pytest.raises(ConfigError, match="nothing can go before") as caught:
        build_online(workload, encode, 1000, 200_000, trace=arrivals, encode_chats=lambda chats: encode(["a"] * len(chats)))
    assert caught.value.field == field
    assert "trace_prefixes: false" in (caught.value.hint or "")


def test_ids_that_do_not_cover_the_prompt_name_their_line(arrivals: tuple[Arrival, ...]) -> None:
    wrong = (*arrivals[:1], Arrival(at_s=0, input_tokens=513, output_tokens=1, line=7, hash_ids=(5,)))
    with pytest.raises(
        ConfigError, match=r"t.jsonl:7: .*do not cover the prompt of 513 tokens\n  found: 1 ids\n  allowed: 2 ids"
    ):
        built(wrong)
    assert len(built(wrong, trace_prefixes=False).requests) == 2


@pytest.mark.parametrize("ids", ['"7"', "[1, 2.5]", "[true]", "7"])
def test_ids_that_are_none(tmp_path: Path, ids: str) -> None:
    (tmp_path / "t.jsonl").write_text(f'{{"timestamp": 1, "input_length": 3, "output_length": 2, "hash_ids": {ids}}}\n')
    with pytest.raises(ConfigError, match=r"t.jsonl:1: .*hash_ids is not a list of block ids"):
        load_trace("t.jsonl", tmp_path)
