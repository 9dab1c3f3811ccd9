"""How long the requests of a workload will be, as far as that is known before any prompt is made of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import LengthSpec, WorkloadSpec
from llem_ray.workloads.conversations import places_of, together, turns_of
from llem_ray.workloads.lengths import draw_lengths
from llem_ray.workloads.prompt_files import FIELD as PROMPTS
from llem_ray.workloads.trace_blocks import shortened
from llem_ray.workloads.traces import FIELD as TRACE
from llem_ray.workloads.traces import Arrival


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """Tokens of one request, never more than it will have."""

    index: int
    prompt_tokens: int
    output_tokens: int
    line: int | None = None
    """Of the trace, where its lengths stand there."""


def require_context(workload: WorkloadSpec, arrivals: Sequence[Arrival], context_tokens: int, origin: str) -> None:
    """Refuse a workload of which a request is certain to be longer than the context.

    Args:
        workload: Distributions name no file any more.
        arrivals: Those that are replayed, as they stand in the trace.
        context_tokens: Longest prompt plus output.
        origin: What sets that limit.

    Raises:
        ConfigError: One is.
    """
    if not arrivals and _most(workload) <= context_tokens:
        return
    for extent in extents_of(workload, arrivals):
        if extent.prompt_tokens + extent.output_tokens > context_tokens:
            raise _too_long(workload, extent, context_tokens, origin)


def extents_of(workload: WorkloadSpec, arrivals: Sequence[Arrival]) -> list[Extent]:
    """Of each request, in order. Prompts of natural length, and answers as long as known ones, count as one token.

    Empty where the conversations are those of a file, which only a tokenizer can measure.
    """
    if workload.recorded:
        return []
    replayed = shortened(arrivals, workload.load)
    places = places_of([1] * len(replayed) if replayed else turns_of(workload), together(workload))
    count = len(places)
    inputs = _lengths(workload.input_tokens, count, f"{workload.seed}/input_tokens")
    outputs = _lengths(workload.output_tokens, count, f"{workload.seed}/output_tokens")
    lines: list[int | None] = [None] * count
    for index, arrival in enumerate(replayed):
        inputs[index] = arrival.input_tokens or inputs[index]
        outputs[index] = arrival.output_tokens or outputs[index]
        lines[index] = arrival.line if arrival.input_tokens or arrival.output_tokens else None
    found: list[Extent] = []
    for index, place in enumerate(places):
        before = workload.shared_prefix_tokens
        if place.former is not None:
            before = found[place.former].prompt_tokens + found[place.former].output_tokens
        prompt = before + inputs[index]
        found.append(Extent(index=index, prompt_tokens=prompt, output_tokens=outputs[index], line=lines[index]))
    return found


def _most(workload: WorkloadSpec) -> float:
    """A length that no request exceeds; infinite where none is known."""
    if workload.turns == "recorded":
        return float("inf")
    added = _longest(workload.input_tokens) + _longest(workload.output_tokens)
    return workload.shared_prefix_tokens + _longest(workload.turns) * added


def _longest(lengths: int | LengthSpec | None) -> float:
    if lengths is None or isinstance(lengths, int):
        return lengths or 1
    if lengths.distribution == "answer":
        return lengths.min or 1
    if lengths.values:
        return max(lengths.values)
    if lengths.distribution == "fixed" and lengths.mean is not None:
        return lengths.mean
    return lengths.max or float("inf")


def _lengths(lengths: int | LengthSpec | None, count: int, seed: str) -> list[int]:
    if lengths is None:
        return [1] * count
    if isinstance(lengths, LengthSpec) and lengths.distribution == "answer":
        return [lengths.min or 1] * count
    return draw_lengths(lengths, count, seed)


def _too_long(workload: WorkloadSpec, extent: Extent, context_tokens: int, origin: str) -> ConfigError:
    tokens, shared = extent.prompt_tokens + extent.output_tokens, workload.shared_prefix_tokens if workload.turns == 1 else 0
    parts = f"{shared} shared + {extent.prompt_tokens - shared}" if shared else str(extent.prompt_tokens)
    text = f"{parts} prompt + {extent.output_tokens} output = {tokens} tokens"
    allowed = f"at most {context_tokens} tokens together, {origin}"
    if extent.line is not None:
        return ConfigError(
            f"an arrival of the trace is too long for the model: {text}",
            "workload.load.trace_max_input_tokens shortens all prompts by one factor",
            file=workload.load.trace,
            line=extent.line,
            field=TRACE,
            found=f"{tokens} tokens",
            allowed=allowed,
        )
    field, value = _blamed(workload, extent, context_tokens)
    what = f"request {extent.index}" if workload.turns == 1 else f"request {extent.index}, with the turns before it,"
    return ConfigError(
        f"{what} is too long for the model: {text}",
        "lower workload.input_tokens or workload.output_tokens" + (", or workload.turns" if workload.turns != 1 else ""),
        field=field,
        found=str(value) if isinstance(value, int) else f"{tokens} tokens",
        allowed=allowed,
    )


def _blamed(workload: WorkloadSpec, extent: Extent, context_tokens: int) -> tuple[str, object]:
    """The field that is to be changed first, and its value."""
    single = workload.turns == 1
    if single and extent.output_tokens >= max(extent.prompt_tokens - workload.shared_prefix_tokens, context_tokens // 2):
        return "workload.output_tokens", workload.output_tokens
    if workload.shared_prefix_tokens >= context_tokens:
        return "workload.shared_prefix_tokens", workload.shared_prefix_tokens
    if workload.input_tokens is None:
        return ("workload.turns", workload.turns) if workload.turns != 1 else (PROMPTS, None)
    return "workload.input_tokens", workload.input_tokens
