"""Time from the start of the command to the first token of a loaded model, part by part: a row of ``loads``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llem_ray.core.backend import LoadReport
from llem_ray.core.energy import PhaseSpan
from llem_ray.core.outcome import Completed, Failed
from llem_ray.core.units import s_from_ns
from llem_ray.results.rows import engine_version

if TYPE_CHECKING:
    from llem_ray.execution.records import AttemptEnded

_MARKED = ("startup_s", "queue_s", "place_s", "bare_idle_s", "load_s", "resident_idle_s", "prepare_s")
_REPORTED = ("process_start_s", "import_s", "construct_s", "compile_s", "warm_s")


@dataclass(slots=True, kw_only=True)
class LoadMarks:
    """How far a load and the first attempt on it have come. Times are ns of the run driver's clock; None: not so far."""

    submitted_ns: int | None = None
    """Start of the command."""
    ready_ns: int | None = None
    """Cluster and samplers were there, engines checked: gangs may be placed from here on."""
    opened_ns: int | None = None
    """The gang was asked for."""
    placed_ns: int | None = None
    """Its processes ran."""
    load_begin_ns: int | None = None
    load_end_ns: int | None = None
    ordered_ns: int | None = None
    """The first attempt was sent to the engine."""
    begun_ns: int | None = None
    """It began there."""
    first: tuple[str, int] | None = None
    """Trial and attempt; also of a load that failed."""

    def note_order(self, now_ns: int) -> None:
        """An attempt is sent to the engine."""
        if self.ordered_ns is None:
            self.ordered_ns = now_ns

    def note_attempt(self, trial_id: str, attempt: int, spans: Sequence[PhaseSpan]) -> None:
        """An attempt has ended; its spans on the run driver's clock."""
        if self.first is None:
            self.first, self.begun_ns = (trial_id, attempt), spans[0].begin_ns if spans else None

    def parts_s(self) -> dict[str, float | None]:
        """Time between each mark and the next. Another host's clock may be off by its bound, so none is negative."""
        marks = (
            self.submitted_ns,
            self.ready_ns,
            self.opened_ns,
            self.placed_ns,
            self.load_begin_ns,
            self.load_end_ns,
            self.ordered_ns,
            self.begun_ns,
        )
        pairs = zip(_MARKED, marks, marks[1:], strict=False)
        return {part: None if a is None or b is None else max(0.0, s_from_ns(b - a)) for part, a, b in pairs}


def load_row(ended: AttemptEnded) -> dict[str, Any] | None:
    """The ``loads`` row of the load that this attempt is the first on; None for any other attempt."""
    gang = ended.gang
    if gang is None or gang.marks.first != (ended.trial.trial_id, ended.attempt):
        return None
    marks = gang.marks
    report = gang.loaded.report if gang.loaded is not None else None
    parts = marks.parts_s() | _within_load_s(marks, report) | _within_trial_s(ended.outcome)
    total = [value for part, value in parts.items() if part != "load_s"]
    known = report is not None and parts["prepare_s"] is not None and parts["first_token_s"] is not None
    return {
        "gang": gang.name,
        "load_key": ended.group.load_key,
        "backend": ended.group.experiment.engine.backend,
        "engine_version": None if report is None else engine_version(report),
        "host": gang.lead.hostname,
        "trial_id": ended.trial.trial_id,
        "attempt": ended.attempt,
        **parts,
        "submit_to_first_token_s": sum(value or 0.0 for value in total) if known else None,
        "reason": None if known else _reason(ended.outcome),
    }


def _within_load_s(marks: LoadMarks, report: LoadReport | None) -> dict[str, float | None]:
    """What the engine told of its load, and what is left of it."""
    if report is None or marks.load_begin_ns is None or marks.load_end_ns is None:
        return dict.fromkeys((*_REPORTED, "load_rest_s"))
    told: dict[str, float | None] = {part: getattr(report, part) for part in _REPORTED}
    whole_s = s_from_ns(marks.load_end_ns - marks.load_begin_ns)
    return {**told, "load_rest_s": whole_s - sum(value or 0.0 for value in told.values())}


def _within_trial_s(outcome: Completed | Failed) -> dict[str, float | None]:
    """From the begin of the first attempt to its first token, all on the clock of the engine's host."""
    firsts = [record.token_times_ns[0] for record in getattr(outcome, "requests", ()) if record.token_times_ns]
    if isinstance(outcome, Failed) or not firsts:
        return dict.fromkeys(("warmup_s", "guard_s", "first_token_s"))
    begin_ns = next((span.begin_ns for span in outcome.spans if span.phase == "measured"), outcome.window.begin_ns)
    before = [span for span in outcome.spans if span.end_ns <= begin_ns]
    warmup_ns = sum(span.end_ns - span.begin_ns for span in before if span.phase == "warmup")
    guard_ns = sum(span.end_ns - span.begin_ns for span in before if span.phase != "warmup")
    return {
        "warmup_s": s_from_ns(warmup_ns),
        "guard_s": s_from_ns(guard_ns),
        "first_token_s": s_from_ns(min(firsts) - begin_ns),
    }


def _reason(outcome: Completed | Failed) -> str:
    if isinstance(outcome, Failed):
        return f"{outcome.kind}: {outcome.message}"
    return "no request of the first window has a token, or the clock of the engine's host is not known"
