"""From a prompt source to requests: token ids of known lengths, the same for every engine, fixed by a seed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final

from llem_ray.core.backend import Request
from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import LengthSpec, PromptSpec, WorkloadSpec
from llem_ray.workloads.chats import EncodeChats, Ids
from llem_ray.workloads.conversations import Script, make_requests, places_of, together, turns_of
from llem_ray.workloads.hub_dataset import read_dataset
from llem_ray.workloads.lengths import draw_lengths
from llem_ray.workloads.prompt_files import FIELD, PromptSet, read_prompt_file
from llem_ray.workloads.recorded import Conversations
from llem_ray.workloads.token_sources import Encode, RandomIds, TokenSource, make_source, template_of
from llem_ray.workloads.trace_blocks import Block, shared_tokens

GivenLengths = tuple[int | None, int | None]
"""Input and output tokens of one request; None leaves one of them to the workload."""

NO_PROMPTS: Final = PromptSet()


def load_prompts(spec: PromptSpec, base_dir: str | os.PathLike[str] = ".", *, all_turns: bool = False) -> PromptSet:
    """The texts of a prompt source, in its order; empty for ``synthetic``, which has none.

    Args:
        spec: Which source.
        base_dir: Folder that a relative ``path`` or ``dataset`` starts from.
        all_turns: Keep all turns of conversations, for ``turns: recorded``.

    Raises:
        ConfigError: The file or data set is missing, empty or malformed, or has a line or row without a prompt, which is named.
        PluginError: The library that reads it is not installed; the hint is the pip command.
    """
    if spec.source == "file":
        if spec.path is None:
            raise ConfigError("`source: file` needs a path", field=f"{FIELD}.path", found="nothing", allowed="a JSON Lines file")
        return read_prompt_file(spec, Path(base_dir) / Path(spec.path).expanduser(), all_turns=all_turns)
    if spec.path is not None:
        raise ConfigError(
            f"a path has no meaning with `source: {spec.source}`",
            field=f"{FIELD}.path",
            found=spec.path,
            allowed="`source: file`",
        )
    if spec.source == "dataset":
        return read_dataset(spec, Path(base_dir), all_turns=all_turns)
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
    blocks: Sequence[tuple[Block, ...] | None] | None = None,
) -> tuple[Request, ...]:
    """The distinct requests of one pass; ``request_id`` is the index as a decimal number.

    Prompts are taken in an order drawn from ``workload.seed``, and drawn anew each time the set is used up. With
    ``input_tokens`` a longer prompt is cut at its end and a shorter one continued with the prompts that follow it in that
    order; special tokens between them stay, as in packed training text. Request i starts with the i-th prompt of the order,
    so no two requests of one round share their beginning, their shared prefix apart.

    With ``turns`` a batch holds one turn of each of ``batch_size`` conversations and the next batch their next turns; one that
    has ended makes room for another. Under an online load each conversation's turns follow one another. Recorded
    conversations are taken in the order that prompts are, and keep their messages.

    With ``chat_template`` lengths count the template's tokens, which are kept whole: it is the message that is cut.

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
        blocks: Parts that each prompt consists of, in place of the source's prompts; None for a prompt without such parts.

    Raises:
        ConfigError: A prompt is empty, its ids are outside the vocabulary, it is too long for the context, an output has no
            tokens, or the model has no chat template.
    """
    source = make_source(workload, encode, encode_chats, vocab_size, prompts, special_token_ids)
    random_ids = RandomIds(vocab_size, special_token_ids)
    if workload.recorded:
        template = template_of(workload, encode_chats)
        talks = Conversations(prompts, encode, template, vocab_size, special_token_ids)
        script = talks.script(workload, workload.whole_conversations or workload.batch_size, together(workload), random_ids)
    else:
        script = _drawn(workload, source, context_tokens, random_ids, lengths, blocks)
    shared = [0] * len(script.bodies) if blocks is None else shared_tokens(blocks)
    requests = make_requests(workload, script, source.prefix, shared)
    for index, request in enumerate(requests):
        tokens = len(request.prompt_token_ids)
        if tokens + request.max_new_tokens > context_tokens:
            raise _too_long(script.name_of(index), tokens, request.max_new_tokens, context_tokens, _blamed(workload))
    return requests


def batches(requests: Sequence[Request], batch_size: int) -> Iterator[tuple[Request, ...]]:
    """Consecutive groups of ``batch_size`` requests, or fewer: none holds two turns of a conversation."""
    group: list[Request] = []
    talking: set[int] = set()
    for request in requests:
        if len(group) == batch_size or request.conversation in talking:
            yield tuple(group)
            group, talking = [], set()
        group.append(request)
        if request.conversation is not None:
            talking.add(request.conversation)
    if group:
        yield tuple(group)


def _drawn(
    workload: WorkloadSpec,
    source: TokenSource,
    context_tokens: int,
    random_ids: RandomIds,
    lengths: Sequence[GivenLengths] | None,
    blocks: Sequence[tuple[Block, ...] | None] | None,
) -> Script:
    """What requests of drawn lengths and turns say. Arguments are those of ``build_requests``."""
    if lengths is not None:
        _check_given(workload, lengths)
    places = places_of([1] * len(lengths) if lengths is not None else turns_of(workload), together(workload))
    inputs = _input_lengths(workload, len(places), lengths)
    longest = workload.shared_prefix_tokens + max(tokens or 0 for tokens in inputs)
    if longest >= context_tokens:  # refused before anything of that size is made
        raise _too_long("a prompt", longest, _least_output(workload), context_tokens, _blamed(workload))
    bodies = _bodies(source, inputs, [place.turn for place in places], blocks)
    outputs = _output_lengths(workload, lengths, len(inputs), source)
    if max(outputs) >= context_tokens:
        raise _too_long("an answer", 1, max(outputs), context_tokens, "workload.output_tokens")
    return Script(
        places=places,
        bodies=bodies,
        outputs=outputs,
        answer=lambda index: random_ids.draw(f"{workload.seed}/answer/{index}", outputs[index]),
        name_of=source.name_of,
    )


def _bodies(
    source: TokenSource,
    inputs: Sequence[int | None],
    turns: Sequence[int],
    blocks: Sequence[tuple[Block, ...] | None] | None,
) -> list[Ids]:
    """What each request adds to its conversation."""
    if blocks is None or not any(blocks):
        return source.bodies(inputs, turns)
    bodies = source.bodies([1 if parts else tokens for tokens, parts in zip(inputs, blocks, strict=True)], turns)
    made: dict[str, Ids] = {}
    for index, parts in enumerate(blocks):
        if parts:
            bodies[index] = tuple(token for part in parts for token in _block(source, part, made))
    return bodies


def _block(source: TokenSource, block: Block, made: dict[str, Ids]) -> Ids:
    if len(made.get(block.name, ())) < block.tokens:
        made[block.name] = source.block(block.name, block.tokens)
    return made[block.name][: block.tokens]


def _input_lengths(workload: WorkloadSpec, count: int, lengths: Sequence[GivenLengths] | None) -> list[int | None]:
    """The new tokens of each request; None for its natural length."""
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
    if not lengths or workload.turns != 1:
        found = f"turns: {workload.turns}" if lengths else "0 requests"
        allowed = "turns: 1, at least 1 request"
        raise ConfigError("given lengths are those of single requests", field="workload.turns", found=found, allowed=allowed)


def _output_lengths(workload: WorkloadSpec, lengths: Sequence[GivenLengths] | None, count: int, source: TokenSource) -> list[int]:
    given = [None] * count if lengths is None else [tokens for _, tokens in lengths]
    if None not in given:
        return [tokens for tokens in given if tokens is not None]
    asked = workload.output_tokens
    answers = source.answer_lengths() if isinstance(asked, LengthSpec) and asked.distribution == "answer" else None
    own = draw_lengths(asked, count, f"{workload.seed}/output_tokens", answers=answers)
    return [own[i] if tokens is None else tokens for i, tokens in enumerate(given)]


def _least_output(workload: WorkloadSpec) -> int:
    return workload.output_tokens if isinstance(workload.output_tokens, int) else workload.output_tokens.min or 1


def _blamed(workload: WorkloadSpec) -> str:
    """The field that decides how long prompts are."""
    if workload.recorded:
        return "workload.max_conversation_tokens"
    return FIELD if workload.input_tokens is None else "workload.input_tokens"


def _too_long(prompt: str, input_tokens: int, output_tokens: int, context_tokens: int, field: str) -> ConfigError:
    return ConfigError(
        f"{prompt} is too long for the model: {input_tokens} prompt + {output_tokens} output"
        f" = {input_tokens + output_tokens} tokens",
        "set it, at most to the model's context: conversations then end before they are too long"
        if field == "workload.max_conversation_tokens"
        else "lower workload.input_tokens or workload.output_tokens",
        field=field,
        found=f"{input_tokens + output_tokens} tokens",
        allowed=f"at most {context_tokens} tokens, the model's context",
    )
