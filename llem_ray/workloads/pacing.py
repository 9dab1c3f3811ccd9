"""How well a load was kept: when requests were sent against when they were due, and how fast they were answered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llem_ray.core.backend import RequestRecord
from llem_ray.core.units import NS_PER_S
from llem_ray.workloads.latency import Distribution, distribution


@dataclass(frozen=True, kw_only=True, slots=True)
class Pacing:
    """Rates in 1/s, each (n - 1) over the time from the first to the last; None for fewer than two.

    They are those of conversations, by their first requests and their last answers; a request without turns is one.
    """

    asked_rate_per_s: float | None
    """By the times the schedule wanted."""
    sent_rate_per_s: float | None
    achieved_rate_per_s: float | None
    """Of answers. From the first to the last one, so that neither the wait for the first nor the end of a run counts: an engine
    that keeps up answers at the rate it is asked at, however long each answer takes."""
    error_s: Distribution | None
    """Sent less scheduled, s, of every request."""


def pacing(records: Sequence[RequestRecord]) -> Pacing:
    """The pace of a run, over all its requests."""
    first = [record for record in records if not record.turn]
    return Pacing(
        asked_rate_per_s=_rate(record.scheduled_ns for record in first),
        sent_rate_per_s=_rate(record.sent_ns for record in first),
        achieved_rate_per_s=_rate(record.token_times_ns[-1] for record in records if record.token_times_ns and record.last_turn),
        error_s=distribution((record.sent_ns - record.scheduled_ns) / NS_PER_S for record in records),
    )


def _rate(stamps_ns: Iterable[int]) -> float | None:
    stamps = sorted(stamps_ns)
    if len(stamps) < 2 or stamps[-1] == stamps[0]:
        return None
    return (len(stamps) - 1) * NS_PER_S / (stamps[-1] - stamps[0])
