"""What an online trial adds to its row: its load and pace, its window beside the whole run, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llem_ray.core.backend import RequestRecord
from llem_ray.core.energy import Flag
from llem_ray.core.measure_spec import MeasureSpec, SloSpec
from llem_ray.core.outcome import Completed, WarmupReport
from llem_ray.core.workload_spec import OPEN_LOOPS, LoadSpec
from llem_ray.energy.validity import flag
from llem_ray.workloads.latency import succeeded, throughput
from llem_ray.workloads.pacing import pacing
from llem_ray.workloads.slo import count_good, limits_of
from llem_ray.workloads.windows import Counts, conversation_ends_ns, count_all, count_inside, inside

Row = dict[str, Any]


def counts_of(done: Completed) -> Counts:
    """What happened in the measured window: all of it where that is the whole run."""
    if not is_part(done):
        return count_all(done.requests)
    return count_inside(done.requests, done.window.begin_ns, done.window.end_ns)


def requests_inside(done: Completed) -> tuple[RequestRecord, ...]:
    """The requests that the window's latencies are of."""
    return inside(done.requests, done.window.begin_ns, done.window.end_ns) if is_part(done) else done.requests


def is_part(done: Completed) -> bool:
    """The window is a part of a run."""
    return done.online is not None and done.window != done.online.whole


def load_columns(done: Completed, load: LoadSpec) -> Row:
    """Columns of the window's rule, the whole run, the pace and the warm-up."""
    row = _warmup_columns(done.warmup)
    online = done.online
    if online is None:
        return row | {"window_rule": "total"}
    kept, whole = pacing(done.requests), count_all(done.requests)
    error = kept.error_s
    return row | {
        "window_rule": online.rule,
        "realised_concurrency": online.concurrency,
        "run_begin_ns": online.whole.begin_ns,
        "run_end_ns": online.whole.end_ns,
        "run_s": online.whole.duration_s,
        "run_requests": whole.requests,
        "run_prompt_tokens": whole.prompt_tokens,
        "run_output_tokens": whole.output_tokens,
        "asked_rate_per_s": kept.asked_rate_per_s if load.pattern in OPEN_LOOPS else None,
        "sent_rate_per_s": kept.sent_rate_per_s,
        "achieved_rate_per_s": kept.achieved_rate_per_s,
        "pacing_error_p50_s": error.p50 if error else None,
        "pacing_error_p90_s": error.p90 if error else None,
        "pacing_error_p99_s": error.p99 if error else None,
        "pacing_error_max_s": error.max if error else None,
    }


def goodput_columns(done: Completed, slo: SloSpec, power_w: float | None) -> Row:
    """Requests that keep the limits that are asked for; nothing without any.

    Where requests were made and none keeps them, 0 is what was measured, also where none succeeded and no duration is defined.

    Args:
        done: The trial.
        slo: The limits.
        power_w: Mean power of everything that the energy covers; None where the energy is not valid.
    """
    limits = limits_of(slo)
    if limits is None or not done.requests:
        return {}
    requests = requests_inside(done)
    good, rates = count_good(requests, limits), throughput(requests)
    length_s = done.window.duration_s if is_part(done) else None if rates is None else rates.duration_s
    goodput = good / length_s if length_s else 0.0 if not good else None
    return {
        "slo_ttft_ms": limits.ttft_ms,
        "slo_tpot_ms": limits.tpot_ms,
        "slo_e2e_ms": limits.e2e_ms,
        "goodput_req_s": goodput,
        "slo_attainment": good / len(requests) if requests else None,
        "goodput_per_watt": goodput / power_w if goodput is not None and power_w else None,
    }


def _warmup_columns(warmup: WarmupReport | None) -> Row:
    if warmup is None:
        return {"warmup_batches": 0}
    return {
        "warmup_batches": warmup.batches,
        "warmup_end": warmup.end,
        "warmup_step_cv": warmup.step_cv,
        "warmup_power_cv": warmup.power_cv,
    }


def load_flags(done: Completed, load: LoadSpec, measure: MeasureSpec) -> Iterator[Flag]:
    """What is wrong with the warm-up, the window or the pace of a trial."""
    yield from _warmup_flags(done.warmup)
    online = done.online
    if online is None:
        return
    if online.missed is not None:
        yield flag("window_not_reached", online.missed)
    elif done.window.duration_s < measure.shortest_window_s:
        yield flag("below_min_window", f"{done.window.duration_s:.3f} s, measure.min_window_s is {measure.min_window_s:g} s")
    many = len(conversation_ends_ns(list(filter(succeeded, done.requests))))
    if online.rule == "steady_state" and online.missed is None and many < 4 * online.concurrency:
        what = "requests" if all(record.turn is None for record in done.requests) else "conversations"
        yield flag("few_requests", f"{many} {what} with {online.concurrency} at once")
    yield from _pace_flags(done, load, measure)


def _warmup_flags(warmup: WarmupReport | None) -> Iterator[Flag]:
    if warmup is None:
        return
    if warmup.end == "limit":
        cvs = ["unknown" if cv is None else f"{cv:.2%}" for cv in (warmup.step_cv, warmup.power_cv)]
        power = "" if warmup.no_power is not None else f", power by {cvs[1]}"
        yield flag("warmup_not_steady", f"step times vary by {cvs[0]}{power} after {warmup.batches} batches")
    if warmup.no_power is not None:
        yield flag("warmup_without_power", warmup.no_power)


def _pace_flags(done: Completed, load: LoadSpec, measure: MeasureSpec) -> Iterator[Flag]:
    kept, gates = pacing(done.requests), measure.gates
    asked = kept.asked_rate_per_s
    if load.pattern not in OPEN_LOOPS or asked is None:
        return
    if kept.sent_rate_per_s is not None and abs(kept.sent_rate_per_s / asked - 1.0) > gates.max_sent_rate_rel:
        gate = f"the gate is +-{gates.max_sent_rate_rel:.0%}"
        yield flag("rate_not_sent", f"sent at {kept.sent_rate_per_s:.4g}/s, asked for {asked:.4g}/s, {gate}")
    if kept.achieved_rate_per_s is not None and kept.achieved_rate_per_s < gates.min_rate_rel * asked:
        gate = f"the gate is {gates.min_rate_rel:.0%}"
        yield flag("rate_not_reached", f"answered at {kept.achieved_rate_per_s:.4g}/s, asked for {asked:.4g}/s, {gate}")
