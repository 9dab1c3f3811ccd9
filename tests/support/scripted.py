"""Requests whose tokens came at times a test names, in s."""

from __future__ import annotations

from collections.abc import Sequence

from llem_ray.core.backend import FinishReason, RequestRecord
from llem_ray.core.units import ns_from_s


def answered(
    name: int | str,
    token_times_s: Sequence[float],
    *,
    sent_s: float = 0.0,
    scheduled_s: float | None = None,
    prompt_tokens: int = 10,
    finish_reason: FinishReason = "length",
) -> RequestRecord:
    """A request with one token at each of the times."""
    return RequestRecord(
        request_id=f"0-{name}",
        prompt_tokens=prompt_tokens,
        padded_tokens=prompt_tokens,
        output_token_ids=tuple(range(len(token_times_s))),
        finish_reason=finish_reason,
        scheduled_ns=ns_from_s(sent_s if scheduled_s is None else scheduled_s),
        queued_ns=ns_from_s(sent_s),
        sent_ns=ns_from_s(sent_s),
        token_times_ns=tuple(ns_from_s(time_s) for time_s in token_times_s),
    )


def pairs(begin_s: float = 0.0) -> tuple[RequestRecord, ...]:
    """Ten requests, two at a time: pair k has its first tokens at 2 k + 1, its second at 2 k + 2 s, from ``begin_s`` on."""
    return tuple(
        answered(2 * pair + lane, [begin_s + 2 * pair + 1, begin_s + 2 * pair + 2], sent_s=begin_s)
        for pair in range(5)
        for lane in range(2)
    )
