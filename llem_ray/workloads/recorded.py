"""The conversations of a file as token ids: each with its own turns and answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Final

from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import LengthSpec, WorkloadSpec
from llem_ray.workloads.chats import ChatTemplate, Ids
from llem_ray.workloads.conversations import Script, places_of
from llem_ray.workloads.lengths import draw_lengths
from llem_ray.workloads.prompt_files import PromptSet
from llem_ray.workloads.token_sources import Encode, RandomIds, order_of, valid_ids

MOST_DRAWS: Final = 1000
"""Lengths of answers that are drawn, one after the other or two rounds of the file, before all count as too long."""


@dataclass(frozen=True, slots=True)
class _Turn:
    body: Ids
    """What it adds to its conversation, the template's tokens included."""
    answer: Ids
    """The recorded one, without special tokens."""
    output: int
    """Tokens to generate."""


class Conversations:
    """Conversations of a file, encoded when they are asked for.

    Args:
        prompts: With conversations.
        encode: The engine's tokenizer.
        template: The model's chat template, where messages are put into it.
        vocab_size: Number of token ids of the model.
        special: Special token ids: only the first message of a conversation keeps them where there is no template.
    """

    def __init__(
        self, prompts: PromptSet, encode: Encode, template: ChatTemplate | None, vocab_size: int, special: Collection[int]
    ) -> None:
        self._talks, self._encode, self._template = prompts.conversations, encode, template
        self._vocab_size, self._special = vocab_size, frozenset(special)

    def script(self, workload: WorkloadSpec, many: int, together: int | None, random_ids: RandomIds) -> Script:
        """What the requests of a pass say.

        Args:
            workload: With recorded turns.
            many: Conversations of the pass.
            together: Conversations of a batch; None under an online load.
            random_ids: Where answers come from that stand for those to come.

        Raises:
            ConfigError: No conversation is short enough, or one has a message without tokens.
        """
        chosen = list(islice(self._fitting(workload), many))
        turns = [turns for _, turns in chosen]
        places = places_of(list(map(len, turns)), together)
        said = [turns[place.conversation][place.turn] for place in places]

        def answer(index: int) -> Ids:
            if workload.generated_answers:
                return random_ids.draw(f"{workload.seed}/answer/{index}", said[index].output)
            return said[index].answer

        return Script(
            places=places,
            bodies=[turn.body for turn in said],
            outputs=[turn.output for turn in said],
            answer=answer,
            name_of=lambda index: f"turn {places[index].turn} of conversation {chosen[places[index].conversation][0]}",
        )

    def _fitting(self, workload: WorkloadSpec) -> Iterator[tuple[int, list[_Turn]]]:
        """Endless: the conversations in the order that the seed decides, cut to the limit, with their numbers in the file."""
        limit, asked, count, since = workload.max_conversation_tokens, workload.output_tokens, len(self._talks), 0
        drawn = isinstance(asked, LengthSpec) and asked.distribution != "answer"
        never: set[int] = set()  # too long in every round: encoded once
        for number, index in enumerate(order_of(count, str(workload.seed))):
            if index not in never:
                turns = self._turns(index, workload, f"{workload.seed}/output_tokens/{number}")
                fitting = len(turns) if limit is None else self._within(limit, turns, workload)
                if fitting:
                    since = 0
                    yield index, turns[:fitting]
                    continue
                if not drawn or (limit is not None and workload.shared_prefix_tokens + len(turns[0].body) >= limit):
                    never.add(index)
            since += 1
            if len(never) == count or since == max(2 * count, MOST_DRAWS):
                raise ConfigError(
                    "no conversation of the file is short enough",
                    field="workload.max_conversation_tokens",
                    found=str(limit),
                    allowed="as many as the first turn of one takes, prompt and answer",
                )

    def _turns(self, index: int, workload: WorkloadSpec, seed: str) -> list[_Turn]:
        talk = self._talks[index]
        answers = [tuple(token for token in ids if token not in self._special) for ids in self._encode([a for _, a in talk])]
        asked = workload.output_tokens
        lengths = [len(ids) for ids in answers] if isinstance(asked, LengthSpec) and asked.distribution == "answer" else None
        if lengths is not None and 0 in lengths and isinstance(asked, LengthSpec) and asked.min is None:
            raise ConfigError(
                f"an answer of conversation {index} has no tokens",
                "set workload.output_tokens.min",
                field="workload.output_tokens",
                found=repr(talk[lengths.index(0)].answer[:40]),
                allowed="at least 1 token",
            )
        outputs = draw_lengths(asked, len(talk), seed, answers=lengths)
        for ids, exchange in zip(answers, talk, strict=True):
            if ids:
                valid_ids(ids, f"an answer of conversation {index}", exchange.answer, self._vocab_size)
        bodies = self._bodies(index)
        return [_Turn(*turn) for turn in zip(bodies, answers, outputs, strict=True)]

    def _bodies(self, index: int) -> list[Ids]:
        texts = [exchange.prompt for exchange in self._talks[index]]
        if self._template is not None:
            encoded: Sequence[Sequence[int]] = self._template.messages(texts, range(len(texts)))
        else:
            first, *later = self._encode(texts)
            encoded = [first, *([token for token in ids if token not in self._special] for ids in later)]
        return [
            valid_ids(ids, f"turn {turn} of conversation {index}", text, self._vocab_size)
            for turn, (ids, text) in enumerate(zip(encoded, texts, strict=True))
        ]

    @staticmethod
    def _within(limit: int, turns: Sequence[_Turn], workload: WorkloadSpec) -> int:
        """How many turns stay within the limit, each with its answer."""
        kept = [turn.output if workload.generated_answers else len(turn.answer) for turn in turns]
        before = accumulate((len(turn.body) + tokens for turn, tokens in zip(turns, kept, strict=True)), initial=0)
        for number, (tokens, turn) in enumerate(zip(before, turns, strict=False)):
            if workload.shared_prefix_tokens + tokens + len(turn.body) + turn.output > limit:
                return number
        return len(turns)
