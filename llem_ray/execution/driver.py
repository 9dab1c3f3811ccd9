"""The run driver: carries out a plan, trial by trial, and never loses what is done."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.energy import Phase
from llem_ray.core.errors import ConfigError
from llem_ray.core.outcome import Failed
from llem_ray.core.plan import LoadGroup, Plan, Trial
from llem_ray.core.power import SamplerInfo
from llem_ray.core.progress import Progress, ProgressEvent
from llem_ray.core.units import NS_PER_S
from llem_ray.execution.bookkeeper import Bookkeeper
from llem_ray.execution.calls import Executor, SamplerSettings, raise_if_gone
from llem_ray.execution.dispatch import Dispatcher
from llem_ray.execution.fleet import Fleet
from llem_ray.execution.interrupts import Aborted, Interrupts
from llem_ray.execution.lane import RunContext
from llem_ray.execution.memory import cluster_devices, require_memory
from llem_ray.execution.meter import Meter
from llem_ray.execution.policy import FailurePolicy
from llem_ray.execution.records import AttemptEnded, SpansAdded
from llem_ray.execution.spans import Timeline
from llem_ray.execution.stopping import known_so_far
from llem_ray.execution.waits import Waits
from llem_ray.power.host import host_id
from llem_ray.results.environment import describe_environment, record_session
from llem_ray.results.journal import Journal, JournalEvent
from llem_ray.results.reader import settled_state
from llem_ray.results.rows import node_row
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.writer import DatasetWriter

LOG = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 60.0
PROGRESS_S = 1.0
ASK_AGAIN_S = 5.0
LOOK_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How a plan is carried out; no part of what is measured."""

    begin_ns: int
    """When the run's clock began: the start of the process."""
    cache_dir: str
    """Writable folder for tokenizers and checkpoints that are built here."""
    retry_failed: bool = False
    """Try trials again that failed for good in an earlier session."""
    allow_mixed: bool = False
    """Resume although engine, NVIDIA driver, GPUs or llem-ray changed."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further facts for the environment record."""
    locate: Callable[[ConfigError], ConfigError] = lambda error: error
    """Adds to an error where in the sweep file its field stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a session of a run ended."""

    completed: int
    """Trials done in this session."""
    failed: int
    """Trials that failed for good, earlier sessions included."""
    invalid: int
    """Trials of this session whose energy is missing or invalid."""
    left: int
    """Trials that are still to do."""
    interrupted: bool
    """The user stopped it."""
    stopped: str | None
    """Why the run gave up before its end, or None."""


class RunDriver:
    """One session of a run: a plan, an executor, a run directory that the caller has locked. Use it once.

    Args:
        plan: What to run.
        rundir: Where results go.
        executor: Where gangs and samplers run.
        options: How to run.
        progress: Told what happens, for the terminal.
        clock: The monotonic clock of this host.
    """

    def __init__(
        self,
        plan: Plan,
        rundir: RunDirectory,
        executor: Executor,
        options: RunOptions,
        progress: Progress,
        clock: Clock | None = None,
    ) -> None:
        self._plan, self._rundir, self._executor = plan, rundir, executor
        self._options, self._progress = options, progress
        self._clock = clock or SystemClock()
        self._interrupts = Interrupts()
        settings = SamplerSettings(run=rundir.name, sources=plan.measure.sources, sample_hz=plan.measure.sample_hz)
        self._meter = Meter(executor, settings, self._clock, host_id(), self._on_sampler)
        self._fleet = Fleet(executor, self._meter, self._clock, progress.message)
        self._tick_lock = threading.Lock()
        self._versions: dict[str, str] = {}
        self._timeline = Timeline(options.begin_ns)
        self._shown_ns = self._looked_ns = 0
        self._stop_announced = False
        self._phase_seen: tuple[str, int] = ("", 0)
        self._context: RunContext | None = None

    def run(self) -> RunResult:
        """Run every open trial of the plan.

        Raises:
            ResultsError: The run directory cannot be written, or was begun in another environment; what is done stays.
            PlacementError: The executor cannot be reached or has too little.
            PowerError: A power source asked for by name cannot work.
        """
        self._rundir.check_writable()
        self._state = settled_state(self._rundir)
        if self._options.retry_failed:
            self._state.given_up.clear()
        with Journal.open(self._rundir.journal_path) as journal:
            self._writer = DatasetWriter(self._rundir)
            stopping = known_so_far(self._plan, self._rundir, self._state)
            self._book = Bookkeeper(
                self._plan, self._meter, journal, self._writer, self._state, self._clock, self._options.begin_ns, stopping
            )
            try:
                interrupted, stopped = self._run_session(journal)
            finally:
                self._interrupts.restore()
            left = sum(not self._state.is_settled(trial.trial_id) for trial in self._plan.trials)
            interrupted = interrupted and left > 0
            if interrupted:
                journal.append(JournalEvent(event="interrupted"))
            elif not left:
                journal.append(JournalEvent(event="run_finished"))
        return RunResult(
            completed=self._book.completed,
            failed=len(self._state.given_up),
            invalid=self._book.invalid,
            left=left,
            interrupted=interrupted,
            stopped=stopped,
        )

    def _run_session(self, journal: Journal) -> tuple[bool, str | None]:
        """Start everything, run the groups, end everything. Returns whether the user stopped it, and why it gave up."""
        interrupted, stopped = False, None
        try:
            self._executor.start()
            self._interrupts.install()
            infos = self._meter.open(self._fleet.start())
            backends = dict.fromkeys(group.experiment.engine.backend for group in self._plan.groups)
            environment = describe_environment(backends, infos, {**self._executor.facts(), **self._options.facts})
            record_session(self._rundir, environment, datetime.now(UTC).isoformat(), allow_mixed=self._options.allow_mixed)
            journal.append(JournalEvent(event="run_started", host=socket.gethostname(), pid=os.getpid()))
            self._versions = {**environment.engines, **environment.packages}
            self._record_nodes(infos)
            self._book.start()
            self._cover("startup")
            self._record_cut_short()
            if not self._plan.measure.wait_for_nodes_s:  # nodes that are to come may be larger
                require_memory(self._open_groups(), self._plan.base_dir, cluster_devices(infos))
            self._executor.check(self._open_groups(), self._plan.base_dir, self._options.cache_dir)
            stopped = self._run_groups()
        except Aborted:
            interrupted = True
            LOG.warning("aborted by a signal")
        except Exception:
            LOG.exception("the run ended with an error")
            raise
        finally:
            self._end()
        return interrupted or self._interrupts.stop_requested, stopped

    def _on_sampler(self, info: SamplerInfo) -> None:
        """A sampler that was started anew belongs in the nodes table too."""
        if self._book.is_running:
            self._record_nodes([info])

    def _record_nodes(self, infos: Sequence[SamplerInfo]) -> None:
        for info in infos:
            LOG.info("sampler on %s: %s", info.hostname, ", ".join(device.uuid for device in info.devices) or "no device")
            for name, reason in info.unavailable.items():
                LOG.info("power source %s gives nothing on %s: %s", name, info.hostname, reason)
        self._writer.write_nodes([node_row(info, self._versions) for info in infos])

    def _run_groups(self) -> str | None:
        waits = Waits(self._clock, self._interrupts, self._tick)
        measure = self._plan.measure
        context = self._context = RunContext(
            plan=self._plan,
            executor=self._executor,
            meter=self._meter,
            fleet=self._fleet,
            book=self._book,
            waits=waits,
            progress=self._progress,
            clock=self._clock,
            policy=FailurePolicy(max_attempts=measure.max_attempts, max_consecutive_failures=measure.max_consecutive_failures),
            cache_dir=self._options.cache_dir,
            submitted_ns=self._options.begin_ns,
            locate=self._options.locate,
            ready_ns=self._clock.monotonic_ns(),
        )
        work = [(group, [trial for trial in group.trials if self._is_open(trial)]) for group in self._plan.groups]
        return Dispatcher(context, [(group, trials) for group, trials in work if trials]).run()

    def _open_groups(self) -> list[LoadGroup]:
        return [group for group in self._plan.groups if any(map(self._is_open, group.trials))]

    def _is_open(self, trial: Trial) -> bool:
        return not self._state.is_settled(trial.trial_id)

    def _record_cut_short(self) -> None:
        """An attempt that an earlier session was killed in is a row too."""
        owners = {trial.trial_id: (group, trial) for group in self._plan.groups for trial in group.trials}
        for trial_id, attempt in list(self._state.open_attempts.items()):
            if trial_id in owners:
                self._book.add(_cut_short(*owners[trial_id], attempt, self._timeline.end_ns))

    def _end(self) -> None:
        """Make every row durable, then end samplers and executor; the ledger runs to the last moment."""
        if self._executor.is_gone():
            self._meter.give_up()
        try:
            if self._book.is_running:
                self._cover("unleased")
                self._book.phase = "finalise"
                self._timeline.close_at("unleased", self._clock.monotonic_ns())
                self._book.drain(DRAIN_TIMEOUT_S)
                self._writer.compact()
                self._cover("finalise")
        finally:
            self._book.end()
            self._meter.close()
            self._executor.close()
        self._timeline.close_at("shutdown", self._clock.monotonic_ns())
        self._book.write_last_spans(SpansAdded(gang=None, spans=self._timeline.take()))
        self._writer.finish()
        self._book.raise_if_broken()

    def _cover(self, phase: Phase) -> None:
        self._timeline.close_at(phase, self._clock.monotonic_ns())
        self._book.add(SpansAdded(gang=None, spans=self._timeline.take()))

    def _tick(self) -> None:
        """Somebody waits: a chance to look at the bookkeeper and to show progress. Lanes wait in threads of their own."""
        self._book.raise_if_broken()
        if not self._tick_lock.acquire(blocking=False):
            return
        try:
            now_ns = self._clock.monotonic_ns()
            if now_ns - self._looked_ns > LOOK_S * NS_PER_S:
                self._looked_ns = now_ns
                raise_if_gone(self._executor)
            self._show()
        finally:
            self._tick_lock.release()

    def _show(self) -> None:
        if self._interrupts.stop_requested and not self._stop_announced:
            self._stop_announced = True
            self._progress.message("stopping after the running trial; Ctrl-C again aborts it")
        now_ns = self._clock.monotonic_ns()
        if now_ns - self._shown_ns < PROGRESS_S * NS_PER_S:
            return
        self._shown_ns = now_ns
        self._progress.update(self._progress_event())

    def _progress_event(self) -> ProgressEvent:
        book, plan = self._book, self._plan
        settled, not_needed = book.settled()
        total = len(plan.trials) - not_needed
        watts, estimated = self._meter.latest_power_w()
        j_per_token, j_estimated = book.mean_j_per_token()
        return ProgressEvent(
            trial=min(settled + 1, total),
            total=total,
            phase=self._phase(),
            label=book.label,
            watts=watts,
            watts_estimated=estimated,
            j_per_token=j_per_token,
            j_per_token_estimated=j_estimated,
            eta_s=book.eta_s(total - settled),
            at_most=book.stopping.has_target,
        )

    def _phase(self) -> str:
        """What the run does; within a trial what its gang says, which is seldom asked while it measures."""
        gang = self._context.gang if self._context is not None and self._progress.live else None
        if gang is None:
            self._phase_seen = ("", 0)
            return self._book.phase
        seen, seen_ns = self._phase_seen
        if seen != "measured" or self._clock.monotonic_ns() - seen_ns > ASK_AGAIN_S * NS_PER_S:
            self._phase_seen = (gang.phase() or self._book.phase, self._clock.monotonic_ns())
        return self._phase_seen[0]


def _cut_short(group: LoadGroup, trial: Trial, attempt: int, now_ns: int) -> AttemptEnded:
    failure = Failed(kind="interrupted", message="the run driver was killed during this attempt", traceback=None)
    return AttemptEnded(
        gang=None,
        group=group,
        trial=trial,
        attempt=attempt,
        outcome=failure,
        begin_ns=now_ns,
        end_ns=now_ns,
        started_utc=datetime.now(UTC),
        gap_s=None,
        final=False,
    )
