"""Runs one load group on one gang at a time: place, idle, load, idle, trial after trial, close."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count

from llem_ray.core.clock import Clock
from llem_ray.core.energy import Phase, PhaseSpan
from llem_ray.core.errors import EngineDied, LlemRayError, PlacementError
from llem_ray.core.outcome import Completed, Failed, Outcome, failed_from
from llem_ray.core.plan import LoadGroup, Plan, Trial
from llem_ray.core.progress import Progress
from llem_ray.execution.bookkeeper import Bookkeeper
from llem_ray.execution.calls import Executor, Gang, Leased, Loaded, TrialOrder
from llem_ray.execution.interrupts import Aborted
from llem_ray.execution.meter import Meter
from llem_ray.execution.placement import gang_devices, guard_s
from llem_ray.execution.policy import FailurePolicy
from llem_ray.execution.records import AttemptEnded, GangRecord, IdleTaken, LoadEnded, SpansAdded
from llem_ray.execution.spans import Timeline
from llem_ray.execution.waits import Waits

LOG = logging.getLogger(__name__)

LEASE_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 30.0

_GROUP_IS_LOST = frozenset({"load", "out_of_memory", "bad_request"})
"""A load that failed so will fail again: no trial of the group can run."""


@dataclass(slots=True, kw_only=True)
class RunContext:
    """What every lane of a run shares."""

    plan: Plan
    executor: Executor
    meter: Meter
    book: Bookkeeper
    timeline: Timeline
    waits: Waits
    progress: Progress
    clock: Clock
    policy: FailurePolicy
    cache_dir: str
    consecutive_failures: int = 0
    gangs_opened: int = 0
    gang: Gang | None = None
    """The gang that runs a trial now."""


class GangLane:
    """One load group's way through a run.

    Args:
        context: What the lanes share.
        group: The group.
        trials: Its trials that are still to do, in order.
    """

    def __init__(self, context: RunContext, group: LoadGroup, trials: Iterable[Trial]) -> None:
        self._run = context
        self._group = group
        self._trials = list(trials)
        self._gang: Gang | None = None
        self._record: GangRecord | None = None

    def run(self) -> str | None:
        """Run all trials.

        Returns:
            Why the whole run should stop, or None.

        Raises:
            Aborted: The user wants out; the gang is closed.
            PlacementError: The gang can never be placed.
        """
        try:
            for index, trial in enumerate(self._trials):
                if self._run.waits.stop_requested:
                    return None
                stop, group_lost = self._run_trial(trial)
                if group_lost is not None:
                    self._give_up(self._trials[index + 1 :], group_lost)
                    return stop
                if stop is not None:
                    return stop
        except BaseException:
            self._close_gang(force=True)  # it may be busy for long: nobody waits for its answer any more
            raise
        else:
            return None
        finally:
            self._close_gang()

    def _run_trial(self, trial: Trial) -> tuple[str | None, Failed | None]:
        """Attempt after attempt. Returns why the run should stop, and the failure that dooms the rest of the group."""
        for tried in count(1):  # attempts that earlier sessions were killed in are no reason to give up sooner
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
            if decision == "retry":
                continue
            if isinstance(outcome, Failed) and outcome.kind == "interrupted":
                raise Aborted
            if decision == "abort":
                return f"{self._run.consecutive_failures} attempts failed in a row", None
            return None, outcome if loading and isinstance(outcome, Failed) and outcome.kind in _GROUP_IS_LOST else None
        raise AssertionError("count() never ends")

    def _settle(self, trial: Trial, attempt: int, tried: int, outcome: Outcome, started_utc: datetime) -> str:
        run = self._run
        run.consecutive_failures = 0 if isinstance(outcome, Completed) else run.consecutive_failures + 1
        decision = run.policy.decide(outcome, tried, run.consecutive_failures)
        gap_begin_ns = run.timeline.end_ns
        if isinstance(outcome, Completed):
            LOG.info("%s attempt %d: %d passes in %.3f s", trial.trial_id, attempt, outcome.passes, outcome.window.duration_s)
            self._add_spans(outcome.spans)
        else:
            LOG.error("%s attempt %d: %s: %s\n%s", trial.trial_id, attempt, outcome.kind, outcome.message, outcome.traceback)
            run.progress.message(f"{trial.trial_id} attempt {attempt}: {outcome.kind}: {_first_line(outcome.message)}")
            self._cover("waste", trial.trial_id, attempt)
        gap_s = (outcome.spans[0].begin_ns - gap_begin_ns) / 1e9 if outcome.spans else None
        run.book.add(
            AttemptEnded(
                gang=self._record,
                group=self._group,
                trial=trial,
                attempt=attempt,
                outcome=outcome,
                begin_ns=gap_begin_ns,
                end_ns=run.timeline.end_ns,
                started_utc=started_utc,
                gap_s=gap_s,
                final=decision == "skip",
            )
        )
        if not run.policy.gang_survives(outcome):
            self._close_gang(force=True)
        return decision

    def _attempt(self, trial: Trial, attempt: int) -> Outcome:
        run, measure = self._run, self._run.plan.measure
        assert self._gang is not None
        assert self._record is not None
        order = TrialOrder(
            trial_id=trial.trial_id,
            attempt=attempt,
            experiment=trial.experiment,
            guard_s=guard_s(self._record, run.meter, measure),
            warmup_batches=measure.warmup.batches,
            min_window_s=measure.min_window_s,
            cooldown_s=measure.cooldown_s,
        )
        run.book.measuring(trial, attempt, self._record)
        run.gang = self._gang
        try:
            outcome = run.waits.answer(self._gang.run(order), measure.trial_timeout_s, f"trial {trial.trial_id}")
        except LlemRayError as error:
            outcome = self._failed(error)
        except Aborted:
            outcome = Failed(kind="interrupted", message="stopped by the user", traceback=None)
        finally:
            run.gang = None
        return outcome if isinstance(outcome, Completed) else replace(outcome, spans=())

    def _open_gang(self) -> Failed | None:
        """Place a gang and load its model, with both idle baselines; a Failed says why there is none."""
        run, measure = self._run, self._run.plan.measure
        run.gangs_opened += 1
        gang = run.executor.open_gang(self._group, run.plan.base_dir, run.cache_dir)
        self._gang, self._record = gang, None
        try:
            leased = run.waits.answer(gang.lease(), LEASE_TIMEOUT_S, "placement", may_stop=True)
            record = self._record = self._make_record(leased)
            self._cover("startup")
            self._idle(record, "bare_idle", measure.idle_baseline_s)
            begin_ns = run.clock.monotonic_ns()
            run.book.phase = "load"
            loaded: Loaded = run.waits.answer(gang.load(), measure.load_timeout_s, "model load", may_stop=True)
            self._check_identity(record, loaded)
            record.loaded = loaded
            LOG.info("%s on %s loaded %s", record.name, leased.hostname, loaded.report)
            span = PhaseSpan(phase="load", begin_ns=begin_ns, end_ns=run.clock.monotonic_ns())
            self._add_spans([span])
            run.book.add(LoadEnded(gang=record, span=span))
            self._idle(record, "resident_idle", measure.idle_baseline_s)
        except PlacementError:
            raise
        except LlemRayError as error:
            return self._failed(error)
        return None

    def _make_record(self, leased: Leased) -> GangRecord:
        devices, context, reason = gang_devices(leased, self._group.gpus, self._run.meter.devices(leased.node))
        return GangRecord(
            name=f"gang-{self._run.gangs_opened}",
            group=self._group,
            leased=leased,
            devices=devices,
            context=context,
            reason=reason,
        )

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
        self._run.book.add(IdleTaken(gang=record, resident=phase == "resident_idle", span=span))

    def _check_identity(self, record: GangRecord, loaded: Loaded) -> None:
        """The GPUs that the workers see from inside must be the ones that were leased."""
        seen = {rank.gpu_uuid for rank in loaded.ranks if rank.gpu_uuid}
        held = {device.uuid for device in record.devices}
        if seen and held and not seen <= held:
            raise PlacementError(
                f"the engine runs on {', '.join(sorted(seen - held))}, which its gang does not hold ({', '.join(sorted(held))})",
                "set CUDA_DEVICE_ORDER=PCI_BUS_ID where Ray starts, so that CUDA and NVML count GPUs alike",
            )

    def _failed(self, error: LlemRayError) -> Failed:
        self._run.book.raise_if_broken()  # that error comes through every wait, and is no failure of the attempt
        failure = failed_from(error)
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
                )
            )

    def _close_gang(self, *, force: bool = False) -> None:
        if self._gang is None:
            return
        gang, self._gang = self._gang, None
        self._run.book.phase = "shutdown"
        gang.close(0.0 if force else CLOSE_TIMEOUT_S)
        LOG.info("%s closed%s", self._record.name if self._record else "a gang without a lease", " by force" if force else "")
        self._cover("shutdown")
        self._record = None

    def _add_spans(self, spans: Iterable[PhaseSpan]) -> None:
        self._run.timeline.add(spans)
        self._report()

    def _cover(self, phase: Phase, trial_id: str | None = None, attempt: int | None = None) -> None:
        self._run.timeline.close_at(phase, self._run.clock.monotonic_ns(), trial_id, attempt)
        self._report()

    def _report(self) -> None:
        self._run.book.add(SpansAdded(gang=self._record, spans=self._run.timeline.take()))


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
