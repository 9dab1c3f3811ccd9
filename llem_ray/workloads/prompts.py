"""From a prompt source to requests: token ids of known lengths, the same for every engine, fixed by a seed."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Final, Protocol

from llem_ray.core.backend import ChatMessage, Request
from llem_ray.core.errors import ConfigError
from llem_ray.core.spec import LengthSpec, PromptSpec, WorkloadSpec
from llem_ray.workloads.hub_dataset import read_dataset
from llem_ray.workloads.lengths import draw_lengths
from llem_ray.workloads.prompt_files import FIELD, PromptSet, read_prompt_file

Encode = Callable[[Sequence[str]], list[list[int]]]
EncodeChats = Callable[[Sequence[Sequence[ChatMessage]]], list[list[int]]]
Ids = tuple[int, ...]
GivenLengths = tuple[int | None, int | None]
"""Input and output tokens of one request; None leaves one of them to the workload."""

NO_PROMPTS: Final = PromptSet()


def load_prompts(spec: PromptSpec, base_dir: str | os.PathLike[str] = ".") -> PromptSet:
    """The texts of a prompt source, in its order; empty for ``synthetic``, which has none.

    Args:
        spec: Which source.
        base_dir: Folder that a relative ``path`` or ``dataset`` starts from.

    Raises:
        ConfigError: The file or data set is missing, empty or malformed, or has a line or row without a prompt, which is named.
        PluginError: The library that reads it is not installed; the hint is the pip command.
    """
    if spec.source == "file":
        if spec.path is None:
            raise ConfigError("`source: file` needs a path", field=f"{FIELD}.path", found="nothing", allowed="a JSON Lines file")
        return read_prompt_file(spec, Path(base_dir) / Path(spec.path).expanduser())
    if spec.path is not None:
        raise ConfigError(
            f"a path has no meaning with `source: {spec.source}`",
            field=f"{FIELD}.path",
            found=spec.path,
            allowed="`source: file`",
        )
    if spec.source == "dataset":
        return read_dataset(spec, Path(base_dir))
    if spec.source == "synthetic":
        return NO_PROMPTS
    shipped = files("llem_ray.workloads") / "data" / "prompts.jsonl"
    return read_prompt_file(PromptSpec(source="file", limit=spec.limit), Path(str(shipped)))


def build_requests(
    workload: WorkloadSpec,
    encode: Encode,
    vocab_size: int,
    context_tokens: int,
    prompts: PromptSet = NO_PROMPTS,
    special_token_ids: Collection[int] = (),
    *,
    encode_chats: EncodeChats | None = None,
    lengths: Sequence[GivenLengths] | None = None,
) -> tuple[Request, ...]:
    """The distinct requests of one pass; ``request_id`` is the index as a decimal number.

    Prompts are taken in an order drawn from ``workload.seed``, and drawn anew each time the set is used up. With
    ``input_tokens`` a longer prompt is cut at its end and a shorter one continued with the prompts that follow it in that
    order; special tokens between them stay, as in packed training text. Request i starts with the i-th prompt of the order,
    so no two requests of one round share their beginning, their shared prefix apart.

    With ``turns`` requests come in blocks of ``batch_size`` conversations: the first turn of each, then the second of each, so
    that no batch holds two turns of one conversation.

    Args:
        workload: Lengths, number of requests, seed. Distributions name no file any more, see ``load_lengths``.
        encode: The engine's tokenizer, see ``InferenceBackend.encode``. Not called for ``synthetic``.
        vocab_size: Number of token ids of the model.
        context_tokens: Longest prompt plus output the model takes.
        prompts: What ``load_prompts`` returned.
        special_token_ids: Ids that synthetic prompts leave out.
        encode_chats: The engine's chat template, see ``InferenceBackend.encode_chats``; None where it has none.
        lengths: Input and output tokens of each request, in place of the workload's own number of requests and lengths; a
            length that is None stays the workload's own.

    Raises:
        ConfigError: A prompt is empty, its ids are outside the vocabulary, it is too long for the context, an output has no
            tokens, or the model has no chat template.
    """
    inputs = _input_lengths(workload, lengths)
    longest = workload.shared_prefix_tokens + max(tokens or 0 for tokens in inputs)
    if longest >= context_tokens:  # refused before anything of that size is made
        raise _too_long("a prompt", longest, _least_output(workload), context_tokens, _blamed(workload))
    source = _source(workload, encode, encode_chats, vocab_size, prompts, special_token_ids)
    bodies = source.bodies(inputs)
    outputs = _output_lengths(workload, lengths, len(inputs), source)
    if max(outputs) >= context_tokens:
        raise _too_long("an answer", 1, max(outputs), context_tokens, "workload.output_tokens")
    random_ids = _RandomIds(vocab_size, special_token_ids)
    prompt_ids = _conversations(workload, bodies, outputs, source, random_ids)
    for index, ids in enumerate(prompt_ids):
        if len(ids) + outputs[index] > context_tokens:
            raise _too_long(source.name_of(index), len(ids), outputs[index], context_tokens, _blamed(workload))
    return tuple(
        Request(request_id=str(index), prompt_token_ids=ids, max_new_tokens=new_tokens, ignore_eos=workload.ignore_eos)
        for index, (ids, new_tokens) in enumerate(zip(prompt_ids, outputs, strict=True))
    )


def batches(requests: Sequence[Request], batch_size: int) -> Iterator[tuple[Request, ...]]:
    """Consecutive groups of ``batch_size`` requests; the last may be smaller."""
    for start in range(0, len(requests), batch_size):
        yield tuple(requests[start : start + batch_size])


class _Source(Protocol):
    """Where the tokens of prompts come from."""

    def bodies(self, inputs: Sequence[int | None]) -> list[Ids]:
        """What each request asks: as many tokens as given, or a prompt of its natural length for None."""
        ...

    def prefix(self, group: int, tokens: int) -> Ids:
        """The first tokens of all prompts of a group."""
        ...

    def answer_lengths(self) -> list[int] | None:
        """Tokens of the known answers to the bodies; None where there are none."""
        ...

    def name_of(self, request: int) -> str:
        """What an error calls the prompt of a request."""
        ...


class _RandomIds:
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
class _Synthetic:
    """Prompts of random ids."""

    seed: int
    ids: _RandomIds

    def bodies(self, inputs: Sequence[int | None]) -> list[Ids]:
        return [self.ids.draw(f"{self.seed}/{index}", _needed(tokens)) for index, tokens in enumerate(inputs)]

    def prefix(self, group: int, tokens: int) -> Ids:
        return self.ids.draw(f"{self.seed}/prefix/{group}", tokens)

    def answer_lengths(self) -> list[int] | None:
        return None

    def name_of(self, request: int) -> str:
        return f"request {request}"


class _Texts:
    """Prompts of a text source, encoded when first asked for: a file may hold far more than a pass needs."""

    def __init__(
        self, prompts: PromptSet, encode: Encode, encode_plain: Encode, vocab_size: int, special: Collection[int], seed: int
    ) -> None:
        if not prompts.texts:
            raise ConfigError("there are no prompts", field=FIELD, found="0 prompts", allowed="at least 1")
        self._prompts = prompts
        self._encode = encode
        self._encode_plain = encode_plain
        self._vocab_size = vocab_size
        self._special = frozenset(special)
        self._seed = seed
        self._ids: dict[int, Ids] = {}
        self._firsts: list[int] = []
        self._order = _order(len(prompts.texts), str(seed))

    def bodies(self, inputs: Sequence[int | None]) -> list[Ids]:
        self._firsts = list(islice(self._order, len(inputs)))
        self._fetch(self._firsts)
        ahead = list(self._firsts)
        return [
            self._ids[self._firsts[start]] if tokens is None else self._packed(ahead, start, tokens, self._order)
            for start, tokens in enumerate(inputs)
        ]

    def prefix(self, group: int, tokens: int) -> Ids:
        return self._packed([], 0, tokens, _order(len(self._prompts.texts), f"{self._seed}/prefix/{group}"))

    def answer_lengths(self) -> list[int] | None:
        answers = self._prompts.answers
        if answers is None:
            return None
        encoded = self._encode_plain([answers[index] for index in self._firsts])
        return [sum(token not in self._special for token in ids) for ids in encoded]

    def name_of(self, request: int) -> str:
        return f"prompt {self._firsts[request]}"

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
        """Encode several prompts in one call."""
        texts = self._prompts.texts
        wanted = [index for index in dict.fromkeys(indices) if index not in self._ids]
        if not wanted:
            return
        for index, ids in zip(wanted, self._encode([texts[index] for index in wanted]), strict=True):
            if not ids:
                raise ConfigError(f"prompt {index} has no tokens", field=FIELD, found=repr(texts[index][:40]))
            if max(ids) >= self._vocab_size:
                raise ConfigError(
                    f"prompt {index} has token id {max(ids)}, beyond the model's vocabulary of {self._vocab_size}",
                    "does the tokenizer belong to the model?",
                    field="model.tokenizer",
                )
            self._ids[index] = tuple(ids)


def _source(
    workload: WorkloadSpec,
    encode: Encode,
    encode_chats: EncodeChats | None,
    vocab_size: int,
    prompts: PromptSet,
    special: Collection[int],
) -> _Source:
    if workload.prompts.source == "synthetic":
        return _Synthetic(workload.seed, _RandomIds(vocab_size, special))
    encode_prompts = encode
    if workload.prompts.chat_template:
        if encode_chats is None:
            raise ConfigError(
                "this engine renders no chat templates", field=f"{FIELD}.chat_template", found="true", allowed="false"
            )
        render = encode_chats

        def encode_prompts(texts: Sequence[str]) -> list[list[int]]:
            return render([[ChatMessage(role="user", content=text)] for text in texts])

    return _Texts(prompts, encode_prompts, encode, vocab_size, special, workload.seed)


def _conversations(
    workload: WorkloadSpec, bodies: Sequence[Ids], outputs: Sequence[int], source: _Source, random_ids: _RandomIds
) -> list[Ids]:
    """Each request's prompt: prefix, earlier turns with their answers, and what is new."""
    groups, tokens = workload.prefix_groups, workload.shared_prefix_tokens
    prefixes = [source.prefix(group, tokens) for group in range(groups)] if tokens else [()] * groups
    if workload.turns == 1:
        return [prefixes[index % groups] + body if tokens else body for index, body in enumerate(bodies)]
    size = workload.batch_size
    prompts: list[Ids] = []
    for index, body in enumerate(bodies):
        block, within = divmod(index, size * workload.turns)
        if within < size:
            earlier = prefixes[(block * size + within) % groups]
        else:
            before = index - size
            earlier = prompts[before] + random_ids.draw(f"{workload.seed}/answer/{before}", outputs[before])
        prompts.append(earlier + body)
    return prompts


def _needed(tokens: int | None) -> int:
    if tokens is None:
        raise ConfigError(
            "synthetic prompts have no natural length",
            field="workload.input_tokens",
            found="nothing",
            allowed="a number of tokens",
        )
    return tokens


def _input_lengths(workload: WorkloadSpec, lengths: Sequence[GivenLengths] | None) -> list[int | None]:
    """The new tokens of each request; None for its natural length."""
    count = workload.requests if workload.requests is not None else workload.batch_size * workload.turns
    if lengths is not None:
        count = len(lengths)
        _check_given(workload, lengths)
    own: list[int | None] = [None] * count
    if workload.input_tokens is not None:
        own = [*draw_lengths(workload.input_tokens, count, f"{workload.seed}/input_tokens")]
    return own if lengths is None else [own[i] if tokens is None else tokens for i, (tokens, _) in enumerate(lengths)]


def _check_given(workload: WorkloadSpec, lengths: Sequence[GivenLengths]) -> None:
    for index, (inputs, outputs) in enumerate(lengths):
        if inputs == 0 or outputs == 0:
            found = f"{inputs} input and {outputs} output tokens"
            message = f"request {index} asks for nothing"
            raise ConfigError(message, field="workload", found=found, allowed="at least 1 of each")
    if not lengths or workload.turns > 1:
        found = f"turns: {workload.turns}" if lengths else "0 requests"
        allowed = "turns: 1, at least 1 request"
        raise ConfigError("given lengths are those of single requests", field="workload.turns", found=found, allowed=allowed)


def _output_lengths(workload: WorkloadSpec, lengths: Sequence[GivenLengths] | None, count: int, source: _Source) -> list[int]:
    given = [None] * count if lengths is None else [tokens for _, tokens in lengths]
    if None not in given:
        return [tokens for tokens in given if tokens is not None]
    asked = workload.output_tokens
    answers = source.answer_lengths() if isinstance(asked, LengthSpec) and asked.distribution == "answer" else None
    own = draw_lengths(asked, count, f"{workload.seed}/output_tokens", answers=answers)
    return [own[i] if tokens is None else tokens for i, tokens in enumerate(given)]


def _least_output(workload: WorkloadSpec) -> int:
    return workload.output_tokens if isinstance(workload.output_tokens, int) else workload.output_tokens.min or 1


def _order(count: int, seed: str) -> Iterator[int]:
    """Endless rounds over all indices, each in its own order. By hash, so that no library update can change it."""
    cycle = 0
    while True:
        keys = [(hashlib.sha256(f"{seed}/{cycle}/{index}".encode()).digest(), index) for index in range(count)]
        yield from (index for _, index in sorted(keys))
        cycle += 1


def _blamed(workload: WorkloadSpec) -> str:
    """The field that decides how long prompts are."""
    return FIELD if workload.input_tokens is None else "workload.input_tokens"


def _too_long(prompt: str, input_tokens: int, output_tokens: int, context_tokens: int, field: str) -> ConfigError:
    return ConfigError(
        f"{prompt} is too long for the model: {input_tokens} prompt + {output_tokens} output"
        f" = {input_tokens + output_tokens} tokens",
        "lower workload.input_tokens or workload.output_tokens",
        field=field,
        found=f"{input_tokens + output_tokens} tokens",
        allowed=f"at most {context_tokens} tokens, the model's context",
    )
