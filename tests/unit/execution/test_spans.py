"""Spans adjoin, holes become gap, overlaps are refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llem_ray.core.energy import PhaseSpan
from llem_ray.energy.ledger import check_tiling
from llem_ray.execution.spans import SpanLog, Timeline
from llem_ray.testing.clock import VirtualClock


def span(begin_ns: int, end_ns: int) -> PhaseSpan:
    return PhaseSpan(phase="measured", begin_ns=begin_ns, end_ns=end_ns)


def test_entering_a_phase_ends_the_one_before() -> None:
    clock = VirtualClock(1000)
    log = SpanLog(clock, "t-r0", 2)
    assert log.enter("warmup") == 1000
    clock.advance_ns(5)
    log.enter("guard")
    assert log.phase == "guard"
    clock.advance_ns(7)
    spans = log.finish()
    assert [(s.phase, s.begin_ns, s.end_ns, s.trial_id, s.attempt) for s in spans] == [
        ("warmup", 1000, 1005, "t-r0", 2),
        ("guard", 1005, 1012, "t-r0", 2),
    ]
    assert log.phase is None


def test_a_phase_of_no_length_leaves_no_span() -> None:
    log = SpanLog(VirtualClock(1000))
    log.enter("warmup")
    log.enter("guard")
    assert log.finish() == ()


def test_hole_becomes_gap() -> None:
    timeline = Timeline(100)
    timeline.add([span(130, 150)])
    assert [(s.phase, s.begin_ns, s.end_ns) for s in timeline.take()] == [("gap", 100, 130), ("measured", 130, 150)]
    assert timeline.take() == ()


def test_overlap_is_refused() -> None:
    timeline = Timeline(100)
    timeline.add([span(100, 150)])
    with pytest.raises(ValueError, match="before the timeline's end"):
        timeline.add([span(149, 160)])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=30), st.integers(0, 100))
def test_whatever_is_added_the_timeline_tiles(pieces: list[tuple[int, int]], last: int) -> None:
    timeline, at_ns, taken = Timeline(1000), 1000, []
    for hole_ns, length_ns in pieces:
        timeline.add([span(at_ns + hole_ns, at_ns + hole_ns + length_ns)])
        at_ns += hole_ns + length_ns
        taken += timeline.take()
    timeline.close_at("shutdown", at_ns + last)
    taken += timeline.take()
    check_tiling(taken, 1000, timeline.end_ns)
    assert timeline.end_ns == at_ns + last
    assert all(a.end_ns == b.begin_ns for a, b in pairwise(taken))
