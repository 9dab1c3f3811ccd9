"""Runs one load group on one gang at a time: place, idle, load, idle, trial after trial, close."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from llem_ray.core.clock import Clock
from llem_ray.core.energy import Phase, PhaseSpan
from llem_ray.core.errors import ConfigError, EngineDied, HangError, LlemRayError, NodeLost, PlacementError
from llem_ray.core.outcome import Completed, Failed, Outcome, failed_from
from llem_ray.core.plan import LoadGroup, Plan, Trial
from llem_ray.core.progress import Progress
from llem_ray.core.units import NS_PER_MS, ns_from_s
from llem_ray.execution.bookkeeper import Bookkeeper
from llem_ray.execution.calls import Executor, Gang, Leased, Loaded, TrialOrder, raise_if_gone
from llem_ray.execution.cooling import rest_until_cool
from llem_ray.execution.fleet import Fleet
from llem_ray.execution.interrupts import Aborted
from llem_ray.execution.memory import require_placed
from llem_ray.execution.meter import Meter
from llem_ray.execution.placement import guard_s, place_gang
from llem_ray.execution.policy import FailurePolicy
from llem_ray.execution.records import (
    AttemptEnded,
    GangPlaced,
    GangRecord,
    IdleTaken,
    LaneClosed,
    LaneOpened,
    LoadEnded,
    SpansAdded,
)
from llem_ray.execution.spans import Timeline
from llem_ray.execution.waits import Waits
from llem_ray.execution.warmup_power import WarmupWatch, why_no_power
from llem_ray.planning.packing import Seat

LOG = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
RESULT_S = 90.0
"""A result that has not come by then is not waited for: its trial may be one too many."""
RESULT_LOOK_S = 0.05
PLACEMENTS = 3
CLOCK_SLACK_NS = 20 * NS_PER_MS
"""Times of another host are known to better than this, or its clock is not known at all."""

_GROUP_IS_LOST = frozenset({"load", "out_of_memory", "bad_request"})
"""A load that failed so will fail again: no trial of the group can run."""


@dataclass(slots=True, kw_only=True)
class RunContext:
    """What every lane of a run shares."""

    plan: Plan
    executor: Executor
    meter: Meter
    fleet: Fleet
    book: Bookkeeper
    waits: Waits
    progress: Progress
    clock: Clock
    policy: FailurePolicy
    cache_dir: str
    submitted_ns: int
    """Start of the command."""
    locate: Callable[[ConfigError], ConfigError] = lambda error: error
    """Adds to an error where in the sweep file its field stands."""
    ready_ns: int
    """From here on gangs may be placed."""
    consecutive_failures: int = 0
    gangs_opened: int = 0
    tried: dict[str, int] = field(default_factory=dict)
    """Trial -> attempts of this session."""
    gang: Gang | None = None
    """A gang that runs a trial now."""
    records: list[GangRecord] = field(default_factory=list)
    """Gangs that are open now."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count_attempt(self, trial: Trial) -> int:
        """Number of the attempt in this session, from 1; attempts that earlier sessions were killed in do not count."""
        with self.lock:
            self.tried[trial.trial_id] = self.tried.get(trial.trial_id, 0) + 1
            return self.tried[trial.trial_id]

    def count_outcome(self, outcome: Outcome) -> int:
        """Failed attempts in a row over all lanes, this one included."""
        with self.lock:
            self.consecutive_failures = 0 if isinstance(outcome, Completed) else self.consecutive_failures + 1
            return self.consecutive_failures


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneResult:
    """How a lane ended."""

    left: tuple[Trial, ...] = ()
    """Trials of the group that are to be tried elsewhere."""
    lost: str | None = None
    """The node it lost."""
    stop: str | None = None
    """Why the whole run should stop."""


class GangLane:
    """One load group's way through a run, on the same seats from begin to end.

    Args:
        context: What the lanes share.
        group: The group.
        trials: Its trials that are still to do, in order.
        name: Of the lane.
        seats: Where its gangs are placed.
    """

    def __init__(self, context: RunContext, group: LoadGroup, trials: Iterable[Trial], name: str, seats: Sequence[Seat]) -> None:
        self._run = context
        self._group = group
        self._trials = list(trials)
        self._name, self._seats = name, tuple(seats)
        self._gang: Gang | None = None
        self._record: GangRecord | None = None
        self._lost: str | None = None
        self._hot: str | None = None
        """What was too hot when the attempt began."""
        self._settles = True
        """Another gang may come to its GPUs."""
        begin_ns = context.clock.monotonic_ns()
        self._timeline = Timeline(begin_ns)
        context.book.add(LaneOpened(lane=name, hosts=context.fleet.hosts_of(seats), begin_ns=begin_ns))

    def run(self) -> LaneResult:
        """Run all trials.

        Raises:
            Aborted: The user wants out; the gang is closed.
            PlacementError: The gang cannot be placed, or not measured.
        """
        try:
            return self._run_trials()
        except BaseException:
            self._settles = False
            self._close_gang(force=True)  # it may be busy for long: nobody waits for its answer any more
            raise
        finally:
            self._close_gang()
            self._run.book.add(LaneClosed(lane=self._name, end_ns=self._run.clock.monotonic_ns()))

    def _run_trials(self) -> LaneResult:
        for index, trial in enumerate(self._trials):
            is_needed = self._is_needed(trial)
            if self._run.waits.stop_requested:  # asked last: results may have been waited for
                break
            if not is_needed:
                self._run.book.not_needed(trial)
                continue
            stop, group_lost, again = self._run_trial(trial)
            if self._lost is not None:
                left = self._trials[index if again else index + 1 :]
                return LaneResult(left=tuple(left), lost=self._lost, stop=stop)
            if group_lost is not None:
                self._give_up(self._trials[index + 1 :], group_lost)
                return LaneResult(stop=stop)
            if stop is not None:
                return LaneResult(stop=stop)
        return LaneResult()

    def _is_needed(self, trial: Trial) -> bool:
        """Its cell needs more repeats, as far as the results say that come within ``RESULT_S``."""
        run = self._run
        deadline_ns = run.clock.monotonic_ns() + ns_from_s(RESULT_S)
        while (answer := run.book.stopping.ask(trial)) == "wait" and run.clock.monotonic_ns() < deadline_ns:
            run.book.phase = "waiting for results"
            run.book.hurry()
            if not run.waits.sleep(RESULT_LOOK_S):
                break
        return answer != "skip"

    def _run_trial(self, trial: Trial) -> tuple[str | None, Failed | None, bool]:
        """Attempt after attempt.

        Returns:
            Why the run should stop; the failure that dooms the rest of the group; whether the trial is to be tried elsewhere.
        """
        while True:
            tried = self._run.count_attempt(trial)
            attempt = self._run.book.next_attempt(trial.trial_id)
            started_utc = datetime.now(UTC)
            loading = self._gang is None
            outcome: Outcome | None = self._open_gang() if loading else None
            if outcome is None:
                loading = False
                outcome = self._attempt(trial, attempt)
            decision = self._settle(trial, attempt, tried, outcome, started_utc)
            if loading:
                self._close_gang(force=True)
            if decision == "retry" and self._lost is None:
                continue
            if isinstance(outcome, Failed) and outcome.kind == "interrupted":
                raise Aborted
            if decision == "abort":
                return f"{self._run.consecutive_failures} attempts failed in a row", None, False
            doomed = outcome if loading and isinstance(outcome, Failed) and outcome.kind in _GROUP_IS_LOST else None
            return None, doomed, decision == "retry"

    def _settle(self, trial: Trial, attempt: int, tried: int, outcome: Outcome, started_utc: datetime) -> str:
        run = self._run
        decision = run.policy.decide(outcome, tried, run.count_outcome(outcome))
        gap_begin_ns = self._timeline.end_ns
        spans = self._on_our_clock(outcome.spans)
        if self._record is not None:
            self._record.marks.note_attempt(trial.trial_id, attempt, spans)
        if isinstance(outcome, Completed):
            LOG.info("%s attempt %d: %d passes in %.3f s", trial.trial_id, attempt, outcome.passes, outcome.window.duration_s)
            self._add_spans(spans)
        else:
            LOG.error("%s attempt %d: %s: %s\n%s", trial.trial_id, attempt, outcome.kind, outcome.message, outcome.traceback)
            run.progress.message(f"{trial.trial_id} attempt {attempt}: {outcome.kind}: {_first_line(outcome.message)}")
            self._cover("waste", trial.trial_id, attempt)
        run.book.add(
            AttemptEnded(
                gang=self._record,
                group=self._group,
                trial=trial,
                attempt=attempt,
                outcome=outcome,
                begin_ns=gap_begin_ns,
                end_ns=self._timeline.end_ns,
                started_utc=started_utc,
                gap_s=max(0.0, (spans[0].begin_ns - gap_begin_ns) / 1e9) if spans else None,
                final=decision == "skip",
                lane=self._name,
                hot=self._hot,
            )
        )
        if not run.policy.gang_survives(outcome):
            self._close_gang(force=True)
        return decision

    def _on_our_clock(self, spans: Sequence[PhaseSpan]) -> tuple[PhaseSpan, ...]:
        """The engine's spans, stamped on its host, on the run driver's clock; adjoining ones still adjoin."""
        if not spans or self._record is None or self._run.meter.clocks.is_own(self._record.node):
            return tuple(spans)
        stamps = {stamp for span in spans for stamp in (span.begin_ns, span.end_ns)}
        ours = {stamp: self._run.meter.clocks.to_own(self._record.node, stamp) for stamp in stamps}
        moved = []
        for span in spans:
            begin_ns, end_ns = ours[span.begin_ns], ours[span.end_ns]
            if begin_ns is not None and end_ns is not None:
                moved.append(replace(span, begin_ns=begin_ns, end_ns=max(begin_ns, end_ns)))
        return tuple(moved)

    def _attempt(self, trial: Trial, attempt: int) -> Outcome:
        run, measure = self._run, self._run.plan.measure
        assert self._gang is not None
        assert self._record is not None
        self._hot = rest_until_cool(self._record, run.meter, measure, run.waits, run.clock)
        if measure.cooldown_until_c is not None:
            self._cover("cooldown", trial.trial_id, attempt)
        order = TrialOrder(
            trial_id=trial.trial_id,
            attempt=attempt,
            experiment=trial.experiment,
            guard_s=guard_s(self._record, run.meter, measure),
            warmup=measure.warmup,
            min_window_s=measure.shortest_window_s,
            cooldown_s=measure.cooldown_s,
            window=measure.window,
            record_steps=measure.record_steps,
            no_power=why_no_power(self._record),
        )
        watch = WarmupWatch(self._gang, self._record, order, run.meter)
        run.book.measuring(trial, attempt, self._record)
        run.gang = self._gang
        self._record.marks.note_order(run.clock.monotonic_ns())
        try:
            outcome = self._outcome_of(order, watch)
        except Aborted:
            outcome = Failed(kind="interrupted", message="stopped by the user", traceback=None)
        finally:
            run.gang = None
        return outcome if isinstance(outcome, Completed) else replace(outcome, spans=())

    def _outcome_of(self, order: TrialOrder, watch: WarmupWatch) -> Outcome:
        run, timeout_s = self._run, self._run.plan.measure.trial_timeout_s
        assert self._gang is not None
        try:
            call = self._gang.run(order)
            return run.waits.answer(call, timeout_s, f"trial {order.trial_id}", check=lambda: self._look_after(watch))
        except LlemRayError as error:
            return self._failed(error)

    def _look_after(self, watch: WarmupWatch) -> None:
        self._check_nodes()
        watch.look()

    def _check_nodes(self) -> None:
        self._run.fleet.raise_if_lost(self._seats)

    def _open_gang(self) -> Failed | None:
        """Place a gang and load its model, with both idle baselines; a Failed says why there is none."""
        run, measure = self._run, self._run.plan.measure
        run.waits.tick()
        raise_if_gone(run.executor)
        with run.lock:
            run.gangs_opened += 1
            name = f"gang-{run.gangs_opened}"
        opened_ns = run.clock.monotonic_ns()
        try:
            gang, workers = self._lease_fit()
            record = self._record = self._make_record(name, workers)
            marks = record.marks
            marks.submitted_ns, marks.ready_ns, marks.opened_ns = run.submitted_ns, run.ready_ns, opened_ns
            marks.placed_ns = run.clock.monotonic_ns()
            run.book.add(GangPlaced(lane=self._name, gang=record))
            self._cover("startup")
            require_placed(self._group, run.plan.base_dir, [item.device for item in record.devices])
            self._idle(record, "bare_idle", measure.idle_baseline_s)
            begin_ns = marks.load_begin_ns = run.clock.monotonic_ns()
            run.book.phase = "load"
            loaded: Loaded = run.waits.answer(
                gang.load(), measure.load_timeout_s, "model load", may_stop=True, check=self._check_nodes
            )
            self._check_identity(record, loaded)
            record.loaded = loaded
            LOG.info("%s on %s loaded %s", record.name, record.lead.hostname, loaded.report)
            for refused in loaded.refused:
                run.progress.message(f"trials of a workload will fail: {run.locate(refused)}")
            marks.load_end_ns = run.clock.monotonic_ns()
            span = PhaseSpan(phase="load", begin_ns=begin_ns, end_ns=marks.load_end_ns)
            self._add_spans([span])
            run.book.add(LoadEnded(gang=record, span=span, lane=self._name))
            self._idle(record, "resident_idle", measure.idle_baseline_s)
        except PlacementError:
            raise
        except LlemRayError as error:
            return self._failed(error)
        return None

    def _lease_fit(self) -> tuple[Gang, tuple[Leased, ...]]:
        """Place a gang on GPUs of which none is quarantined: between its end and its quarantine a GPU may be granted again."""
        run = self._run
        for _ in range(PLACEMENTS):
            gang = self._gang = run.executor.open_gang(self._group, self._seats, run.plan.base_dir, run.cache_dir)
            self._record = None
            workers = self._lease(gang)
            unfit = run.fleet.unfit(workers)
            if not unfit:
                return gang, workers
            LOG.warning("the cluster granted a quarantined GPU: %s", ", ".join(uuid for _, uuid in unfit))
            gang.close(0.0)
            run.fleet.hold(unfit)
        raise PlacementError(f"the cluster grants quarantined GPUs again and again: {', '.join(uuid for _, uuid in unfit)}")

    def _lease(self, gang: Gang) -> tuple[Leased, ...]:
        timeout_s = self._run.plan.measure.placement_timeout_s
        try:
            return self._run.waits.answer(gang.lease(), timeout_s, "placement", may_stop=True, check=self._check_nodes)
        except HangError as error:
            wanted = ", ".join(f"{seat.gpus} GPUs on node {seat.node[:12]}" for seat in self._seats)
            raise PlacementError(
                f"the cluster did not grant a gang its place within {timeout_s:g} s: {wanted}",
                "does somebody else hold GPUs there? measure.placement_timeout_s is the deadline; ray status tells more",
            ) from error

    def _make_record(self, name: str, workers: tuple[Leased, ...]) -> GangRecord:
        devices, context, reason = place_gang(workers, self._group.gpus, self._run.meter)
        record = GangRecord(
            name=name,
            group=self._group,
            workers=workers,
            devices=devices,
            context=context,
            reason=reason,
            generations={worker.node: self._run.meter.generation(worker.node) for worker in workers},
            begin_ns=self._timeline.end_ns,
        )
        with self._run.lock:
            for other in self._run.records:
                if set(other.hosts) & set(record.hosts):
                    other.neighbours.add(name)
                    record.neighbours.add(other.name)
            self._run.records.append(record)
        if len(record.hosts) > 1:
            self._run.meter.watch_closely(name, record.hosts)
        return record

    def _idle(self, record: GangRecord, phase: Phase, duration_s: float) -> None:
        if duration_s <= 0:
            return
        self._run.book.phase = phase
        begin_ns = self._run.clock.monotonic_ns()
        slept = self._run.waits.sleep(duration_s)
        span = PhaseSpan(phase=phase, begin_ns=begin_ns, end_ns=self._run.clock.monotonic_ns())
        self._add_spans([span])
        if not slept:
            raise Aborted
        self._run.book.add(IdleTaken(gang=record, resident=phase == "resident_idle", span=span, lane=self._name))

    def _check_identity(self, record: GangRecord, loaded: Loaded) -> None:
        """The GPUs that the workers see from inside must be the ones that were leased, all of them where two share one."""
        ranks_on: dict[str, list[str]] = {}
        for rank in loaded.ranks:
            if rank.gpu_uuid:
                ranks_on.setdefault(rank.gpu_uuid, []).append(str(rank.rank))
        seen = set(ranks_on)
        held = {item.device.uuid for item in record.devices}
        if seen and held and not seen <= held:
            raise PlacementError(
                f"the engine runs on {', '.join(sorted(seen - held))}, which its gang does not hold ({', '.join(sorted(held))})",
                "set CUDA_DEVICE_ORDER=PCI_BUS_ID where Ray starts, so that CUDA and NVML count GPUs alike",
            )
        for uuid, ranks in ranks_on.items():
            if len(ranks) > 1 and held - seen:
                unused = f"nobody runs on {', '.join(sorted(held - seen))}"
                raise PlacementError(f"ranks {' and '.join(ranks)} of the engine all run on {uuid}; {unused}")

    def _failed(self, error: LlemRayError) -> Failed:
        self._run.waits.tick()  # what ends the run comes through every wait, and is no failure of the attempt
        raise_if_gone(self._run.executor)
        if isinstance(error, (EngineDied, HangError)):
            self._lost = self._run.fleet.lost_node(self._seats)
            if self._lost is not None and not isinstance(error, NodeLost):
                error = NodeLost(f"node {self._lost[:12]} does not answer any more: {error.message}")
        failure = failed_from(self._run.locate(error) if isinstance(error, ConfigError) else error)
        words = self._gang.last_words() if isinstance(error, EngineDied) and self._gang is not None else None
        if not words:
            return failure
        return replace(failure, traceback=f"{failure.traceback or ''}\n--- end of the engine's log ---\n{words}")

    def _give_up(self, trials: Iterable[Trial], failure: Failed) -> None:
        """Settle the trials of a group whose model cannot be loaded."""
        for trial in trials:
            now_ns = self._run.clock.monotonic_ns()
            self._run.book.add(
                AttemptEnded(
                    gang=None,
                    group=self._group,
                    trial=trial,
                    attempt=self._run.book.next_attempt(trial.trial_id),
                    outcome=failure,
                    begin_ns=now_ns,
                    end_ns=now_ns,
                    started_utc=datetime.now(UTC),
                    gap_s=None,
                    final=True,
                    lane=self._name,
                )
            )

    def _close_gang(self, *, force: bool = False) -> None:
        if self._gang is None:
            return
        gang, self._gang = self._gang, None
        self._run.book.phase = "shutdown"
        gang.close(0.0 if force else CLOSE_TIMEOUT_S)
        record = self._record
        LOG.info("%s closed%s", record.name if record else "a gang without a lease", " by force" if force else "")
        if record is not None and self._settles:
            self._run.fleet.settle(record, self._lost)
        self._cover("shutdown")
        if record is not None:
            record.end_ns = self._timeline.end_ns
            with self._run.lock:
                self._run.records.remove(record)
            self._run.meter.watch_no_more(record.name)
        self._record = None

    def _add_spans(self, spans: Iterable[PhaseSpan]) -> None:
        self._timeline.add(spans, slack_ns=CLOCK_SLACK_NS + 2 * self._clock_delta_ns())
        self._report()

    def _clock_delta_ns(self) -> int:
        """How far the clock of the gang's leading host may be off, as far as is known."""
        if self._record is None:
            return 0
        offset = self._run.meter.clocks.latest(self._record.node)
        return 0 if offset is None else offset.delta_ns

    def _cover(self, phase: Phase, trial_id: str | None = None, attempt: int | None = None) -> None:
        self._timeline.close_at(phase, self._run.clock.monotonic_ns(), trial_id, attempt)
        self._report()

    def _report(self) -> None:
        """Tell the bookkeeper; what happened before a gang was placed waits until one is."""
        if self._record is not None:
            self._run.book.add(SpansAdded(gang=self._record, spans=self._timeline.take(), lane=self._name))


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
