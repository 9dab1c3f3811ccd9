"""Warm-up before a window: a fixed number of batches, or until step time and power are the same again and again."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Final

from llem_ray.core.backend import Request, RequestRecord, StepEvent
from llem_ray.core.clock import Clock
from llem_ray.core.measure_spec import CV_BATCHES, WarmupSpec
from llem_ray.core.outcome import WarmupEnd, WarmupReport
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.energy.steadiness import PIECE_S, variation
from llem_ray.execution.calls import PowerSeen, WarmupProgress

Events = Iterator[StepEvent | RequestRecord]

ANSWER_S: Final = 10.0
"""What is known of power may be that old, and is waited for so long at the limit: samples of a large cluster come every 5 s."""
MARK_S: Final = 0.1
"""Batches' ends are told no closer than this."""
MARKS: Final = 400


class WarmupTalk:
    """What an engine's warm-up and whoever looks at its power tell each other, on two threads.

    Args:
        trial_id: Whose warm-up.
        attempt: Number of the attempt.
    """

    def __init__(self, trial_id: str, attempt: int) -> None:
        self._of = (trial_id, attempt)
        self._lock = threading.Lock()
        self._marks: deque[tuple[int, int]] = deque(maxlen=MARKS)
        self._seen: tuple[PowerSeen, int] | None = None
        self._over = False

    def mark(self, batches: int, t_ns: int) -> None:
        """So many batches have run by now."""
        with self._lock:
            if not self._marks or t_ns - self._marks[-1][1] >= ns_from_s(MARK_S):
                self._marks.append((batches, t_ns))

    def finish(self) -> None:
        """The warm-up is over."""
        with self._lock:
            self._over = True

    def seen(self) -> tuple[PowerSeen, int] | None:
        """The latest of power, and when its last batch had ended; None before anything was told."""
        with self._lock:
            return self._seen

    def tell(self, trial_id: str, attempt: int, seen: PowerSeen | None) -> WarmupProgress:
        """Take what was seen of power; how far the warm-up is, nothing where another attempt is meant."""
        if (trial_id, attempt) != self._of:
            return WarmupProgress()
        with self._lock:
            at_ns = None if seen is None else dict(self._marks).get(seen.batches)
            if seen is not None and at_ns is not None:
                self._seen = (seen, at_ns)
            return WarmupProgress(marks=tuple(self._marks), over=self._over)


def warm_up(
    spec: WarmupSpec,
    work: Sequence[tuple[Request, ...]],
    serve: Callable[[tuple[Request, ...]], Events],
    clock: Clock,
    talk: WarmupTalk | None = None,
) -> WarmupReport:
    """Run warm-up batches.

    With ``until_cv`` one and the same batch is repeated. Compared are the batches' mean step times: within a batch steps grow
    with the context, from batch to batch they do not. The step time is that of decode steps; of all steps where there are none;
    of the whole batch where the engine tells no steps. Power is what the other side of ``talk`` says; batches go on meanwhile.

    Args:
        spec: How long.
        work: Batches to take in turn.
        serve: Runs one batch.
        clock: This host's.
        talk: Who looks at power answers there; None where nobody does, and step times alone decide.
    """
    begin_ns = clock.monotonic_ns()
    if spec.until_cv is None:
        batches = 0
        while batches < spec.batches or clock.monotonic_ns() < begin_ns + ns_from_s(spec.min_s):
            for _ in serve(work[batches % len(work)]):
                pass
            batches += 1
        return WarmupReport(batches=batches)
    state = _Steadiness(spec=spec, until_cv=spec.until_cv, begin_ns=begin_ns, talk=talk)
    if talk is not None:
        talk.mark(0, begin_ns)
    while True:
        state.step_times_s.append(_step_s(serve(work[0])))
        now_ns = clock.monotonic_ns()
        if talk is not None:
            talk.mark(state.batches, now_ns)
        end = state.end(now_ns)
        if end is not None:
            return state.report(end)


@dataclass(slots=True, kw_only=True)
class _Steadiness:
    """What is known after each batch."""

    spec: WarmupSpec
    until_cv: float
    begin_ns: int
    talk: WarmupTalk | None
    step_times_s: list[float] = field(default_factory=list)
    limit_ns: int | None = None
    """When the limit was reached: only what power was until then is still waited for."""

    @property
    def batches(self) -> int:
        return len(self.step_times_s)

    @property
    def step_cv(self) -> float | None:
        return variation(self.step_times_s[-CV_BATCHES:])

    def report(self, end: WarmupEnd) -> WarmupReport:
        seen = self.talk.seen() if self.talk is not None else None
        return WarmupReport(batches=self.batches, end=end, step_cv=self.step_cv, power_cv=None if seen is None else seen[0].cv)

    def end(self, now_ns: int) -> WarmupEnd | None:
        """Why no further batch is needed; None where one is."""
        passed_s = (now_ns - self.begin_ns) / NS_PER_S
        if passed_s < self.spec.min_s or self.batches < self.spec.batches:
            return None
        if self._steps_steady() and self._power_steady(now_ns):
            return "steady"
        if self.batches < self.spec.max_batches or (self.talk is not None and passed_s < CV_BATCHES * PIECE_S):
            return None
        if self.limit_ns is None:
            self.limit_ns = now_ns
        return "limit" if self._is_answered(self.limit_ns, now_ns) else None

    def _steps_steady(self) -> bool:
        cv = self.step_cv
        return self.batches >= CV_BATCHES and cv is not None and cv <= self.until_cv

    def _power_steady(self, now_ns: int) -> bool:
        """True too where nobody looks at power."""
        if self.talk is None:
            return True
        seen = self.talk.seen()
        if seen is None or seen[0].cv > self.until_cv:
            return False
        return seen[0].batches >= self.batches - 1 or now_ns - seen[1] <= ns_from_s(ANSWER_S)

    def _is_answered(self, limit_ns: int, now_ns: int) -> bool:
        """What power was up to the limit is known, or it has been waited for long enough."""
        if self.talk is None or now_ns - limit_ns >= ns_from_s(ANSWER_S):
            return True
        seen = self.talk.seen()
        return seen is not None and seen[1] >= limit_ns - ns_from_s(MARK_S)


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
