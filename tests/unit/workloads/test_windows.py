"""Windows of online runs against times worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted import answered, pairs

from llem_ray.core.backend import RequestRecord
from llem_ray.core.measure_spec import WindowSpec
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.core.workload_spec import LoadSpec
from llem_ray.workloads.pacing import pacing
from llem_ray.workloads.windows import Chosen, choose_window, count_all, count_inside, inside, realised_concurrency, steady_state

SATURATED = LoadSpec(pattern="saturated")
POISSON = LoadSpec(pattern="poisson", rate_per_s=1.0)


def chosen(window: WindowSpec, load: LoadSpec = SATURATED, *, end_s: float = 10.5, min_window_s: float = 1.0) -> Chosen:
    return choose_window(pairs(), 0, ns_from_s(end_s), window, load, min_window_s)


def test_the_steady_state_is_where_the_rule_of_ml_energy_puts_it() -> None:
    """N = 10, B = 2: the second first token comes at 1 s; N - B - 1 = 7 have finished at 8 s, when the fourth pair ends."""
    window = chosen(WindowSpec())
    assert (window.begin_ns, window.end_ns) == (1 * NS_PER_S, 8 * NS_PER_S)
    assert (window.rule, window.concurrency, window.missed) == ("steady_state", 2, None)


def test_tokens_and_requests_of_a_window_are_those_delivered_in_it() -> None:
    """In (1, 8] s: of the first pair its second tokens, of pairs 2 to 4 all: 2 + 12. First tokens of 6, ends of 8 requests."""
    counts = count_inside(pairs(), 1 * NS_PER_S, 8 * NS_PER_S)
    assert (counts.output_tokens, counts.requests, counts.succeeded) == (14, 8, 8)
    assert (counts.prompt_tokens, counts.padded_tokens) == (60, 60)
    assert [record.request_id for record in inside(pairs(), 1 * NS_PER_S, 8 * NS_PER_S)] == [f"0-{i}" for i in range(8)]


def test_a_window_that_holds_everything_counts_everything() -> None:
    assert count_inside(pairs(), 0, 11 * NS_PER_S) == count_all(pairs())


def test_requests_that_wait_in_the_engine_are_not_realised_concurrency() -> None:
    assert realised_concurrency(pairs()) == 2  # all ten were sent at once


def test_one_that_ends_and_one_that_begins_with_the_same_step_ran_together() -> None:
    assert realised_concurrency([answered(0, [1.0, 2.0]), answered(1, [2.0, 3.0]), answered(2, [3.5])]) == 2


@pytest.mark.parametrize(("requests", "found"), [(5, None), (6, (1.0, 4.0))])
def test_a_steady_state_takes_more_than_2b_plus_1_requests(requests: int, found: tuple[float, float] | None) -> None:
    """With N = 6, B = 2: N - B - 1 = 3 have finished at 4 s, when the second pair ends."""
    window = steady_state(pairs()[:requests], 2)
    assert window == (None if found is None else tuple(ns_from_s(at_s) for at_s in found))


def test_too_few_requests_leave_the_whole_run_and_say_why() -> None:
    window = choose_window(pairs()[:4], 0, 5 * NS_PER_S, WindowSpec(), SATURATED, 1.0)
    assert (window.begin_ns, window.end_ns) == (0, 5 * NS_PER_S)
    assert window.missed is not None
    assert "4 requests succeeded with B = 2 at once; it takes more than 2 B + 1 = 5, better 4 B = 8" in window.missed


def test_a_steady_state_shorter_than_the_minimum_is_none() -> None:
    missed = chosen(WindowSpec(), min_window_s=7.5).missed
    assert missed == "the steady state lasted 7.000 s, measure.min_window_s is 7.5 s"


def test_failed_requests_do_not_make_a_steady_state() -> None:
    failed = [answered(i, [], sent_s=0.0, finish_reason="abort") for i in range(20)]
    assert steady_state([*pairs()[:5], *failed], 2) is None


@pytest.mark.parametrize("window", [(0, 10), (2, 6)])
def test_the_prompt_of_a_request_that_gave_nothing_counts_where_it_was_sent(window: tuple[int, int]) -> None:
    """Its energy was spent. One that failed after a token counts at that token."""
    records = [
        answered(0, [3.0, 4.0], prompt_tokens=10),
        answered(1, [], sent_s=5.0, prompt_tokens=7, finish_reason="abort"),
        answered(2, [3.5], prompt_tokens=5, finish_reason="abort"),
        answered(3, [], sent_s=9.0, prompt_tokens=3, finish_reason="abort"),
    ]
    counts = count_inside(records, window[0] * NS_PER_S, window[1] * NS_PER_S)
    last = 3 if window[1] == 10 else 0
    assert (counts.prompt_tokens, counts.failed_prompt_tokens) == (22 + last, 12 + last)
    assert (counts.requests, counts.succeeded) == (4 if last else 3, 1)
    if last:
        assert counts == count_all(records)


def test_shared_tokens_are_summed_where_all_are_known() -> None:
    known = [replace(record, shared_prompt_tokens=4) for record in pairs()]
    assert count_inside(known, 1 * NS_PER_S, 8 * NS_PER_S).shared_prompt_tokens == 24
    assert count_inside([*known, *pairs()], 1 * NS_PER_S, 8 * NS_PER_S).shared_prompt_tokens is None


def talks(count: int, turns: int) -> list[RequestRecord]:
    """Two conversations at once, each turn 1 s after the one before; the first token comes after half of it."""
    records = []
    for number in range(count):
        for turn in range(turns):
            at_s = number // 2 * turns + turn
            record = answered(f"{number}-{turn}", [at_s + 0.5, at_s + 1.0], sent_s=at_s)
            records.append(replace(record, conversation=number, turn=turn, last_turn=turn == turns - 1))
    return records


def test_a_steady_state_of_conversations_ends_where_none_takes_the_place_of_one_that_ended() -> None:
    """N = 6, B = 2: N - B - 1 = 3 conversations of 3 turns have ended at 6 s, with the second pair."""
    assert steady_state(talks(6, 3), 2) == (ns_from_s(0.5), ns_from_s(6.0))
    assert steady_state(talks(5, 3), 2) is None
    missed = choose_window(talks(4, 3), 0, 7 * NS_PER_S, WindowSpec(), SATURATED, 1.0).missed
    assert missed is not None
    assert "4 conversations succeeded with B = 2 at once" in missed


def test_the_pace_is_that_of_conversations() -> None:
    """A pair begins every 3 s from 0 on and one ends every 3 s: 5 gaps in 6 s. Later turns are late or not on their own."""
    late = [replace(record, sent_ns=record.scheduled_ns + NS_PER_S // 10) if record.turn else record for record in talks(6, 3)]
    kept = pacing(late)
    assert kept.asked_rate_per_s == kept.sent_rate_per_s == kept.achieved_rate_per_s == pytest.approx(5 / 6)
    assert kept.error_s is not None
    assert (kept.error_s.count, kept.error_s.min, kept.error_s.max) == (18, 0.0, pytest.approx(0.1))


def test_an_interval_is_where_it_was_asked_for() -> None:
    window = chosen(WindowSpec(rule="interval", start_s=2.5, length_s=4.0), POISSON)
    assert (window.begin_ns, window.end_ns, window.missed) == (ns_from_s(2.5), ns_from_s(6.5), None)


def test_a_run_that_ends_before_the_interval_does() -> None:
    window = chosen(WindowSpec(rule="interval", start_s=8.0, length_s=4.0), POISSON)
    assert window.missed == "the run ended after 10.500 s, the interval ends at 12 s"
    assert (window.begin_ns, window.end_ns) == (0, ns_from_s(10.5))


@pytest.mark.parametrize(("end_s", "kept"), [(599.0, False), (600.0, True)])
def test_mlperf_asks_for_ten_minutes(end_s: float, kept: bool) -> None:
    window = chosen(WindowSpec(rule="mlperf"), POISSON, end_s=end_s)
    assert (window.missed is None) == kept
    assert window.end_ns == ns_from_s(end_s)


@pytest.mark.parametrize(("pattern", "rule"), [("saturated", "steady_state"), ("closed", "total"), ("poisson", "total")])
def test_what_auto_stands_for(pattern: str, rule: str) -> None:
    assert WindowSpec().resolved(LoadSpec(pattern=pattern)) == rule  # type: ignore[arg-type]
