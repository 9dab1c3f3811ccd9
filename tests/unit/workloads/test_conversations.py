"""Requests with drawn or given lengths, shared prefixes and several turns."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llem_ray.core.backend import Request
from llem_ray.core.conversation import Histories
from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import LengthSpec, LoadSpec, PromptSpec, WorkloadSpec
from llem_ray.workloads.online import build_online
from llem_ray.workloads.prompt_files import PromptSet
from llem_ray.workloads.prompts import batches, build_requests, load_prompts
from llem_ray.workloads.sources import Sources

VOCAB, CONTEXT = 1000, 4096
SYNTHETIC = PromptSpec(source="synthetic")
UNIFORM = LengthSpec(distribution="uniform", min=3, max=9)


def encode(texts: Sequence[str]) -> list[list[int]]:
    return [[1, *(3 + sum(word.encode()) % (VOCAB - 3) for word in text.split())] for text in texts]


def build(context: int = CONTEXT, lengths: Sequence[tuple[int, int]] | None = None, **fields: Any) -> tuple[Request, ...]:
    workload = WorkloadSpec(**fields)
    return build_requests(workload, encode, VOCAB, context, load_prompts(workload.prompts), (0, 1, 2), lengths=lengths)


def sizes(requests: Sequence[Request]) -> list[tuple[int, int]]:
    return [(len(request.prompt_token_ids), request.max_new_tokens) for request in requests]


@pytest.mark.parametrize("source", ["builtin", "synthetic"])
def test_each_request_has_lengths_of_its_own(source: Any) -> None:
    requests = build(prompts=PromptSpec(source=source), input_tokens=UNIFORM, output_tokens=UNIFORM, requests=40, seed=5)
    assert {length for length, _ in sizes(requests)} == {new for _, new in sizes(requests)} == set(range(3, 10))
    assert any(length != new for length, new in sizes(requests))
    assert requests == build(prompts=PromptSpec(source=source), input_tokens=UNIFORM, output_tokens=UNIFORM, requests=40, seed=5)


def test_a_fixed_distribution_is_the_plain_number() -> None:
    fixed = LengthSpec(distribution="fixed", mean=12)
    assert build(input_tokens=fixed, output_tokens=fixed, requests=5) == build(input_tokens=12, output_tokens=12, requests=5)


@pytest.mark.parametrize("source", ["builtin", "synthetic"])
def test_given_lengths_replace_those_of_the_workload(source: Any) -> None:
    asked = [(5, 3), (60, 1), (7, 20)]
    assert sizes(build(prompts=PromptSpec(source=source), input_tokens=8, requests=99, lengths=asked)) == asked


@pytest.mark.parametrize(
    ("lengths", "fields", "field", "says"),
    [
        ([(5, 3), (4, 0)], {}, "workload", "request 1 asks for nothing"),
        ([(0, 3)], {}, "workload", "request 0 asks for nothing"),
        ([], {}, "workload.turns", "single requests"),
        ([(5, 3)], {"turns": 2}, "workload.turns", "single requests"),
        ([(5, 3), (60, 5)], {"input_tokens": 5}, "workload.input_tokens", "60 prompt \\+ 5 output = 65 tokens"),
        ([(5, 3), (10**12, 5)], {}, "workload.prompts", "is too long"),
        ([(5, 10**12)], {}, "workload.output_tokens", "is too long"),
    ],
)
def test_given_lengths_that_cannot_be(lengths: list[tuple[int, int]], fields: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        build(context=64, lengths=lengths, **fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"input_tokens": LengthSpec(distribution="uniform", min=50, max=70)}, "workload.input_tokens"),
        ({"output_tokens": LengthSpec(distribution="uniform", min=64, max=70)}, "workload.output_tokens"),
        ({"shared_prefix_tokens": 64, "input_tokens": 1}, "workload.input_tokens"),
        ({"shared_prefix_tokens": 10**12}, "workload.prompts"),
        ({"input_tokens": 20, "output_tokens": 4, "turns": 3}, "workload.input_tokens"),
    ],
)
def test_beyond_the_context(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match="too long for the model") as caught:
        build(context=64, requests=3, **fields)
    assert caught.value.field == field
    assert caught.value.allowed == "at most 64 tokens, the model's context"


@pytest.mark.parametrize("source", ["builtin", "synthetic"])
def test_a_group_shares_its_prefix_and_nothing_else(source: Any) -> None:
    spec = PromptSpec(source=source)
    requests = build(prompts=spec, input_tokens=6, requests=7, shared_prefix_tokens=10, prefix_groups=3)
    assert {length for length, _ in sizes(requests)} == {16}
    heads = [request.prompt_token_ids[:10] for request in requests]
    assert heads == [heads[index % 3] for index in range(7)]
    assert len(set(heads)) == 3
    plain = build(prompts=spec, input_tokens=6, requests=7)
    assert [request.prompt_token_ids[10:] for request in requests] == [request.prompt_token_ids for request in plain]


@given(
    turns=st.integers(2, 4),
    batch=st.integers(1, 3),
    blocks=st.integers(1, 2),
    prefix=st.sampled_from([0, 5]),
    seed=st.integers(0, 9),
)
def test_each_turn_goes_on_from_the_one_before(turns: int, batch: int, blocks: int, prefix: int, seed: int) -> None:
    requests = build(
        prompts=SYNTHETIC, input_tokens=UNIFORM, output_tokens=UNIFORM, turns=turns, batch_size=batch,
        requests=turns * batch * blocks, shared_prefix_tokens=prefix, seed=seed,
    )  # fmt: skip
    grouped = list(batches(requests, batch))
    assert [len(group) for group in grouped] == [batch] * (turns * blocks)
    for block in range(blocks):
        for earlier, later in itertools.pairwise(grouped[block * turns : (block + 1) * turns]):
            for before, after in zip(earlier, later, strict=True):
                known = len(before.prompt_token_ids)
                assert after.prompt_token_ids[:known] == before.prompt_token_ids
                new = len(after.prompt_token_ids) - known - before.max_new_tokens
                assert 3 <= new <= 9
    assert all(min(request.prompt_token_ids) >= 3 for request in requests)
    firsts = {group[0].prompt_token_ids for group in grouped[::turns]}
    assert len(firsts) == blocks


@pytest.mark.parametrize("answers", ["known", "generated"])
def test_what_is_shared_and_what_is_new_is_told(answers: Any) -> None:
    requests = build(
        prompts=SYNTHETIC, input_tokens=4, output_tokens=3, turns=2, batch_size=2, requests=8, shared_prefix_tokens=5,
        prefix_groups=2, turn_answers=answers,
    )  # fmt: skip
    assert [(request.conversation, request.turn, request.follows) for request in requests] == [
        (0, 0, None), (1, 0, None), (0, 1, "0"), (1, 1, "1"), (2, 0, None), (3, 0, None), (2, 1, "4"), (3, 1, "5")
    ]  # fmt: skip
    assert [request.shared_prompt_tokens for request in requests] == [0, 0, 9, 9, 5, 5, 9, 9]
    assert {request.new_prompt_tokens for request in requests if request.turn} == {4 if answers == "generated" else None}
    single = build(prompts=SYNTHETIC, input_tokens=4)[0]
    assert (single.conversation, single.turn, single.follows, single.new_prompt_tokens) == (None, None, None, None)


def test_turns_under_an_online_load_follow_one_another_and_warm_up_alone() -> None:
    load = LoadSpec(pattern="poisson", rate_per_s=10)
    workload = WorkloadSpec(prompts=SYNTHETIC, input_tokens=4, output_tokens=3, turns=3, requests=9, think_time_s=0.25, load=load)
    work = build_online(workload, encode, VOCAB, CONTEXT)
    assert sizes(work.requests) == [(4, 3), (11, 3), (18, 3)] * 3
    assert [request.follows for request in work.requests] == [None, "0", "1", None, "3", "4", None, "6", "7"]
    assert {(request.think_ns, request.new_prompt_tokens) for request in work.requests if request.turn} == {(250_000_000, 4)}
    assert work.schedule.send_at_ns is not None
    assert len(work.schedule.send_at_ns) == 3
    assert work.schedule.send_at_ns[-1] == 300_000_000
    assert all(request.follows is request.new_prompt_tokens is None for batch in work.warmup for request in batch)


class TestHistories:
    """An engine that answers otherwise than the prompts foresee."""

    def test_real_answers_take_the_place_of_those_that_stood_for_them(self) -> None:
        requests = build(prompts=SYNTHETIC, input_tokens=4, output_tokens=3, turns=3, turn_answers="generated")
        histories, said = Histories(requests), ()
        for request in requests:
            asked = histories.ask(request)
            assert asked.prompt_token_ids == (*said, *request.prompt_token_ids[-4:])
            histories.answer(request.request_id, (900, 901))
            said = (*asked.prompt_token_ids, 900, 901)

    def test_known_answers_stay(self) -> None:
        requests = build(prompts=SYNTHETIC, input_tokens=4, output_tokens=3, turns=2)
        histories = Histories(requests)
        histories.ask(requests[0])
        histories.answer("0", (900, 901))
        assert histories.ask(requests[1]) is requests[1]


def test_one_batch_of_each_turn_unless_told_otherwise() -> None:
    assert sizes(build(prompts=SYNTHETIC, input_tokens=4, output_tokens=2, turns=3, batch_size=2)) == [
        (4, 2), (4, 2), (10, 2), (10, 2), (16, 2), (16, 2)
    ]  # fmt: skip


class TestSources:
    WORKLOAD = WorkloadSpec(
        prompts=PromptSpec(source="file", path="p.jsonl"),
        input_tokens=LengthSpec(distribution="empirical", path="in.csv"),
        output_tokens=LengthSpec(distribution="empirical", path="out.csv"),
    )

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "p.jsonl").write_text('"a b"\n')
        (tmp_path / "in.csv").write_text("7\n")
        (tmp_path / "out.csv").write_text("2\n3\n")
        return tmp_path

    def test_a_part_needs_no_files_elsewhere(self, folder: Path) -> None:
        part = pickle.loads(pickle.dumps(Sources(folder).part([self.WORKLOAD])))
        for path in folder.iterdir():
            path.unlink()
        assert part.prompts(self.WORKLOAD) == PromptSet(texts=("a b",))
        resolved = part.resolved(self.WORKLOAD)
        assert isinstance(resolved.input_tokens, LengthSpec)
        assert isinstance(resolved.output_tokens, LengthSpec)
        assert (resolved.input_tokens.values, resolved.output_tokens.values) == ((7,), (2, 3))

    def test_the_shipped_set_is_not_sent(self, folder: Path) -> None:
        assert len(pickle.dumps(Sources(folder).part([WorkloadSpec()]))) < 400

    def test_what_is_wrong_shows_when_all_is_read(self, folder: Path) -> None:
        (folder / "out.csv").write_text("0\n")
        with pytest.raises(ConfigError) as caught:
            Sources(folder).read(self.WORKLOAD)
        assert (caught.value.file, caught.value.line) == (str(folder / "out.csv"), 1)
