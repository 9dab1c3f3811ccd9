"""Conversations of a file replayed, and turns and times to think that vary."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llem_ray.core.backend import Request
from llem_ray.core.conversation import Histories
from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import LengthSpec, LoadSpec, PromptSpec, TimeSpec, WorkloadSpec
from llem_ray.workloads.conversations import Place, places_of
from llem_ray.workloads.online import build_online
from llem_ray.workloads.prompt_files import Exchange, PromptSet
from llem_ray.workloads.prompts import batches, build_requests, load_prompts
from llem_ray.workloads.sources import Sources
from llem_ray.workloads.think_times import draw_times_s

SAMPLE = Path(__file__).parents[2] / "data" / "sharegpt.json"
SHAREGPT = PromptSpec(source="file", path=str(SAMPLE), format="sharegpt")
ANSWER = LengthSpec(distribution="answer")
SYNTHETIC = PromptSpec(source="synthetic")
BEGIN = 1


class Words:
    """A tokenizer: a begin token, then a number for each new word."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[BEGIN, *(self.known.setdefault(word, 3 + len(self.known)) for word in text.split())] for text in texts]

    def text(self, ids: Sequence[int]) -> str:
        words = {number: word for word, number in self.known.items()}
        return " ".join("<s>" if number == BEGIN else words.get(number, "?") for number in ids)


def build(words: Words, prompts: PromptSet | None = None, context: int = 4096, **fields: Any) -> tuple[Request, ...]:
    workload = WorkloadSpec(**{"prompts": SHAREGPT, "turns": "recorded", "output_tokens": ANSWER, **fields})
    read = load_prompts(workload.prompts, all_turns=workload.recorded) if prompts is None else prompts
    return build_requests(workload, words.encode, 5000, context, read, (0, BEGIN, 2))


def talks(*turns: int, words: int = 1) -> PromptSet:
    """Conversations of so many turns; each message and answer has so many words."""

    def text(name: str) -> str:
        return " ".join(f"{name}.{word}" for word in range(words))

    made = tuple(
        tuple(Exchange(text(f"q{number}.{turn}"), text(f"a{number}.{turn}")) for turn in range(count))
        for number, count in enumerate(turns)
    )
    return PromptSet(
        texts=tuple(talk[0].prompt for talk in made), answers=tuple(talk[0].answer for talk in made), conversations=made
    )


class TestFile:
    def test_all_turns_are_read_where_they_are_asked_for(self) -> None:
        read = load_prompts(SHAREGPT, all_turns=True)
        assert [len(talk) for talk in read.conversations] == [2, 1, 1]
        assert read.conversations[0][1] == ("And a black one?", "Three to five minutes in boiling water.")
        assert read.texts == load_prompts(SHAREGPT).texts
        assert load_prompts(SHAREGPT).conversations == ()

    def test_a_conversation_ends_where_its_turns_do_not_alternate(self, tmp_path: Path) -> None:
        said = [
            ("gpt", "hi"),
            ("human", "a"),
            ("gpt", "b"),
            ("human", "c"),
            ("gpt", "d"),
            ("human", "e"),
            ("human", "f"),
            ("gpt", "g"),
        ]
        path = tmp_path / "s.jsonl"
        path.write_text(json.dumps({"conversations": [{"from": who, "value": text} for who, text in said]}) + "\n")
        read = load_prompts(PromptSpec(source="file", path=str(path), format="sharegpt"), all_turns=True)
        assert read.conversations == ((("a", "b"), ("c", "d")),)

    def test_they_are_sent_along_only_where_they_are_wanted(self) -> None:
        recorded = WorkloadSpec(prompts=SHAREGPT, turns="recorded", output_tokens=ANSWER)
        first = WorkloadSpec(prompts=SHAREGPT, output_tokens=ANSWER)
        part = Sources(".").part([recorded, first])
        assert len(part.prompts(recorded).conversations) == 3
        assert part.prompts(first).conversations == ()


class TestPlaces:
    def test_a_conversation_that_ends_makes_room_for_the_next(self) -> None:
        found = places_of([3, 1, 2, 2], together=2)
        assert [(place.conversation, place.turn, place.former) for place in found] == [
            (0, 0, None), (1, 0, None), (0, 1, 0), (2, 0, None), (0, 2, 2), (2, 1, 3), (3, 0, None), (3, 1, 6)
        ]  # fmt: skip

    def test_under_an_online_load_one_comes_after_the_other(self) -> None:
        assert places_of([2, 1], together=None) == [Place(0, 0, None), Place(0, 1, 0), Place(1, 0, None)]

    @given(turns=st.lists(st.integers(1, 5), min_size=1, max_size=12), together=st.integers(1, 4))
    def test_no_batch_holds_two_turns_of_one_and_all_are_full_to_the_end(self, turns: list[int], together: int) -> None:
        lengths = LengthSpec(distribution="empirical", values=tuple(turns))
        workload = WorkloadSpec(
            prompts=SYNTHETIC, input_tokens=1, output_tokens=1, turns=lengths, conversations=len(turns), batch_size=together
        )
        requests = build_requests(workload, Words().encode, 100, 4096)
        grouped = list(batches(requests, together))
        seen: set[str] = set()
        for group in grouped:
            assert len({request.conversation for request in group}) == len(group)
            assert all(request.follows is None or request.follows in seen for request in group)
            seen |= {request.request_id for request in group}
        sizes = [len(group) for group in grouped]
        assert sizes == sorted(sizes, reverse=True)
        assert sum(sizes) == len(requests)
        drawn = [len(list(group)) for _, group in itertools.groupby(sorted(r.conversation or 0 for r in requests))]
        assert set(drawn) <= set(turns)


class TestReplay:
    def test_each_prompt_is_what_was_said_before_and_the_next_message(self) -> None:
        words = Words()
        requests = build(words, conversations=3, batch_size=3)
        assert [(request.conversation, request.turn) for request in requests][:3] == [(0, 0), (1, 0), (2, 0)]
        assert len(requests) == 4
        last = requests[-1]
        assert words.text(last.prompt_token_ids) == (
            "<s> How long does a green tea need? Two to three minutes, in water of about 75 degrees. And a black one?"
        )
        assert last.max_new_tokens == 7  # Three to five minutes in boiling water.
        first = next(request for request in requests if request.request_id == last.follows)
        assert first.max_new_tokens == 10  # Two to three minutes, in water of about 75 degrees.
        assert last.shared_prompt_tokens == len(first.prompt_token_ids)
        assert last.new_prompt_tokens is None

    def test_the_answer_in_the_prompt_is_whole_whatever_is_generated(self) -> None:
        words = Words()
        known = build(words, conversations=3, output_tokens=2)
        assert "75 degrees. And a black" in words.text(max(known, key=lambda request: request.turn or 0).prompt_token_ids)
        assert {request.max_new_tokens for request in known} == {2}

    def test_answers_of_the_engine_take_their_place(self) -> None:
        words = Words()
        requests = build(words, talks(3), conversations=1, turn_answers="generated")
        histories, said = Histories(requests), list[str]()
        for request in requests:
            said.append(words.text(histories.ask(request).prompt_token_ids))
            histories.answer(request.request_id, [words.encode(["mine"])[0][-1]] * 2)
        assert said[2] == "<s> q0.0.0 mine mine q0.1.0 mine mine q0.2.0"

    def test_more_than_the_file_holds_are_taken_again_and_the_seed_orders_them(self) -> None:
        words = Words()
        firsts = [words.text(r.prompt_token_ids) for r in build(words, talks(1, 2, 3), conversations=6) if r.turn == 0]
        assert sorted(firsts) == sorted(["<s> q0.0.0", "<s> q1.0.0", "<s> q2.0.0"] * 2)
        orders = {
            tuple(r.prompt_token_ids for r in build(words, talks(1, 2, 3), conversations=3, seed=seed)) for seed in range(5)
        }
        assert len(orders) > 1

    def test_conversations_end_before_they_are_too_long(self) -> None:
        """Messages and answers of 3 tokens, and a begin token: turns end at 7, 13, 19 ... tokens, 4 more with the prefix."""
        words = Words()
        for limit, turns in ((17, 2), (16, 1), (11, 1)):
            built = build(words, talks(5, words=3), conversations=1, max_conversation_tokens=limit, shared_prefix_tokens=4)
            assert len(built) == turns
        assert (
            max(len(r.prompt_token_ids) + r.max_new_tokens for r in build(words, talks(5, words=3), max_conversation_tokens=19))
            == 19
        )
        long_first = PromptSet(
            texts=("x",), answers=("y",), conversations=(*talks(1, words=9).conversations, *talks(2).conversations)
        )
        kept = build(words, long_first, conversations=2, max_conversation_tokens=8)
        assert [request.turn for request in kept] == [0, 1, 0, 1]
        with pytest.raises(ConfigError, match="no conversation of the file is short enough") as caught:
            build(words, talks(2, words=3), max_conversation_tokens=6)
        assert caught.value.field == "workload.max_conversation_tokens"

    def test_those_that_never_fit_are_encoded_once(self) -> None:
        class Counting(Words):
            texts = 0

            def encode(self, texts: Sequence[str]) -> list[list[int]]:
                self.texts += len(texts)
                return super().encode(texts)

        words = Counting()
        long, short = talks(*[1] * 20, words=9).conversations, talks(1).conversations
        prompts = PromptSet(texts=("x",), answers=("y",), conversations=(*long, *short))
        assert len(build(words, prompts, conversations=30, max_conversation_tokens=8)) == 30
        assert words.texts == 2 * (20 + 30)

    @pytest.mark.parametrize("seed", range(4))
    def test_the_order_of_rounds_does_not_make_the_short_ones_too_few(self, seed: int) -> None:
        """One of two fits. It may be the first of a round and the last of the next."""
        prompts = PromptSet(
            texts=("x",), answers=("y",), conversations=(*talks(1, words=9).conversations, *talks(1).conversations)
        )
        built = build(Words(), prompts, conversations=8, max_conversation_tokens=8, seed=seed)
        assert {len(request.prompt_token_ids) for request in built} == {2}

    def test_an_answer_drawn_too_long_is_drawn_again(self) -> None:
        drawn = LengthSpec(distribution="uniform", min=1, max=20)
        built = build(Words(), talks(1), conversations=30, max_conversation_tokens=8, output_tokens=drawn)
        assert {request.max_new_tokens for request in built} == set(range(1, 7))
        with pytest.raises(ConfigError, match="no conversation of the file is short enough"):
            build(Words(), talks(1), max_conversation_tokens=8, output_tokens=LengthSpec(distribution="uniform", min=7, max=9))

    def test_one_beyond_the_context_is_named_with_what_helps(self) -> None:
        with pytest.raises(ConfigError, match="turn 2 of conversation 0 is too long for the model: 6 prompt") as caught:
            build(Words(), talks(3), context=6)
        assert caught.value.field == "workload.max_conversation_tokens"
        assert "conversations then end before they are too long" in str(caught.value)

    def test_an_answer_without_tokens_is_named(self) -> None:
        prompts = PromptSet(
            texts=("q",), answers=("a",), conversations=((Exchange("q", "a"), Exchange("r", " ")), (Exchange("s", "b"),))
        )
        with pytest.raises(ConfigError, match="an answer of conversation 0 has no tokens") as caught:
            build(Words(), prompts, conversations=2)
        assert (caught.value.field, caught.value.hint) == ("workload.output_tokens", "set workload.output_tokens.min")
        assert len(build(Words(), prompts, conversations=2, output_tokens=LengthSpec(distribution="answer", min=1))) == 3

    def test_under_an_online_load_turns_follow_answers_after_a_time_that_varies(self) -> None:
        words = Words()
        workload = WorkloadSpec(
            prompts=SHAREGPT,
            turns="recorded",
            output_tokens=ANSWER,
            conversations=30,
            think_time_s=TimeSpec(distribution="uniform", min=1, max=2),
            load=LoadSpec(pattern="poisson", rate_per_s=10),
        )
        work = build_online(workload, words.encode, 5000, 4096, load_prompts(SHAREGPT, all_turns=True), (0, BEGIN, 2))
        assert work.schedule.send_at_ns is not None
        assert len(work.schedule.send_at_ns) == 30
        later = [request for request in work.requests if request.follows is not None]
        assert len(later) == len(work.requests) - 30 == 10
        assert all(1e9 <= request.think_ns <= 2e9 and request.new_prompt_tokens is not None for request in later)
        assert len({request.think_ns for request in later}) == 10
        assert all(request.follows is None for batch in work.warmup for request in batch)


class TestThinking:
    @pytest.mark.parametrize(
        ("spec", "mean", "std"),
        [
            (TimeSpec(distribution="fixed", mean=2.5), 2.5, 0.0),
            (TimeSpec(distribution="uniform", min=1, max=4), 2.5, 3 / 12**0.5),
            (TimeSpec(distribution="exponential", mean=2), 2.0, 2.0),
            (TimeSpec(distribution="normal", mean=9, std=1), 9.0, 1.0),
            (TimeSpec(distribution="lognormal", mean=5, std=3), 5.0, 3.0),
            (TimeSpec(distribution="empirical", values=(1, 3), weights=(3, 1)), 1.5, 0.75**0.5),
        ],
        ids=lambda value: value.distribution if isinstance(value, TimeSpec) else "",
    )
    def test_moments(self, spec: TimeSpec, mean: float, std: float) -> None:
        drawn = draw_times_s(spec, 20_000, "s")
        assert statistics.fmean(drawn) == pytest.approx(mean, rel=0.03)
        assert statistics.pstdev(drawn) == pytest.approx(std, rel=0.06, abs=1e-9)
        assert drawn[:10] == draw_times_s(spec, 10, "s")

    @pytest.mark.parametrize("name", ["exponential", "normal", "lognormal"])
    def test_bounds_cut_off(self, name: Any) -> None:
        std = {} if name == "exponential" else {"std": 4}
        drawn = draw_times_s(TimeSpec(distribution=name, mean=3, min=2, max=5, **std), 2000, "s")
        assert 2 <= min(drawn) < 2.1
        assert 4.9 < max(drawn) <= 5
        assert sum(wait in (2, 5) for wait in drawn) < 3
        assert min(draw_times_s(TimeSpec(distribution=name, mean=3, **std), 2000, "s")) >= 0

    def test_a_number_is_that(self) -> None:
        assert draw_times_s(0.5, 3, "s") == [0.5] * 3
