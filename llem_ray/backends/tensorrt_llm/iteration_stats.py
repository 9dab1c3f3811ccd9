"""TensorRT-LLM's statistics of its iterations as steps: exact counts, times of its own clock turned into ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from llem_ray.core.backend import StepEvent, StepKind

TIMESTAMP: Final = "%m-%d-%Y %H:%M:%S.%f"
"""Local wall time, without a zone."""

SLACK_NS: Final = 1_000_000
"""How far the two clocks may have drifted apart during a run before an iteration counts as one of an earlier run."""


class UnusableStats(Exception):
    """The statistics do not account for the run; the text says why."""


def steps_of(
    stats: Sequence[Mapping[str, Any]],
    *,
    begin_ns: int,
    end_ns: int,
    wall: datetime,
    now_ns: int,
    overlapped: bool,
    prompt_tokens: int,
    output_tokens: int,
    prompts_may_be_cached: bool = False,
) -> list[StepEvent]:
    """One StepEvent for each iteration that computed something.

    An iteration's `timestamp` is taken when it has its requests, `iterLatencyMS` counts from before it waited for them until
    its tokens were handed out. So the latter is cut where a later iteration proves it too long, and a step never begins before
    the one before it has ended: the GPU computes them one after the other, though the host prepares the next meanwhile.

    Args:
        stats: As `get_stats` returns them, of this run and maybe of an earlier one.
        begin_ns: When the run started.
        end_ns: When its last token was delivered.
        wall: Local wall time now, without a zone.
        now_ns: The same instant on the monotonic clock.
        overlapped: An iteration is handed out while the next one runs.
        prompt_tokens: Of all requests.
        output_tokens: Of all answers, counted from ids.
        prompts_may_be_cached: Blocks are reused, so fewer prompt tokens may have been computed.

    Raises:
        UnusableStats: They are not readable, or do not add up to these tokens.
    """
    timed = ((_begin_ns(row, wall, now_ns), row) for row in stats if _requests(row))
    rows = sorted((pair for pair in timed if pair[0] >= begin_ns - SLACK_NS), key=lambda pair: pair[0])
    prefill = sum(_batch(row, "numCtxTokens") for _, row in rows)
    decode = sum(_requests(row) for _, row in rows)
    cached = prompt_tokens - prefill
    if decode != output_tokens or cached < 0 or (cached and not prompts_may_be_cached):
        raise UnusableStats(
            f"the engine's statistics count {prefill} prompt and {decode} output tokens, the requests {prompt_tokens} and"
            f" {output_tokens}"
        )
    later, steps, free_ns = (2 if overlapped else 1), [], begin_ns
    for index, (started_ns, row) in enumerate(rows):
        latest_ns = rows[index + later][0] if index + later < len(rows) else end_ns
        step_begin_ns = min(max(started_ns, free_ns), end_ns)
        finished_ns = min(started_ns + round(float(row["iterLatencyMS"]) * 1e6), latest_ns, end_ns)
        free_ns = max(step_begin_ns, finished_ns)
        steps.append(_step(row, step_begin_ns, free_ns))
    return steps


def _step(row: Mapping[str, Any], begin_ns: int, end_ns: int) -> StepEvent:
    prefill, generating = _batch(row, "numCtxTokens"), _batch(row, "numGenRequests")
    kind: StepKind = "decode" if not prefill else "mixed" if generating else "prefill"
    return StepEvent(
        begin_ns=begin_ns,
        end_ns=end_ns,
        kind=kind,
        prefill_tokens=prefill,
        decode_tokens=_requests(row),
        computed_tokens=prefill + generating,
    )


def _requests(row: Mapping[str, Any]) -> int:
    """Requests that got a token: all that decode, and those whose prompt is done."""
    return _batch(row, "numContextRequests") + _batch(row, "numGenRequests")


def _batch(row: Mapping[str, Any], name: str) -> int:
    try:
        return int(row["inflightBatchingStats"][name])
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableStats(f"the engine's statistics have no {name}") from error


def _begin_ns(row: Mapping[str, Any], wall: datetime, now_ns: int) -> int:
    try:
        age = wall - datetime.strptime(row["timestamp"], TIMESTAMP)
        float(row["iterLatencyMS"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableStats(f"the engine's statistics have no usable times: {error}") from error
    return now_ns - round(age / timedelta(microseconds=1)) * 1000
