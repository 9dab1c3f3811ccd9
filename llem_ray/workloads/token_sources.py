"""Where the tokens of prompts come from: texts or chance, with the model's chat template around them or without."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Protocol

from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import WorkloadSpec
from llem_ray.workloads.chats import ChatTemplate, EncodeChats, Ids
from llem_ray.workloads.prompt_files import FIELD, PromptSet

Encode = Callable[[Sequence[str]], list[list[int]]]


class TokenSource(Protocol):
    """Where the tokens of prompts come from."""

    def bodies(self, inputs: Sequence[int | None], turns: Sequence[int]) -> list[Ids]:
        """What each request adds to its conversation: as many tokens as given, or a prompt of its natural length for None.

        Args:
            inputs: Lengths, the template's tokens included.
            turns: Which turn of its conversation each request is, from 0; templates differ by it.
        """
        ...

    def prefix(self, group: int, tokens: int) -> Ids:
        """The first tokens of all prompts of a group."""
        ...

    def block(self, name: str, tokens: int) -> Ids:
        """Tokens that ``name`` decides; fewer of them are the first of more."""
        ...

    def answer_lengths(self) -> list[int] | None:
        """Tokens of the known answers to the bodies; None where there are none."""
        ...

    def name_of(self, request: int) -> str:
        """What an error calls the prompt of a request."""
        ...


def make_source(
    workload: WorkloadSpec,
    encode: Encode,
    encode_chats: EncodeChats | None,
    vocab_size: int,
    prompts: PromptSet,
    special: Collection[int],
) -> TokenSource:
    """The source that the workload names. Arguments are those of ``build_requests``.

    Raises:
        ConfigError: There are no prompts, or the engine renders no chats.
    """
    template = template_of(workload, encode_chats)
    if workload.prompts.source == "synthetic":
        return Synthetic(workload.seed, RandomIds(vocab_size, special), template)
    return Texts(prompts, encode, template, vocab_size, special, workload.seed)


def template_of(workload: WorkloadSpec, encode_chats: EncodeChats | None) -> ChatTemplate | None:
    """The model's chat template, where the workload puts prompts into it.

    Raises:
        ConfigError: The engine renders no chats.
    """
    if not workload.prompts.chat_template:
        return None
    if encode_chats is None:
        raise ConfigError("this engine renders no chat templates", field=f"{FIELD}.chat_template", found="true", allowed="false")
    return ChatTemplate(encode_chats)


class RandomIds:
    """Token ids drawn at random, special ones left out."""

    def __init__(self, vocab_size: int, special_token_ids: Collection[int]) -> None:
        self._vocab_size = vocab_size
        self._special = frozenset(special_token_ids)

    @cached_property
    def _allowed(self) -> list[int]:
        return [index for index in range(self._vocab_size) if index not in self._special]

    def draw(self, seed: str, tokens: int) -> Ids:
        """``tokens`` ids that ``seed`` decides."""
        if not self._allowed:
            raise ConfigError(f"all {self._vocab_size} token ids of the model are special", field=f"{FIELD}.source")
        draws, allowed = random.Random(seed), self._allowed  # noqa: S311 - not a secret
        return tuple(allowed[int(draws.random() * len(allowed))] for _ in range(tokens))


@dataclass(frozen=True)
class Synthetic:
    """Prompts of random ids."""

    seed: int
    ids: RandomIds
    template: ChatTemplate | None = None

    def bodies(self, inputs: Sequence[int | None], turns: Sequence[int]) -> list[Ids]:
        """See ``TokenSource``."""
        return [self._body(index, _needed(tokens), turns[index]) for index, tokens in enumerate(inputs)]

    def prefix(self, group: int, tokens: int) -> Ids:
        """See ``TokenSource``."""
        return self.ids.draw(f"{self.seed}/prefix/{group}", tokens)

    def block(self, name: str, tokens: int) -> Ids:
        """See ``TokenSource``."""
        return self.ids.draw(f"{self.seed}/block/{name}", tokens)

    def answer_lengths(self) -> list[int] | None:
        """It has none."""
        return None

    def name_of(self, request: int) -> str:
        """See ``TokenSource``."""
        return f"request {request}"

    def _body(self, index: int, tokens: int, turn: int) -> Ids:
        seed = f"{self.seed}/{index}"
        if self.template is None:
            return self.ids.draw(seed, tokens)
        return self.template.framed(turn, tokens, lambda room: self.ids.draw(seed, room))


class Texts:
    """Prompts of a text source, encoded when first asked for: a file may hold far more than a pass needs."""

    def __init__(
        self,
        prompts: PromptSet,
        encode: Encode,
        template: ChatTemplate | None,
        vocab_size: int,
        special: Collection[int],
        seed: int,
    ) -> None:
        if not prompts.texts:
            raise ConfigError("there are no prompts", field=FIELD, found="0 prompts", allowed="at least 1")
        self._prompts = prompts
        self._encode = encode
        self._template = template
        self._vocab_size = vocab_size
        self._special = frozenset(special)
        self._seed = seed
        self._ids: dict[int, Ids] = {}
        self._firsts: list[int] = []
        self._order = order_of(len(prompts.texts), str(seed))

    def bodies(self, inputs: Sequence[int | None], turns: Sequence[int]) -> list[Ids]:
        """See ``TokenSource``. Request i starts with the i-th prompt of the order."""
        self._firsts = list(islice(self._order, len(inputs)))
        whole = [index for index, tokens in enumerate(inputs) if tokens is None]
        self._fetch([first for first, tokens in zip(self._firsts, inputs, strict=True) if tokens or self._template is None])
        bodies = dict(zip(whole, self._natural(whole, turns), strict=True))
        ahead = list(self._firsts)
        for start, tokens in enumerate(inputs):
            if tokens is not None:
                bodies[start] = self._cut(ahead, start, tokens, turns[start])
        return [bodies[index] for index in range(len(inputs))]

    def prefix(self, group: int, tokens: int) -> Ids:
        """See ``TokenSource``."""
        return self._packed([], 0, tokens, order_of(len(self._prompts.texts), f"{self._seed}/prefix/{group}"))

    def block(self, name: str, tokens: int) -> Ids:
        """See ``TokenSource``: the prompts from one on that ``name`` decides."""
        count = len(self._prompts.texts)
        digest = hashlib.sha256(f"{self._seed}/block/{name}".encode()).digest()
        return self._packed([], 0, tokens, (index % count for index in itertools.count(int.from_bytes(digest) % count)))

    def answer_lengths(self) -> list[int] | None:
        """See ``TokenSource``."""
        answers = self._prompts.answers
        if answers is None:
            return None
        encoded = self._encode([answers[index] for index in self._firsts])
        return [sum(token not in self._special for token in ids) for ids in encoded]

    def name_of(self, request: int) -> str:
        """See ``TokenSource``."""
        return f"prompt {self._firsts[request]}"

    def _natural(self, requests: Sequence[int], turns: Sequence[int]) -> list[Ids]:
        """The prompts of these requests as they are, rendered where there is a template."""
        firsts = [self._firsts[request] for request in requests]
        if self._template is None:
            return [self._ids[first] for first in firsts]
        texts = [self._prompts.texts[first] for first in firsts]
        rendered = self._template.messages(texts, [turns[request] for request in requests])
        return [self._valid(first, ids) for first, ids in zip(firsts, rendered, strict=True)]

    def _cut(self, ahead: list[int], start: int, tokens: int, turn: int) -> Ids:
        if self._template is None:
            return self._packed(ahead, start, tokens, self._order)
        return self._template.framed(turn, tokens, lambda room: self._packed(ahead, start, room, self._order))

    def _packed(self, ahead: list[int], start: int, tokens: int, order: Iterator[int]) -> Ids:
        """The prompts of ``ahead`` from ``start`` on, which ``order`` continues, cut to ``tokens``."""
        ids: list[int] = []
        while len(ids) < tokens:
            if start == len(ahead):
                ahead.append(next(order))
            self._fetch([ahead[start]])
            ids += self._ids[ahead[start]]
            start += 1
        return tuple(ids[:tokens])

    def _fetch(self, indices: Sequence[int]) -> None:
        """Encode several prompts in one call; within a template without the special tokens around a text of its own."""
        texts = self._prompts.texts
        wanted = [index for index in dict.fromkeys(indices) if index not in self._ids]
        if not wanted:
            return
        for index, ids in zip(wanted, self._encode([texts[index] for index in wanted]), strict=True):
            kept = ids if self._template is None else [token for token in ids if token not in self._special]
            self._ids[index] = self._valid(index, kept)

    def _valid(self, index: int, ids: Sequence[int]) -> Ids:
        return valid_ids(ids, f"prompt {index}", self._prompts.texts[index], self._vocab_size)


def valid_ids(ids: Sequence[int], name: str, text: str, vocab_size: int) -> Ids:
    """The ids of a text.

    Raises:
        ConfigError: There are none, or one is beyond the vocabulary.
    """
    if not ids:
        raise ConfigError(f"{name} has no tokens", field=FIELD, found=repr(text[:40]))
    if max(ids) >= vocab_size:
        raise ConfigError(
            f"{name} has token id {max(ids)}, beyond the model's vocabulary of {vocab_size}",
            "does the tokenizer belong to the model?",
            field="model.tokenizer",
        )
    return tuple(ids)


def _needed(tokens: int | None) -> int:
    if tokens is None:
        raise ConfigError(
            "synthetic prompts have no natural length",
            field="workload.input_tokens",
            found="nothing",
            allowed="a number of tokens",
        )
    return tokens


def order_of(count: int, seed: str) -> Iterator[int]:
    """Endless rounds over all indices, each in its own order. By hash, so that no library update can change it."""
    cycle = 0
    while True:
        keys = [(hashlib.sha256(f"{seed}/{cycle}/{index}".encode()).digest(), index) for index in range(count)]
        yield from (index for _, index in sorted(keys))
        cycle += 1
