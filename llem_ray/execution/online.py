"""One online run: requests go out by their schedule, records come back, a window is chosen among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llem_ray.core.backend import InferenceBackend, RequestRecord, StepEvent
from llem_ray.core.clock import Clock
from llem_ray.core.conversation import completed_record
from llem_ray.core.energy import Window
from llem_ray.core.measure_spec import WindowSpec
from llem_ray.core.outcome import OnlineRun
from llem_ray.core.spec import SamplingSpec
from llem_ray.core.step_log import StepLog
from llem_ray.core.workload_spec import LoadSpec
from llem_ray.workloads.online import OnlineWork
from llem_ray.workloads.windows import choose_window

PASS: Final = 0
"""An online run is one pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineOrder:
    """How an online trial is to be run and measured."""

    work: OnlineWork
    sampling: SamplingSpec
    load: LoadSpec
    window: WindowSpec
    min_window_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """What a run gave."""

    window: Window
    online: OnlineRun
    requests: tuple[RequestRecord, ...]
    steps: int
    """Forward steps that ended in the window."""
    end_ns: int
    """When the last answer had come."""


def run_online(
    backend: InferenceBackend, order: OnlineOrder, node: str, begin_ns: int, clock: Clock, log: StepLog | None = None
) -> Ran:
    """Send everything once, wait for the last answer, and choose the window.

    Args:
        backend: A loaded engine that serves online.
        order: What is sent, when, and which window is asked for.
        node: Stable id of this host.
        begin_ns: When the run begins.
        clock: This host's.
        log: Told every step of the run.
    """
    records: list[RequestRecord] = []
    step_ends_ns: list[int] = []
    asked = {request.request_id: request for request in order.work.requests}
    followed = {request.follows for request in order.work.requests}
    for event in backend.run(order.work.requests, order.sampling, order.work.schedule):
        if isinstance(event, StepEvent):
            step_ends_ns.append(event.end_ns)
            if log is not None:
                log.add(event)
        else:
            last_turn = event.request_id not in followed
            records.append(completed_record(event, asked[event.request_id], PASS, last_turn=last_turn))
    end_ns = clock.monotonic_ns()
    chosen = choose_window(records, begin_ns, end_ns, order.window, order.load, order.min_window_s)
    return Ran(
        window=Window(node=node, begin_ns=chosen.begin_ns, end_ns=chosen.end_ns),
        online=OnlineRun(
            whole=Window(node=node, begin_ns=begin_ns, end_ns=end_ns),
            rule=chosen.rule,
            concurrency=chosen.concurrency,
            missed=chosen.missed,
        ),
        requests=tuple(records),
        steps=sum(chosen.begin_ns < stamp_ns <= chosen.end_ns for stamp_ns in step_ends_ns),
        end_ns=end_ns,
    )
