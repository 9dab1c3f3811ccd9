"""What one online trial sends: its requests, and when."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from llem_ray.core.backend import LoadSchedule, Request
from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import WorkloadSpec
from llem_ray.workloads.arrivals import make_schedule
from llem_ray.workloads.chats import EncodeChats
from llem_ray.workloads.prompt_files import PromptSet
from llem_ray.workloads.prompts import NO_PROMPTS, build_requests
from llem_ray.workloads.token_sources import Encode
from llem_ray.workloads.trace_blocks import blocks_of, shortened
from llem_ray.workloads.traces import FIELD, Arrival

WARMUP_REQUESTS: Final = 8
"""Requests of a warm-up batch where the load names no concurrency."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineWork:
    """Requests in the order they are sent, and when."""

    requests: tuple[Request, ...]
    schedule: LoadSchedule
    warmup: tuple[tuple[Request, ...], ...]
    """Batches that are sent at once before the run."""


def build_online(
    workload: WorkloadSpec,
    encode: Encode,
    vocab_size: int,
    context_tokens: int,
    prompts: PromptSet = NO_PROMPTS,
    special_token_ids: Collection[int] = (),
    trace: Sequence[Arrival] = (),
    encode_chats: EncodeChats | None = None,
) -> OnlineWork:
    """Requests and schedule of an online workload.

    Lengths of a trace go before those of the workload.

    Args:
        workload: With an online load.
        encode: The engine's tokenizer.
        vocab_size: Number of token ids of the model.
        context_tokens: Longest prompt plus output the model takes.
        prompts: What ``load_prompts`` returned.
        special_token_ids: Ids that synthetic prompts leave out.
        trace: What ``load_trace`` returned, where the load replays one.
        encode_chats: The engine's chat template; None where it has none.

    Raises:
        ConfigError: A request does not fit into the context, or the trace is too short.
    """
    recorded = taken(workload, trace)
    arrivals = shortened(recorded, workload.load)
    _check_lengths(workload, arrivals, context_tokens)
    built = build_requests(
        replace(workload, requests=len(arrivals)) if arrivals else workload,
        encode=encode,
        vocab_size=vocab_size,
        context_tokens=context_tokens,
        prompts=prompts,
        special_token_ids=special_token_ids,
        encode_chats=encode_chats,
        lengths=[(arrival.input_tokens, arrival.output_tokens) for arrival in arrivals] or None,
        blocks=blocks_of(recorded, workload) or None,
    )
    size = min(workload.load.concurrency or WARMUP_REQUESTS, len(built))
    conversations = sum(request.follows is None for request in built)
    return OnlineWork(
        requests=built,
        schedule=make_schedule(workload.load, conversations, workload.seed, arrivals),
        warmup=tuple(tuple(map(_alone, built[start : start + size])) for start in range(0, len(built) - size + 1, size)),
    )


def taken(workload: WorkloadSpec, trace: Sequence[Arrival]) -> tuple[Arrival, ...]:
    """The arrivals that are replayed: the first ``workload.requests``, or all.

    Raises:
        ConfigError: There are fewer.
    """
    if not trace:
        return ()
    wanted = len(trace) if workload.requests is None else workload.requests
    if wanted > len(trace):
        allowed = f"at most {len(trace)}, what the trace holds"
        raise ConfigError("the trace is too short", field="workload.requests", found=str(wanted), allowed=allowed)
    return tuple(trace[:wanted])


def _alone(request: Request) -> Request:
    """The request as it is sent while warming up: whatever is asked before it."""
    return replace(request, follows=None, think_ns=0, new_prompt_tokens=None)


def _check_lengths(workload: WorkloadSpec, arrivals: Sequence[Arrival], context_tokens: int) -> None:
    for arrival in arrivals:
        inputs = arrival.input_tokens or workload.input_tokens
        outputs = arrival.output_tokens or workload.output_tokens
        if isinstance(inputs, int) and isinstance(outputs, int) and inputs + outputs > context_tokens:
            raise ConfigError(
                f"an arrival of the trace is too long for the model: {inputs} prompt + {outputs} output tokens",
                "workload.load.trace_max_input_tokens shortens all prompts by one factor",
                file=workload.load.trace,
                line=arrival.line,
                field=FIELD,
                found=f"{inputs + outputs} tokens",
                allowed=f"at most {context_tokens} tokens, the model's context",
            )
