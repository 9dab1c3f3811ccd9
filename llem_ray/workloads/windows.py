"""Which part of an online run is measured, and what happened in it. Times are ns of the engine node's monotonic clock."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from llem_ray.core.backend import RequestRecord
from llem_ray.core.measure_spec import MLPERF_MIN_S, WindowRule, WindowSpec
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.core.workload_spec import LoadSpec
from llem_ray.workloads.latency import succeeded


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The measured window of an online run."""

    begin_ns: int
    end_ns: int
    rule: WindowRule
    """What was asked for, ``auto`` resolved."""
    concurrency: int
    """Realised: the most requests that were being answered at one instant."""
    missed: str | None = None
    """Why the rule could not be kept; the window then is the whole run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What happened in a window (begin, end]."""

    requests: int
    """Requests that ended inside, failed ones included."""
    succeeded: int
    prompt_tokens: int
    """Prompts of requests whose first token came inside; of one that gave none, if it was sent inside. Failed ones included."""
    failed_prompt_tokens: int
    """Those of them of requests that failed."""
    shared_prompt_tokens: int | None
    """Those of them that an earlier request has too; None where that is not known."""
    padded_tokens: int
    output_tokens: int
    """Tokens delivered inside."""


def realised_concurrency(records: Sequence[RequestRecord]) -> int:
    """The most requests that were being answered at one instant: their first token had come, their last not before it.

    A limit that the KV cache sets shows here, while requests that wait inside the engine do not count.
    """
    edges = [(record.token_times_ns[0], 0, 1) for record in records if record.token_times_ns]
    edges += [(record.token_times_ns[-1], 1, -1) for record in records if record.token_times_ns]
    now = most = 0
    for _, _, change in sorted(edges):  # at one instant begins come before ends: they shared the step that ended then
        now += change
        most = max(most, now)
    return most


def steady_state(records: Sequence[RequestRecord], concurrency: int) -> tuple[int, int] | None:
    """ML.ENERGY's steady state of a saturated run: (t0, t1), or None where N <= 2 B + 1.

    With N requests that succeeded and B that run together: t0 is when B have returned a first token, t1 when N - B - 1 have
    finished. Between them the engine is neither filling up nor running empty. (Benchmark of arXiv 2505.06371.) Of conversations
    N, and those that finished, are whole ones: no other takes the place of one that ends among the last B.
    """
    done = [record for record in records if succeeded(record)]
    lasts = conversation_ends_ns(done)
    if concurrency < 1 or len(lasts) <= 2 * concurrency + 1:
        return None
    firsts = sorted(record.token_times_ns[0] for record in done)
    begin_ns, end_ns = firsts[concurrency - 1], lasts[len(lasts) - concurrency - 2]
    return (begin_ns, end_ns) if begin_ns < end_ns else None


def choose_window(
    records: Sequence[RequestRecord], begin_ns: int, end_ns: int, window: WindowSpec, load: LoadSpec, min_window_s: float
) -> Chosen:
    """The window that the rule names within a run; where the run does not have it, the whole run and the reason.

    Args:
        records: All requests of the run.
        begin_ns: When the run began.
        end_ns: When its last request was answered.
        window: The rule.
        load: How requests were sent.
        min_window_s: Shortest steady state that counts, s.
    """
    rule, concurrency = window.resolved(load), realised_concurrency(records)
    ran_s = (end_ns - begin_ns) / NS_PER_S
    found: tuple[int, int] | str = (begin_ns, end_ns)
    if rule == "steady_state":
        found = _steady_or_why(records, concurrency, min_window_s)
    elif rule == "interval":
        found = _interval_or_why(window, begin_ns, end_ns)
    elif rule == "mlperf" and ran_s < MLPERF_MIN_S:
        found = f"the run lasted {ran_s:.3f} s, MLPerf asks for {MLPERF_MIN_S:g} s"
    missed = found if isinstance(found, str) else None
    first_ns, last_ns = (begin_ns, end_ns) if isinstance(found, str) else found
    return Chosen(begin_ns=first_ns, end_ns=last_ns, rule=rule, concurrency=concurrency, missed=missed)


def _steady_or_why(records: Sequence[RequestRecord], concurrency: int, min_window_s: float) -> tuple[int, int] | str:
    found = steady_state(records, concurrency)
    if found is None:
        done = len(conversation_ends_ns(list(filter(succeeded, records))))
        wanted = f"more than 2 B + 1 = {2 * concurrency + 1}, better 4 B = {4 * concurrency}"
        what = "requests" if all(record.conversation is None for record in records) else "conversations"
        return f"no steady state: {done} {what} succeeded with B = {concurrency} at once; it takes {wanted}"
    length_s = (found[1] - found[0]) / NS_PER_S
    if length_s < min_window_s:
        return f"the steady state lasted {length_s:.3f} s, measure.min_window_s is {min_window_s:g} s"
    return found


def _interval_or_why(window: WindowSpec, begin_ns: int, end_ns: int) -> tuple[int, int] | str:
    first_ns = begin_ns + ns_from_s(window.start_s or 0.0)
    last_ns = first_ns + ns_from_s(window.length_s or 0.0)
    if last_ns > end_ns:
        ran_s, asked_s = (end_ns - begin_ns) / NS_PER_S, (last_ns - begin_ns) / NS_PER_S
        return f"the run ended after {ran_s:.3f} s, the interval ends at {asked_s:g} s"
    return first_ns, last_ns


def conversation_ends_ns(records: Sequence[RequestRecord]) -> list[int]:
    """When the conversations of these successful requests gave their last token, ascending; a request without turns is one."""
    return sorted(record.token_times_ns[-1] for record in records if record.last_turn)


def inside(records: Sequence[RequestRecord], begin_ns: int, end_ns: int) -> tuple[RequestRecord, ...]:
    """Requests that ended within (begin, end]; one without a token ended when it was sent."""
    return tuple(record for record in records if begin_ns < _ended_ns(record) <= end_ns)


def count_inside(records: Sequence[RequestRecord], begin_ns: int, end_ns: int) -> Counts:
    """What happened within (begin, end]. Tokens are the engine's own count, each at the time it was delivered."""
    ended = inside(records, begin_ns, end_ns)
    begun = [record for record in records if begin_ns < prefilled_ns(record) <= end_ns]
    output_tokens = (
        bisect_right(record.token_times_ns, end_ns) - bisect_right(record.token_times_ns, begin_ns) for record in records
    )
    return _counts(ended, begun, sum(output_tokens))


def count_all(records: Sequence[RequestRecord]) -> Counts:
    """The same of a window that holds all requests."""
    return _counts(records, records, sum(record.output_tokens for record in records))


def prefilled_ns(record: RequestRecord) -> int:
    """When its prompt counts: at its first token, or where it gave none when it was sent."""
    return record.token_times_ns[0] if record.token_times_ns else record.sent_ns


def _counts(ended: Sequence[RequestRecord], begun: Sequence[RequestRecord], output_tokens: int) -> Counts:
    shared = [record.shared_prompt_tokens for record in begun if record.shared_prompt_tokens is not None]
    return Counts(
        requests=len(ended),
        succeeded=sum(map(succeeded, ended)),
        prompt_tokens=sum(record.prompt_tokens for record in begun),
        failed_prompt_tokens=sum(record.prompt_tokens for record in begun if not succeeded(record)),
        shared_prompt_tokens=sum(shared) if len(shared) == len(begun) else None,
        padded_tokens=sum(record.padded_tokens for record in begun),
        output_tokens=output_tokens,
    )


def _ended_ns(record: RequestRecord) -> int:
    return record.token_times_ns[-1] if record.token_times_ns else record.sent_ns
