"""Phases of a gang's life as adjoining spans of one monotonic clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from llem_ray.core.clock import Clock
from llem_ray.core.energy import Phase, PhaseSpan


class SpanLog:
    """Spans that adjoin by construction: entering a phase ends the one before at the same instant."""

    def __init__(self, clock: Clock, trial_id: str | None = None, attempt: int | None = None) -> None:
        self._clock = clock
        self._trial_id = trial_id
        self._attempt = attempt
        self._spans: list[PhaseSpan] = []
        self._open: tuple[Phase, int] | None = None

    @property
    def phase(self) -> Phase | None:
        """The phase entered last, None before the first and after ``finish``."""
        return self._open[0] if self._open else None

    def enter(self, phase: Phase, at_ns: int | None = None) -> int:
        """Begin ``phase`` and return the boundary in ns."""
        now_ns = self._clock.monotonic_ns() if at_ns is None else at_ns
        self._end(now_ns)
        self._open = (phase, now_ns)
        return now_ns

    def finish(self) -> tuple[PhaseSpan, ...]:
        """End the open phase and return all spans."""
        self._end(self._clock.monotonic_ns())
        self._open = None
        return tuple(self._spans)

    def _end(self, now_ns: int) -> None:
        if self._open is not None and now_ns > self._open[1]:
            phase, begin_ns = self._open
            span = PhaseSpan(phase=phase, begin_ns=begin_ns, end_ns=now_ns, trial_id=self._trial_id, attempt=self._attempt)
            self._spans.append(span)


class Timeline:
    """The run driver's record of one gang lane: whatever no span covers is the orchestrator's own time, ``gap``."""

    def __init__(self, begin_ns: int) -> None:
        self._end_ns = begin_ns
        self._fresh: list[PhaseSpan] = []

    @property
    def end_ns(self) -> int:
        """End of the last span."""
        return self._end_ns

    def add(self, spans: Iterable[PhaseSpan], slack_ns: int = 0) -> None:
        """Append spans in order; a hole before one becomes ``gap``.

        Args:
            spans: In order of time.
            slack_ns: Spans that another host's clock stamped may seem to begin too early by so much.

        Raises:
            ValueError: A span begins before the timeline's end by more than that: an overlap would count joules twice.
        """
        for given in spans:
            span = given
            if 0 < self._end_ns - span.begin_ns <= slack_ns:
                span = replace(span, begin_ns=self._end_ns, end_ns=max(span.end_ns, self._end_ns))
            if span.begin_ns < self._end_ns:
                raise ValueError(f"{span.phase} begins {(self._end_ns - span.begin_ns) / 1e6:.3f} ms before the timeline's end")
            if span.begin_ns > self._end_ns:
                self._fresh.append(PhaseSpan(phase="gap", begin_ns=self._end_ns, end_ns=span.begin_ns))
            if span.end_ns > span.begin_ns:
                self._fresh.append(span)
            self._end_ns = max(self._end_ns, span.end_ns)

    def close_at(self, phase: Phase, end_ns: int, trial_id: str | None = None, attempt: int | None = None) -> None:
        """Cover everything from the timeline's end to ``end_ns`` with one span."""
        if end_ns > self._end_ns:
            self.add([PhaseSpan(phase=phase, begin_ns=self._end_ns, end_ns=end_ns, trial_id=trial_id, attempt=attempt)])

    def take(self) -> tuple[PhaseSpan, ...]:
        """The spans added since the last call."""
        fresh, self._fresh = tuple(self._fresh), []
        return fresh
