"""Decides which load group runs next and where, and runs each in a lane of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from llem_ray.core.errors import PlacementError
from llem_ray.core.measure_spec import MeasureSpec
from llem_ray.core.plan import LoadGroup, Trial
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.execution.interrupts import Aborted
from llem_ray.execution.lane import GangLane, LaneResult, RunContext
from llem_ray.planning import GangRequest, NodeRoom, Running, Seat, next_starts, order_requests, why_infeasible
from llem_ray.planning.packing import emptied

LOG = logging.getLogger(__name__)

LOAD_GUESS_S: Final = 30.0
TRIAL_OVERHEAD_S: Final = 1.0


@dataclass(slots=True)
class _Work:
    """A load group that still has trials to do."""

    group: LoadGroup
    trials: tuple[Trial, ...]
    request: GangRequest


@dataclass(slots=True)
class _Lane:
    work: _Work
    seats: tuple[Seat, ...]
    expected_end_s: float
    thread: threading.Thread | None = None
    result: LaneResult = field(default_factory=LaneResult)
    error: BaseException | None = None
    ended: bool = False


class Dispatcher:
    """Runs all load groups of a plan, as many at once as there is room for.

    Args:
        context: What the lanes share.
        work: Each load group with its trials that are still to do, in the plan's order.
    """

    def __init__(self, context: RunContext, work: Sequence[tuple[LoadGroup, Sequence[Trial]]]) -> None:
        self._run = context
        self._measure = context.plan.measure
        self._pending = [_Work(group, tuple(trials), gang_request(group, trials, self._measure)) for group, trials in work]
        self._lanes: dict[str, _Lane] = {}
        self._numbers = 0
        self._ended = threading.Event()
        self._stuck_ns: int | None = None
        self._asked = False

    def run(self) -> str | None:
        """Run everything.

        Returns:
            Why the run gave up before its end, or None.

        Raises:
            Aborted: The user wants out; all gangs are closed.
            PlacementError: A gang can never be placed, or was not within its deadline.
        """
        self._refuse_impossible()
        self._sort()
        stopped: str | None = None
        error: BaseException | None = None
        while self._lanes or (self._pending and not self._run.waits.stop_requested):
            try:
                self._run.waits.tick()
                self._run.fleet.look()
                if self._measure.wait_for_nodes_s and not self._pending:
                    self._run.fleet.release_idle()
                if not self._run.waits.stop_requested:
                    stopped = self._start_what_fits() or stopped
            except (Aborted, Exception) as caught:  # noqa: BLE001 - raised again once all lanes have ended
                error = error or caught
            if stopped or error:
                self._run.waits.halt.set()
            self._ended.wait(0.2 if self._lanes else 0.05)
            self._ended.clear()
            for name in [name for name, lane in self._lanes.items() if lane.ended]:
                lane = self._lanes.pop(name)
                if not (isinstance(lane.error, Aborted) and self._run.waits.halt.is_set() and not self._run.waits.user_stops):
                    error = error or lane.error  # one that was told to end because another failed has nothing to say
                stopped = stopped or lane.result.stop
                self._take_back(name, lane)
        if error is not None:
            raise error
        return stopped

    def _refuse_impossible(self) -> None:
        """Before anything is placed: a gang that the cluster could not hold if it were empty."""
        if self._measure.wait_for_nodes_s:
            return
        rooms = emptied(self._run.fleet.rooms())
        for work in self._pending:
            if impossible := placement_problem(work.group, work.request, rooms):
                raise impossible

    def _sort(self) -> None:
        """Into the order in which the groups should be started."""
        rooms = self._run.fleet.rooms()
        ordered = order_requests([work.request for work in self._pending], rooms, self._measure.exclusive, self._run.plan.seed)
        place = {request.key: index for index, request in enumerate(ordered)}
        self._pending.sort(key=lambda work: place[work.request.key])

    def _start_what_fits(self) -> str | None:
        """Start lanes; returns why the run must stop when nothing can be done any more."""
        if not self._pending:
            return None
        rooms = self._run.fleet.rooms()
        now_s = self._run.clock.monotonic_ns() / NS_PER_S
        running = [
            Running(key=name, seats=lane.seats, end_s=max(lane.expected_end_s, now_s)) for name, lane in self._lanes.items()
        ]
        starts = next_starts(
            [work.request for work in self._pending], rooms, self._measure.exclusive, running=running, now_s=now_s
        )
        for request, seats in starts:
            work = next(work for work in self._pending if work.request.key == request.key)
            self._pending.remove(work)
            self._start(work, seats)
        if self._lanes or not self._pending:
            self._stuck_ns = None
            return None
        return self._wait_or_give_up(rooms)

    def _start(self, work: _Work, seats: tuple[Seat, ...]) -> None:
        self._numbers += 1
        name = f"lane-{self._numbers}"
        run = self._run
        run.fleet.take(name, seats)
        lane = _Lane(work, seats, run.clock.monotonic_ns() / NS_PER_S + work.request.duration_s)
        way = GangLane(run, work.group, work.trials, name, seats)
        lane.thread = threading.Thread(target=self._work, args=(lane, way), name=f"llem-ray-{name}", daemon=True)
        self._lanes[name] = lane
        lane.thread.start()

    def _work(self, lane: _Lane, way: GangLane) -> None:
        try:
            lane.result = way.run()
        except BaseException as error:  # noqa: BLE001 - the main thread raises it again
            lane.error = error
        finally:
            lane.ended = True
            self._ended.set()

    def _take_back(self, name: str, lane: _Lane) -> None:
        run = self._run
        run.fleet.give_back(name)
        result = lane.result
        if result.left and lane.error is None and result.stop is None:
            avoid = lane.work.request.avoid | ({result.lost} if result.lost else frozenset())
            request = gang_request(lane.work.group, result.left, self._measure)
            self._pending.append(_Work(lane.work.group, result.left, replace(request, avoid=avoid)))
            self._run.fleet.recall()
            self._sort()

    def _wait_or_give_up(self, rooms: Sequence[NodeRoom]) -> str | None:
        """Nothing runs and nothing can be started: wait for nodes, for GPUs that others hold, or give up."""
        now_ns = self._run.clock.monotonic_ns()
        first = self._pending[0]
        impossible = why_infeasible(first.request, rooms)
        limit_s = self._measure.placement_timeout_s
        if impossible is not None:
            limit_s = max(self._measure.wait_for_nodes_s, 2 * GRACE_S if self._run.gangs_opened else 0.0)
            if self._measure.wait_for_nodes_s and not self._asked:
                self._asked = True
                self._run.progress.message(f"waiting up to {limit_s:g} s for nodes: the sweep {impossible}")
                self._run.executor.ask_for_nodes([work.group for work in self._pending])
        if self._stuck_ns is None:
            self._stuck_ns = now_ns
        if now_ns < self._stuck_ns + ns_from_s(limit_s):
            return None
        label = _label(first.group)
        if impossible is not None and self._run.gangs_opened:
            return f"the gang for {label} {impossible}"
        if impossible is not None:
            raise PlacementError(f"the gang for {label} {impossible}", "llem-ray doctor --address tells what the cluster has")
        free = ", ".join(f"{room.free_gpus} of {room.gpus} on {room.node[:12]}" for room in rooms)
        raise PlacementError(
            f"no room for the gang for {label} within {limit_s:g} s: it needs {first.request.gpus} GPUs; free: {free or 'none'}",
            "somebody else holds them; measure.placement_timeout_s is the deadline",
        )


GRACE_S: Final = 30.0
"""A node that was lost may come back."""


def _label(group: LoadGroup) -> str:
    return str(group.experiment.model.id or group.experiment.model.config)


def placement_problem(group: LoadGroup, request: GangRequest, rooms: Sequence[NodeRoom]) -> PlacementError | None:
    """Why these nodes could not hold the group's gang if they were empty; None where they could."""
    impossible = why_infeasible(request, rooms)
    if impossible is None:
        return None
    hint = "set engine.device: cpu, or run it where the GPUs are; llem-ray doctor tells what there is"
    return PlacementError(f"the gang for {_label(group)} {impossible}", hint)


def gang_request(group: LoadGroup, trials: Sequence[Trial], measure: MeasureSpec) -> GangRequest:
    """What a load group needs, and how long it is expected to take for these trials."""
    engine = group.experiment.engine
    rest_s = measure.cooldown_s + TRIAL_OVERHEAD_S
    trials_s = sum(measure.least_run_s(trial.experiment.workload) + rest_s for trial in trials)
    return GangRequest(
        key=group.load_key,
        gpus=group.gpus,
        nodes=engine.nodes,
        gpu_type=engine.gpu_type,
        backend=engine.backend,
        duration_s=LOAD_GUESS_S + 2 * measure.idle_baseline_s + trials_s,
    )
