"""Warm-up before a window: a fixed number of batches, or until the engine's steps take the same time again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, pstdev

from llem_ray.core.backend import Request, RequestRecord, StepEvent
from llem_ray.core.outcome import WarmupReport
from llem_ray.core.spec import CV_BATCHES, WarmupSpec
from llem_ray.core.units import NS_PER_S

Events = Iterator[StepEvent | RequestRecord]


def warm_up(
    spec: WarmupSpec, work: Sequence[tuple[Request, ...]], serve: Callable[[tuple[Request, ...]], Events]
) -> WarmupReport:
    """Run warm-up batches.

    With ``until_cv`` one and the same batch is repeated. Compared are the batches' mean step times: within a batch steps grow
    with the context, from batch to batch they do not. The step time is that of decode steps; of all steps where there are none;
    of the whole batch where the engine tells no steps. Power is not looked at: the engine's process has no meter.

    Args:
        spec: How long.
        work: Batches to take in turn.
        serve: Runs one batch.
    """
    if spec.until_cv is None:
        for index in range(spec.batches):
            for _ in serve(work[index % len(work)]):
                pass
        return WarmupReport(batches=spec.batches)
    times_s: list[float] = []
    while len(times_s) < spec.max_batches:
        times_s.append(_step_s(serve(work[0])))
        cv = variation(times_s[-CV_BATCHES:])
        if len(times_s) >= max(spec.batches, CV_BATCHES) and cv is not None and cv <= spec.until_cv:
            return WarmupReport(batches=len(times_s), step_cv=cv)
    return WarmupReport(batches=len(times_s), step_cv=variation(times_s[-CV_BATCHES:]), steady=False)


def variation(values: Sequence[float]) -> float | None:
    """Coefficient of variation: standard deviation (ddof 0) over mean; None for a mean of 0."""
    mean = fmean(values)
    return pstdev(values) / mean if mean > 0 else None


def _step_s(events: Events) -> float:
    """Mean step time of a batch, s."""
    steps: list[StepEvent] = []
    sent_ns, last_ns = [], []
    for event in events:
        if isinstance(event, StepEvent):
            steps.append(event)
        elif event.token_times_ns:
            sent_ns.append(event.sent_ns)
            last_ns.append(event.token_times_ns[-1])
    counted = [step for step in steps if step.kind == "decode"] or steps
    if counted:
        return fmean(step.end_ns - step.begin_ns for step in counted) / NS_PER_S
    return (max(last_ns) - min(sent_ns)) / NS_PER_S if last_ns else 0.0
