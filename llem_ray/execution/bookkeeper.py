"""Turns what happened into durable rows, on a thread of its own, once the samples after each window have arrived.

The next trial does not wait for it. Events are handled in the order they happened.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from operator import itemgetter
from typing import Final

from llem_ray.core.clock import Clock
from llem_ray.core.outcome import Completed, Failed
from llem_ray.core.plan import Plan, Trial
from llem_ray.core.progress import format_setting
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.execution.accounting import Accounts
from llem_ray.execution.footprint import look_up_footprint
from llem_ray.execution.ledgers import RunLedger
from llem_ray.execution.load_times import load_row
from llem_ray.execution.meter import Meter
from llem_ray.execution.records import (
    AttemptEnded,
    Event,
    GangPlaced,
    GangRecord,
    IdleTaken,
    LaneClosed,
    LaneOpened,
    LoadEnded,
    SpansAdded,
)
from llem_ray.execution.rows import Row, attempt_row, request_rows
from llem_ray.execution.stopping import Stopping
from llem_ray.execution.turns import Turns
from llem_ray.results.journal import Journal, JournalEvent, JournalState
from llem_ray.results.rows import clock_row
from llem_ray.results.writer import DatasetWriter

LOG = logging.getLogger(__name__)

PUMP_S: Final = 1.0
PATIENCE_S: Final = 10.0
"""Samples that a host which answers has not handed out by then are counted as lost; what is there decides."""
SILENT_PATIENCE_S: Final = 60.0
"""The same where a host is silent but not given up: a link that heals brings them after all."""
CONTEXT_BYTES: Final = 200e6
"""Memory that samples of nodes outside a gang may take while a trial goes on."""
ROW_BYTES: Final = 40
ADVANCE_S: Final = 10.0
"""Devices outside any gang are accounted for this often, host after host."""
FIRST_S: Final = 30.0
"""By then it is known when start-up ended."""
FLUSH_PHASES: Final = 4096
"""Rows of theirs that wait for a trial to be written with, at most."""
CLOCKS_S: Final = 30.0
"""Clock offsets are recorded this often."""
END_TIMEOUT_S: Final = 90.0
"""A sampler that does not answer, or is being started anew, holds the thread for so long at most."""
KEEP_S: Final = (5.0, 600.0)
"""Samples are kept at least and at most so long behind what is still to be accounted for, beside what an edge needs: states
and idle powers look back, and what other nodes spent during a trial is known if its begin is still there."""
KEEP_ROWS: Final = 800_000
"""Samples kept so, of all devices together."""


class Bookkeeper:
    """Accounts for a run.

    Args:
        plan: The plan that is run.
        meter: Where samples come from.
        journal: Told when an attempt begins and when its row is durable.
        writer: Takes the rows.
        state: What the journal says so far; kept up to date.
        clock: The run driver's clock.
        begin_ns: Start of the run on it.
        stopping: What earlier sessions found; default: nothing.
    """

    def __init__(
        self,
        plan: Plan,
        meter: Meter,
        journal: Journal,
        writer: DatasetWriter,
        state: JournalState,
        clock: Clock,
        begin_ns: int,
        stopping: Stopping | None = None,
    ) -> None:
        self._plan, self._meter, self._journal, self._writer = plan, meter, journal, writer
        self._state, self._clock = state, clock
        self._accounts = Accounts(plan.measure, meter, look_up_footprint(plan.footprint))
        self._ledger = RunLedger(meter, begin_ns)
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._waiting: dict[str, deque[tuple[int, Event]]] = {}
        """Lane -> what it told and is not handled yet. Lanes do not wait for each other's hosts."""
        self._taken = 0
        self._attempts: dict[tuple[str, int], int] = {}
        """(trial, attempt) -> when it began, of those that run now."""
        self._lane_hosts: dict[str, frozenset[str]] = {}
        """Open lane -> its hosts, in the order they were opened."""
        self._phases: list[Row] = []
        self._nobodys: list[Row] = []
        """Phases of devices in no gang: of no attempt, so they may be written before any."""
        self._given: dict[str, int] = {}
        self._clocks_ns = self._pumped_ns = clock.monotonic_ns()
        self._turns = Turns(ADVANCE_S, self._clocks_ns + ns_from_s(FIRST_S))
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._caught_up = threading.Event()
        self._added = self._handled = 0
        self._ending = self._is_fetching = False
        self._error: BaseException | None = None
        self._joules_per_token: list[float] = []
        self._estimates_per_token: list[float] = []
        self.stopping = stopping or Stopping(plan)
        """Told of every row."""
        self.phase = "startup"
        """What the run does now, for the progress display."""
        self.label = ""
        """Settings of the running trial, for the progress display."""
        self._first_trial_ns: int | None = None
        self._last_trial_ns: int | None = None
        self.completed = 0
        self.invalid = 0
        self._thread = threading.Thread(target=self._work, name="llem-ray-bookkeeper", daemon=True)

    def start(self) -> None:
        """Begin to fetch samples and account for events."""
        self._thread.start()

    def add(self, event: Event) -> None:
        """Tell what happened."""
        with self._lock:
            self._added += 1
            self._inbox.put(event)

    def next_attempt(self, trial_id: str) -> int:
        """Number of the trial's next attempt, from 1; every call gives another."""
        with self._lock:
            self._given[trial_id] = max(self._given.get(trial_id, 0) + 1, self._state.next_attempt(trial_id))
            return self._given[trial_id]

    def measuring(self, trial: Trial, attempt: int, gang: GangRecord) -> None:
        """Journal that an attempt begins."""
        self.phase = "trial"
        self.label = ", ".join(f"{key.rpartition('.')[2]}={format_setting(value)}" for key, value in trial.cell.settings.items())
        if self._first_trial_ns is None:
            self._first_trial_ns = self._clock.monotonic_ns()
        with self._lock:
            self._attempts[trial.trial_id, attempt] = self._clock.monotonic_ns()
        self._log(
            JournalEvent(
                event="measuring",
                trial_id=trial.trial_id,
                cell_id=trial.cell.cell_id,
                repeat=trial.repeat,
                attempt=attempt,
                load_key=gang.group.load_key,
                host=",".join(dict.fromkeys(worker.hostname for worker in gang.workers)),
                pid=gang.lead.pid,
            )
        )

    def not_needed(self, trial: Trial) -> None:
        """Journal that a trial is not run, as its cell has enough repeats."""
        self._log(JournalEvent(event="not_needed", trial_id=trial.trial_id, cell_id=trial.cell.cell_id, repeat=trial.repeat))

    def hurry(self) -> None:
        """Somebody waits for results: samples are fetched at once."""
        self._wake.set()

    def raise_if_broken(self) -> None:
        """Raise what ended the bookkeeping, such as a full disk: nothing more should be measured then."""
        if self._error is not None:
            raise self._error

    def settled(self) -> tuple[int, int]:
        """Trials that are done or given up, and those that are not needed, earlier sessions included."""
        with self._lock:
            return len(self._state.done) + len(self._state.given_up), len(self._state.not_needed)

    def mean_j_per_token(self) -> tuple[float | None, bool]:
        """Mean J per output token of this session's valid trials; of their estimates (True) where none is valid."""
        values = self._joules_per_token or self._estimates_per_token
        return (sum(values) / len(values) if values else None), not self._joules_per_token

    def drain(self, timeout_s: float) -> bool:
        """Wait until every event so far is durable; False when it is not after ``timeout_s``.

        Raises:
            ResultsError: Bookkeeping broke.
        """
        deadline_ns = self._clock.monotonic_ns() + ns_from_s(timeout_s)
        while self._handled < self._added and self._clock.monotonic_ns() < deadline_ns:
            self._caught_up.clear()
            self._wake.set()
            self._caught_up.wait(0.05)
            self.raise_if_broken()
        return self._handled == self._added

    def end(self) -> None:
        """Stop the thread."""
        self._ending = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=END_TIMEOUT_S)

    def write_last_spans(self, last: SpansAdded) -> None:
        """After ``end``: account for what was left, whether its samples came or not, and make all phases durable.

        Once bookkeeping broke, attempts that were left get no row: a resumed run repeats them.
        """
        self._take_inbox()
        for event in [*(event for _, event in sorted(self._pending(), key=itemgetter(0))), last]:
            if not isinstance(event, AttemptEnded) or self._error is None:
                self._handle(event)
        self._waiting.clear()
        rows = [*self._nobodys, *self._phases, *self._ledger.finish()]
        for begin in range(0, len(rows), FLUSH_PHASES):
            self._writer.write_phases(rows[begin : begin + FLUSH_PHASES])
        self._nobodys, self._phases = [], []
        for host in self._meter.hosts:  # nobody needs its samples any more
            self._meter.trim(host, 2**62)

    @property
    def is_running(self) -> bool:
        """The thread fetches samples and accounts."""
        return self._thread.is_alive()

    def eta_s(self, trials_left: int) -> float | None:
        """Time to go at the mean pace of this session's trials; None before the first."""
        if not self.completed or self._first_trial_ns is None or self._last_trial_ns is None:
            return None
        return (self._last_trial_ns - self._first_trial_ns) / NS_PER_S / self.completed * trials_left

    def _work(self) -> None:
        try:
            self._is_fetching = True
            while not self._ending:
                self._step()
                self._wake.wait(self._nap_s())
                self._wake.clear()
            self._is_fetching = False
            self._step()  # the last samples, for the phase that ends now
        except BaseException as error:
            LOG.exception("bookkeeping ended")
            self._error = error

    def _nap_s(self) -> float:
        """Until the next look: at once when some were not asked, soon when somebody waits or a sampler starts, else a second."""
        if self._meter.is_behind:
            return 0.0
        return 0.1 if self._wake.is_set() or self._meter.is_starting() else PUMP_S

    def _step(self) -> None:
        if self._ending:
            for batches in self._meter.pump_last():
                self._writer.write_power(batches)
        else:
            self._pump(hurry=self._wake.is_set())
        self._take_inbox()
        while self._handle_ready():
            pass
        if self._handled == self._added:
            self._caught_up.set()
        now_ns = self._clock.monotonic_ns()
        self._advance(now_ns)
        if now_ns - self._clocks_ns > CLOCKS_S * NS_PER_S:
            self._clocks_ns = now_ns
            self._record_clocks()

    def _pump(self, *, hurry: bool = False) -> None:
        self._writer.write_power(self._meter.pump(hurry=hurry))
        self._pumped_ns = self._clock.monotonic_ns()

    def _handle_ready(self) -> bool:
        """Handle every event whose samples are there; True when there was one."""
        handled = False
        for lane in list(self._waiting):
            events = self._waiting[lane]
            while events and not self._is_behind(lane) and self._is_ready(events[0][1]):
                self._handle(events.popleft()[1])
                self._handled += 1
                handled = True
            if not events:
                del self._waiting[lane]
        return handled

    def _is_behind(self, lane: str) -> bool:
        """Devices pass from a lane that has closed to one that was opened later: the first must have been accounted for by then.

        What no lane tells is of all devices: it comes after all that was told before it, and before all that was told after it.
        """
        mine = self._waiting[lane][0][0]
        others = {other: events for other, events in self._waiting.items() if other != lane and events}
        if not lane:
            return any(events[0][0] < mine for events in others.values())
        if "" in others and others[""][0][0] < mine:
            return True
        order = list(self._lane_hosts)
        for other, events in others.items():
            if not other or not isinstance(events[-1][1], LaneClosed):
                continue
            shared = self._lane_hosts[other] & self._lane_hosts[lane]
            if shared and order.index(other) < order.index(lane):
                return True
        return False

    def _advance(self, now_ns: int) -> None:
        """Account for devices that are in no gang, so that their samples need not be kept; a few hosts at a time."""
        for host in self._turns.take(self._meter.hosts, now_ns):
            sampled_ns = self._meter.sampled_until(host) or 0
            until_ns = max(self._meter.heard_ns(host) - ns_from_s(PATIENCE_S), min(now_ns, sampled_ns))
            self._nobodys.extend(self._ledger.advance(host, until_ns))
            self._trim(host)
        self._flush_nobodys()

    def _flush_nobodys(self) -> None:
        if len(self._nobodys) >= FLUSH_PHASES:
            self._writer.write_phases(self._nobodys)
            self._nobodys = []

    def _record_clocks(self) -> None:
        """What the hosts' clocks show beside ours."""
        now_ns = self._clock.monotonic_ns()
        rows = []
        for host in self._meter.hosts:
            offset = self._meter.clocks.offset(host, now_ns)
            if offset is not None:
                rows.append(
                    clock_row(
                        host, self._meter.generation(host), run_ns=now_ns, offset_ns=offset.offset_ns, delta_ns=offset.delta_ns
                    )
                )
        self._writer.write_clocks(rows)

    def _trim(self, host: str) -> None:
        """Forget samples that are accounted for, and that no event waits for."""
        needed_ns = self._ledger.accounted_ns(host)
        if needed_ns is None:
            return
        waiting_ns = min((*(_begin_ns(event) for _, event in self._pending()), *self._kept_attempts()), default=None)
        if waiting_ns is not None:
            needed_ns = min(needed_ns, self._meter.clocks.to_host(host, waiting_ns) or needed_ns)
        self._meter.trim(host, needed_ns - ns_from_s(self._keep_s() + self._meter.reach_s(host)))

    def _keep_s(self) -> float:
        rate_hz = self._meter.samples_per_s
        at_least_s, at_most_s = KEEP_S
        return min(max(at_least_s, KEEP_ROWS / rate_hz), at_most_s) if rate_hz else at_most_s

    def _kept_attempts(self) -> list[int]:
        """Begins of attempts that run now: nodes outside their gangs are context of their windows, as far as memory allows.

        The samples of a gang's own hosts are kept in any case, since nothing accounts for them before the attempt has ended.
        """
        now_ns = self._clock.monotonic_ns()
        budget_s = CONTEXT_BYTES / max(1.0, self._meter.samples_per_s * ROW_BYTES)
        with self._lock:
            return [begin_ns for begin_ns in self._attempts.values() if now_ns - begin_ns <= budget_s * NS_PER_S]

    def _pending(self) -> Iterator[tuple[int, Event]]:
        return (item for events in self._waiting.values() for item in events)

    def _take_inbox(self) -> None:
        while True:
            try:
                event = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(event, LaneOpened):
                self._lane_hosts[event.lane] = frozenset(event.hosts)
            self._taken += 1
            self._waiting.setdefault(event.lane, deque()).append((self._taken, event))

    def _is_ready(self, event: Event) -> bool:
        if isinstance(event, (LaneOpened, GangPlaced, LaneClosed)):
            return True
        hosts = None if event.gang is None else event.gang.hosts
        if isinstance(event, AttemptEnded) and event.gang is None:
            return True
        if self._meter.given_up or self._meter.is_sampled_until(event.needs_ns, hosts):
            return True
        now_ns = self._clock.monotonic_ns()
        if any(self._meter.is_silent(host) for host in hosts or ()):
            return now_ns > event.needs_ns + SILENT_PATIENCE_S * NS_PER_S
        answering = (host for host in (self._meter.hosts if hosts is None else hosts) if not self._meter.is_silent(host))
        heard_ns = min(map(self._meter.heard_ns, answering), default=now_ns)
        return heard_ns > event.needs_ns + PATIENCE_S * NS_PER_S

    def _handle(self, event: Event) -> None:
        match event:
            case LaneOpened():
                self._ledger.open_lane(event)
            case GangPlaced():
                self._ledger.place_gang(event)
            case LaneClosed():
                self._ledger.close_lane(event)
                del self._lane_hosts[event.lane]
            case SpansAdded():
                self._add_spans(event)
            case IdleTaken():
                self._accounts.take_idle(event)
            case LoadEnded():
                self._accounts.take_load(event)
            case AttemptEnded():
                self._record(event)

    def _add_spans(self, added: SpansAdded) -> None:
        if added.gang is not None:
            self._phases.extend(self._ledger.add(added.gang, added.spans))
            return
        for host, rows in self._ledger.add_to_all(added.spans):  # of a large cluster this takes seconds: samples go on coming
            self._nobodys.extend(rows)
            self._flush_nobodys()
            self._trim(host)
            if self._is_fetching and self._clock.monotonic_ns() - self._pumped_ns > PUMP_S * NS_PER_S:
                self._pump()

    def _record(self, ended: AttemptEnded) -> None:
        if isinstance(ended.outcome, Completed) and self._lost_samples(ended):
            lost = Failed(kind="interrupted", message="the samplers were killed before its last samples came", traceback=None)
            ended = replace(ended, outcome=lost, final=False)
        with self._lock:
            self._attempts.pop((ended.trial.trial_id, ended.attempt), None)
        row = attempt_row(ended) | self._accounts.energy_columns(ended)
        self.stopping.take(row, final=ended.final)
        phases, self._nobodys, self._phases = [*self._nobodys, *self._phases], [], []
        outcome, load = ended.outcome, load_row(ended)
        self._writer.write_trial(
            row,
            request_rows(ended, row, keep_token_times=self._plan.measure.record_token_times),
            phases,
            loads=[load] if load else [],
            steps=outcome.step_log if isinstance(outcome, Completed) else None,
        )
        if isinstance(outcome, Failed):
            cut = outcome.kind == "interrupted"
            self._log(_attempt_event(ended, "interrupted" if cut else "failed", outcome.kind))
            return
        self._log(_attempt_event(ended, "done", None))
        self.completed += 1
        self._last_trial_ns = ended.end_ns
        self.invalid += not row.get("power_valid")
        j_per_token = row.get("joules_per_output_token")
        if j_per_token is not None:
            self._joules_per_token.append(j_per_token)
        estimate = row.get("est_joules_per_output_token")
        if estimate is not None:
            self._estimates_per_token.append(estimate)

    def _lost_samples(self, ended: AttemptEnded) -> bool:
        """Samples after its window will never come, since everything was killed at once: it is to be run again."""
        hosts = () if ended.gang is None else ended.gang.hosts
        return self._meter.given_up and not self._meter.is_sampled_until(ended.needs_ns, hosts)

    def _log(self, event: JournalEvent) -> None:
        with self._lock:
            self._journal.append(event)
            self._state.apply({name: getattr(event, name) for name in ("event", "trial_id", "attempt", "kind", "final")})


def _attempt_event(ended: AttemptEnded, name: str, kind: str | None) -> JournalEvent:
    trial, gang = ended.trial, ended.gang
    return JournalEvent(
        event=name,  # type: ignore[arg-type]
        trial_id=trial.trial_id,
        cell_id=trial.cell.cell_id,
        repeat=trial.repeat,
        attempt=ended.attempt,
        load_key=ended.group.load_key,
        host=gang.lead.hostname if gang else None,
        kind=kind,
        final=ended.final if kind else None,
    )


def _begin_ns(event: Event) -> int:
    """Samples from here on are needed for it, on the run driver's clock."""
    match event:
        case SpansAdded():
            return min((span.begin_ns for span in event.spans), default=event.needs_ns)
        case AttemptEnded() | LaneOpened():
            return event.begin_ns
        case GangPlaced():
            return event.gang.begin_ns
        case LaneClosed():
            return event.end_ns
        case _:
            return event.span.begin_ns
