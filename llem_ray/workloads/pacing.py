"""How well a load was kept: when requests were sent against when they were due, and how fast they were answered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llem_ray.core.backend import RequestRecord
from llem_ray.core.units import NS_PER_S
from llem_ray.workloads.latency import Distribution, distribution


@dataclass(frozen=True, kw_only=True, slots=True)
class Pacing:
    """Rates in 1/s; None for fewer than two.

    They are those of conversations, by their first requests and their last answers; a request without turns is one.
    """

    asked_rate_per_s: float | None
    """By the times the schedule wanted: (n - 1) over the time from the first to the last."""
    sent_rate_per_s: float | None
    """The same of the times of sending."""
    achieved_rate_per_s: float | None
    """Of answers: the asked rate x the time in which the middle half of them was due over that in which it came, x the share of
    requests that were answered. An engine that keeps up answers at the rate it is asked at, however long each answer takes; a
    few long ones at the end of a run do not change that. Of requests that were due at once: as the others."""
    error_s: Distribution | None
    """Sent less scheduled, s, of every request."""


def pacing(records: Sequence[RequestRecord]) -> Pacing:
    """The pace of a run, over all its requests."""
    first = [record for record in records if not record.turn]
    answered = [record for record in records if record.last_turn and record.token_times_ns]
    begun_ns = {record.conversation: record.scheduled_ns for record in first if record.turn is not None}
    due_ns = [record.scheduled_ns if record.turn is None else begun_ns[record.conversation] for record in answered]
    came_ns = [record.token_times_ns[-1] for record in answered]
    asked_rate_per_s = _rate(record.scheduled_ns for record in first)
    return Pacing(
        asked_rate_per_s=asked_rate_per_s,
        sent_rate_per_s=_rate(record.sent_ns for record in first),
        achieved_rate_per_s=_achieved_rate(asked_rate_per_s, due_ns, came_ns, len(answered) / max(1, len(first))),
        error_s=distribution((record.sent_ns - record.scheduled_ns) / NS_PER_S for record in records),
    )


def _achieved_rate(
    asked_rate_per_s: float | None, due_ns: Sequence[int], came_ns: Sequence[int], share_answered: float
) -> float | None:
    was_due_ns, came_within_ns = _middle_half_ns(due_ns), _middle_half_ns(came_ns)
    if asked_rate_per_s is None or not was_due_ns:
        return _rate(came_ns)
    return asked_rate_per_s * share_answered * was_due_ns / came_within_ns if came_within_ns else None


def _middle_half_ns(stamps_ns: Sequence[int]) -> float:
    """Time between the quartiles, ns; 0 without any."""
    if not stamps_ns:
        return 0.0
    first, third = np.percentile(np.asarray(stamps_ns, np.int64) - min(stamps_ns), [25, 75])
    return float(third - first)


def _rate(stamps_ns: Iterable[int]) -> float | None:
    stamps = sorted(stamps_ns)
    if len(stamps) < 2 or stamps[-1] == stamps[0]:
        return None
    return (len(stamps) - 1) * NS_PER_S / (stamps[-1] - stamps[0])
