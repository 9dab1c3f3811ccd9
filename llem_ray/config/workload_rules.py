"""Rules between the fields of a workload."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Final, NamedTuple

from llem_ray.config.fields import Path
from llem_ray.core.workload_spec import LengthSpec, PromptSpec, TimeSpec, WorkloadSpec

_TAKES: Final[Mapping[str, tuple[frozenset[str], frozenset[str]]]] = {
    "fixed": (frozenset({"mean"}), frozenset()),
    "uniform": (frozenset({"min", "max"}), frozenset()),
    "exponential": (frozenset({"mean"}), frozenset({"min", "max"})),
    "normal": (frozenset({"mean", "std"}), frozenset({"min", "max"})),
    "lognormal": (frozenset({"mean", "std"}), frozenset({"min", "max"})),
    "empirical": (frozenset(), frozenset({"values", "weights", "path"})),
    "answer": (frozenset(), frozenset({"min", "max"})),
}
"""Distribution -> the fields it needs, and those it may have."""


class Broken(NamedTuple):
    """A rule that does not hold, and the field to blame."""

    path: Path
    message: str
    hint: str | None = None
    found: str | None = None
    allowed: str | None = None


def broken_workload(workload: WorkloadSpec) -> Broken | None:
    """The first rule the workload breaks."""
    rules = (*_prompts(workload.prompts), *_requests(workload))
    if rules:
        return rules[0]
    for name in ("input_tokens", "output_tokens", "turns", "think_time_s"):
        drawn = getattr(workload, name)
        if isinstance(drawn, LengthSpec | TimeSpec) and (broken := broken_lengths(drawn, ("workload", name))) is not None:
            return broken
    return None


def broken_lengths(lengths: LengthSpec | TimeSpec, path: Path) -> Broken | None:
    """The first rule that a distribution of lengths or waits, which lies at ``path``, breaks."""
    return next(iter((*_fields_of(lengths, path), *_bounds(lengths, path), *_empirical(lengths, path))), None)


def _prompts(prompts: PromptSpec) -> Iterator[Broken]:
    path = ("workload", "prompts")
    if prompts.source == "file" and not prompts.path:
        yield Broken((*path, "source"), "source: file needs workload.prompts.path")
    if prompts.source != "file" and prompts.path is not None:
        yield Broken((*path, "path"), "a path is for source: file", "set workload.prompts.source: file")
    if prompts.source == "dataset" and not prompts.dataset:
        yield Broken((*path, "source"), "source: dataset needs workload.prompts.dataset")
    yield from _only_for(prompts, ("dataset",), ("dataset", "config", "split", "revision"))
    yield from _only_for(prompts, ("file", "dataset"), ("format", "answer_column"))
    yield from _only_for(prompts, ("file", "dataset", "builtin"), ("limit",))
    if prompts.format == "sharegpt" and prompts.answer_column is not None:
        yield Broken((*path, "answer_column"), "format: sharegpt has answers of its own", "remove answer_column")


def _only_for(prompts: PromptSpec, sources: tuple[str, ...], names: tuple[str, ...]) -> Iterator[Broken]:
    if prompts.source in sources:
        return
    for item in fields(PromptSpec):
        value = getattr(prompts, item.name)
        if item.name in names and value != item.default:
            allowed = f"with source: {' or '.join(sources)}"
            message = f"{item.name} has no meaning with source: {prompts.source}"
            yield Broken(("workload", "prompts", item.name), message, found=str(value), allowed=allowed)


def _requests(workload: WorkloadSpec) -> Iterator[Broken]:
    prompts = workload.prompts
    if prompts.source == "synthetic" and workload.input_tokens is None:
        hint = "set workload.input_tokens"
        yield Broken(("workload", "prompts", "source"), "synthetic prompts have no natural length", hint)
    for name in ("input_tokens", "turns"):
        lengths = getattr(workload, name)
        if isinstance(lengths, LengthSpec) and lengths.distribution == "answer":
            path = ("workload", name, "distribution")
            yield Broken(path, "an answer's length is one of output tokens", found="answer", allowed=_choices(but="answer"))
    wants_answers = isinstance(workload.output_tokens, LengthSpec) and workload.output_tokens.distribution == "answer"
    if wants_answers and prompts.format != "sharegpt" and prompts.answer_column is None:
        allowed = "prompts with format: sharegpt or an answer_column"
        asked = ("workload", "output_tokens", "distribution")
        yield Broken(asked, "these prompts have no known answers", found="answer", allowed=allowed)
    if workload.prefix_groups > 1 and workload.shared_prefix_tokens == 0:
        found = f"{workload.prefix_groups} groups of 0 shared tokens"
        yield Broken(("workload", "prefix_groups"), "groups need a prefix", "set workload.shared_prefix_tokens", found)
    yield from _numbers(workload)
    yield from _turns(workload)


def _numbers(workload: WorkloadSpec) -> Iterator[Broken]:
    """How many requests or conversations there are."""
    online, turns = workload.load.online, workload.turns
    with_turns = turns != 1
    whole = turns * (1 if online else workload.batch_size) if isinstance(turns, int) else None
    if whole is None and workload.requests is not None:
        hint = "set workload.conversations instead"
        yield Broken(("workload", "requests"), "requests cannot be counted where turns vary", hint, found=str(workload.requests))
    if workload.conversations is not None and (not with_turns or workload.requests is not None):
        message = "requests and conversations say the same" if with_turns else "without turns a conversation is one request"
        hint = "remove one" if with_turns else "set workload.requests, or workload.turns"
        yield Broken(("workload", "conversations"), message, hint, str(workload.conversations))
    if with_turns and whole is not None and workload.requests is not None and workload.requests % whole:
        yield Broken(
            ("workload", "requests"),
            "conversations must be whole" if online else "conversations must be whole, and fill their batches",
            found=str(workload.requests),
            allowed=f"a multiple of {whole}, {'turns' if online else 'turns x batch_size'}",
        )


def _turns(workload: WorkloadSpec) -> Iterator[Broken]:
    turns, with_turns, online = workload.turns, workload.turns != 1, workload.load.online
    shown = "a distribution" if isinstance(turns, LengthSpec) else str(turns)
    if workload.max_conversation_tokens is not None and turns != "recorded":
        message, hint = "max_conversation_tokens is for recorded conversations", "set workload.turns: recorded"
        yield Broken(("workload", "max_conversation_tokens"), message, hint, found=str(workload.max_conversation_tokens))
    if turns == "recorded":
        yield from _recorded(workload)
    if with_turns and workload.load.pattern == "trace":
        hint = "leave turns out; a Mooncake trace's hash_ids tell which prompts go on from others"
        message = "each arrival of a trace is one request: conversations are in its prompts already"
        yield Broken(("workload", "turns"), message, hint, found=shown, allowed="1")
    if not with_turns and workload.turn_answers != "auto":
        message, hint = "turn_answers are those of conversations", "set workload.turns"
        yield Broken(("workload", "turn_answers"), message, hint, found=workload.turn_answers, allowed="auto")
    if workload.think_time_s and not (online and with_turns):
        message = "think_time_s is between the turns of an online load"
        hint = "set workload.turns and workload.load.pattern"
        found = "a distribution" if isinstance(workload.think_time_s, TimeSpec) else f"{workload.think_time_s:g}"
        yield Broken(("workload", "think_time_s"), message, hint, found=found, allowed="0")


def _recorded(workload: WorkloadSpec) -> Iterator[Broken]:
    if workload.prompts.format != "sharegpt":
        message, hint = "recorded turns are those of conversations in a file", "set workload.prompts.format: sharegpt"
        yield Broken(("workload", "turns"), message, hint, found=f"format: {workload.prompts.format}", allowed="format: sharegpt")
    if workload.input_tokens is not None:
        hint = "leave input_tokens out; max_conversation_tokens ends conversations early"
        yield Broken(("workload", "input_tokens"), "recorded messages keep their lengths", hint, found="a length", allowed="none")


def _fields_of(lengths: LengthSpec | TimeSpec, path: Path) -> Iterator[Broken]:
    needed, optional = _TAKES[lengths.distribution]
    kind = f"distribution: {lengths.distribution}"
    optional &= {item.name for item in fields(lengths)}
    allowed = " and ".join(f"{word} {', '.join(sorted(names))}" for word, names in _words(needed, optional) if names)
    for item in fields(lengths):
        value: Any = getattr(lengths, item.name)
        if item.name == "distribution":
            continue
        if value is None and item.name in needed:
            yield Broken(path, f"{kind} needs {item.name}", found=f"no {item.name}", allowed=allowed)
        if value is not None and item.name not in needed | optional:
            message = f"{item.name} has no meaning with {kind}"
            shown = str(list(value) if isinstance(value, tuple) else value)
            yield Broken((*path, item.name), message, found=shown, allowed=allowed)


def _words(needed: frozenset[str], optional: frozenset[str]) -> tuple[tuple[str, frozenset[str]], ...]:
    return (("needed:", needed), ("possible:", optional))


def _bounds(lengths: LengthSpec | TimeSpec, path: Path) -> Iterator[Broken]:
    of_time = isinstance(lengths, TimeSpec)
    least, most, mean = lengths.min or (0 if of_time else 1), lengths.max, lengths.mean
    if most is not None and least > most:
        allowed = "min <= max"
        yield Broken((*path, "min"), "the bounds are impossible", found=f"min {least:g}, max {most:g}", allowed=allowed)
    if not of_time and lengths.distribution == "fixed" and mean is not None and (mean < 1 or mean != int(mean)):
        yield Broken((*path, "mean"), "a length is a whole number", found=f"{mean:g}", allowed="a whole number >= 1")
    elif mean is not None and (mean < least or (most is not None and mean > most)):
        allowed = f"{least:g} to {most:g}" if most is not None else f">= {least:g}"
        yield Broken((*path, "mean"), "the mean lies outside of the bounds", found=f"{mean:g}", allowed=allowed)


def _empirical(lengths: LengthSpec | TimeSpec, path: Path) -> Iterator[Broken]:
    if lengths.distribution != "empirical":
        return
    if isinstance(lengths, TimeSpec):
        if lengths.values is None:
            yield Broken(path, "distribution: empirical draws from values", found="no values", allowed="values")
    elif (lengths.values is None) == (lengths.path is None):
        found = "neither" if lengths.values is None else "both"
        yield Broken(path, "distribution: empirical draws from values or from a file", found=found, allowed="values or path")
    if lengths.values is not None and not lengths.values:
        yield Broken((*path, "values"), "there is nothing to draw from", found="[]", allowed="at least one length")
    if lengths.weights is None:
        return
    if lengths.values is None or len(lengths.weights) != len(lengths.values):
        found = f"{len(lengths.weights)} weights for {len(lengths.values or ())} values"
        yield Broken((*path, "weights"), "each value has a weight", found=found, allowed="as many weights as values")
    if not sum(lengths.weights) > 0:
        yield Broken((*path, "weights"), "all weights are 0", found=str(list(lengths.weights)), allowed="one above 0")


def _choices(*, but: str) -> str:
    return ", ".join(name for name in _TAKES if name not in {but, "exponential"})
