"""Prompts of a trace that share their beginnings: Mooncake's ``hash_ids``.

Mooncake's traces name the blocks of 512 tokens that a prompt consists of, the last one partly filled. Requests with the same id
have the same tokens there, and before (FAST25-release traces of github.com/kvcache-ai/Mooncake).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final, NamedTuple

from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import LoadSpec, WorkloadSpec
from llem_ray.workloads.traces import FIELD, Arrival

BLOCK_TOKENS: Final = 512


class Block(NamedTuple):
    """A part of a prompt; parts of one name begin alike."""

    name: str
    tokens: int


def shortened(arrivals: Sequence[Arrival], load: LoadSpec) -> tuple[Arrival, ...]:
    """The arrivals as they are replayed: no prompt above ``trace_max_input_tokens``, and blocks only where they are wanted.

    Where one is longer all are multiplied by the same factor, to the nearest token and at least 1.
    """
    factor = _factor(arrivals, load)
    return tuple(
        replace(
            arrival,
            input_tokens=None if arrival.input_tokens is None else _scaled(arrival.input_tokens, factor),
            hash_ids=arrival.hash_ids if load.trace_prefixes else None,
        )
        for arrival in arrivals
    )


def blocks_of(arrivals: Sequence[Arrival], workload: WorkloadSpec) -> list[tuple[Block, ...] | None]:
    """The blocks of each prompt as ``shortened`` leaves it; None for one that names none.

    The edges between blocks are multiplied by the same factor, so that prompts share the same parts of themselves as before.

    Args:
        arrivals: As they stand in the trace.
        workload: How they are replayed.

    Raises:
        ConfigError: The ids of a line do not cover its prompt, or the workload wants something before what prompts share.
    """
    load = workload.load
    factor = _factor(arrivals, load)
    found = [_blocks(arrival, factor, load) if load.trace_prefixes else None for arrival in arrivals]
    if any(found):
        _refuse_more_shared(workload)
    return found


def shared_tokens(prompts: Sequence[tuple[Block, ...] | None]) -> list[int]:
    """Leading tokens of each prompt that an earlier one has too."""
    longest: dict[str, int] = {}
    shared: list[int] = []
    for blocks in prompts:
        tokens, known = 0, True
        for block in blocks or ():
            common = min(longest.get(block.name, 0), block.tokens)
            tokens += common if known else 0
            known = known and common == block.tokens
            longest[block.name] = max(longest.get(block.name, 0), block.tokens)
        shared.append(tokens)
    return shared


def _refuse_more_shared(workload: WorkloadSpec) -> None:
    chats = workload.prompts.chat_template
    if chats or workload.shared_prefix_tokens:
        raise ConfigError(
            "the trace's hash_ids say what prompts begin with: nothing can go before",
            "leave it out, or set workload.load.trace_prefixes: false",
            field="workload.prompts.chat_template" if chats else "workload.shared_prefix_tokens",
            found="true" if chats else str(workload.shared_prefix_tokens),
            allowed="false" if chats else "0",
        )


def _factor(arrivals: Sequence[Arrival], load: LoadSpec) -> float:
    longest = max((arrival.input_tokens or 0 for arrival in arrivals), default=0)
    most = load.trace_max_input_tokens
    return 1.0 if most is None or longest <= most else most / longest


def _scaled(tokens: int, factor: float) -> int:
    return max(1, round(tokens * factor))


def _blocks(arrival: Arrival, factor: float, load: LoadSpec) -> tuple[Block, ...] | None:
    if arrival.hash_ids is None or arrival.input_tokens is None:
        return None
    wanted = -(-arrival.input_tokens // BLOCK_TOKENS)
    if len(arrival.hash_ids) != wanted:
        raise ConfigError(
            f"hash_ids do not cover the prompt of {arrival.input_tokens} tokens",
            "workload.load.trace_prefixes: false replays prompts that share nothing",
            file=load.trace,
            line=arrival.line,
            field=FIELD,
            found=f"{len(arrival.hash_ids)} ids",
            allowed=f"{wanted} ids, one for every {BLOCK_TOKENS} tokens begun",
        )
    edges = [_edge(index, arrival.input_tokens, factor) for index in range(wanted + 1)]
    sizes = [until - since for since, until in pairwise(edges)]
    return tuple(Block(str(name), size) for name, size in zip(arrival.hash_ids, sizes, strict=True) if size)


def _edge(index: int, length: int, factor: float) -> int:
    whole = index * BLOCK_TOKENS
    return round(whole * factor) if whole < length else _scaled(length, factor)
