"""Offsets of hosts' clocks from exchanges whose truth is known."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llem_ray.core.units import NS_PER_S
from llem_ray.execution.clocks import ClockTable, Exchange

HOURS_NS = 7 * 3600 * NS_PER_S


def exchange(at_ns: int, there_ns: int, held_ns: int, back_ns: int, clock: Callable[[int], int]) -> Exchange:
    """A question sent at ``at_ns`` that takes ``there_ns``, is held for ``held_ns``, and answered after ``back_ns``."""
    received, replied = at_ns + there_ns, at_ns + there_ns + held_ns
    return Exchange(sent_ns=at_ns, received_ns=clock(received), replied_ns=clock(replied), answered_ns=replied + back_ns)


def table_of(clock: Callable[[int], int], seed: int, seconds: int = 30, probes: int = 4) -> ClockTable:
    """A table that has asked ``probes`` times a second; ways take 0.2 to 3 ms, there longer than back."""
    draw = random.Random(seed)
    table = ClockTable("own")
    for second in range(seconds):
        for probe in range(probes):
            at_ns = second * NS_PER_S + probe * 50_000_000
            ways = (round(200_000 + draw.expovariate(1 / 400_000)), round(150_000 + draw.expovariate(1 / 200_000)))
            table.add("far", exchange(at_ns, ways[0], draw.randrange(500_000), ways[1], clock))
    return table


@pytest.mark.parametrize("drift_ppm", [-100, -40, 0, 40, 100])
def test_the_truth_is_within_the_bound_and_the_bound_is_small(drift_ppm: int) -> None:
    def clock(at_ns: int) -> int:
        return at_ns + HOURS_NS + round(at_ns * drift_ppm / 1e6)

    for seed in range(20):
        table = table_of(clock, seed)
        for at_ns in range(0, 30 * NS_PER_S, 370_000_000):
            found = table.offset("far", at_ns)
            assert found is not None
            error_ns = abs(found.offset_ns - (clock(at_ns) - at_ns))
            assert error_ns <= found.delta_ns
            assert found.delta_ns < 600_000


@settings(max_examples=200)
@given(
    offset_ns=st.integers(-(10**15), 10**15),
    drift=st.floats(-150e-6, 150e-6),
    ways=st.lists(st.tuples(st.integers(0, 10**8), st.integers(0, 10**7), st.integers(0, 10**8)), min_size=1, max_size=20),
    ask_s=st.floats(-100, 200),
)
def test_no_exchange_however_slow_breaks_the_bound(
    offset_ns: int, drift: float, ways: list[tuple[int, int, int]], ask_s: float
) -> None:
    def clock(at_ns: int) -> int:
        return at_ns + offset_ns + round(at_ns * drift)

    table = ClockTable("own")
    for index, (there_ns, held_ns, back_ns) in enumerate(ways):
        table.add("far", exchange(index * NS_PER_S, there_ns, held_ns, back_ns, clock))
    at_ns = round(ask_s * NS_PER_S)
    found = table.offset("far", at_ns)
    assert found is not None
    assert abs(found.offset_ns - (clock(at_ns) - at_ns)) <= found.delta_ns + 2


def test_there_and_back_again() -> None:
    def clock(at_ns: int) -> int:
        return at_ns - HOURS_NS + round(at_ns * 40e-6)

    table = table_of(clock, seed=1)
    for at_ns in range(0, 30 * NS_PER_S, 910_000_000):
        there = table.to_host("far", at_ns)
        assert there is not None
        back = table.to_own("far", there)
        assert back is not None
        assert abs(back - at_ns) < 100_000


def test_our_own_clock_is_exact_and_a_stranger_s_unknown() -> None:
    table = ClockTable("own")
    found = table.offset("own", 5)
    assert found is not None
    assert (found.offset_ns, found.delta_ns) == (0, 0)
    assert table.to_own("own", 7) == 7
    assert table.offset("stranger", 5) is None
    assert table.to_host("stranger", 5) is None
    assert table.to_own("stranger", 5) is None


def test_a_silent_host_s_bound_grows_with_time() -> None:
    table = table_of(lambda at_ns: at_ns + HOURS_NS, seed=2, seconds=5)
    near, far = table.offset("far", 5 * NS_PER_S), table.offset("far", 305 * NS_PER_S)
    assert near is not None
    assert far is not None
    assert far.delta_ns > near.delta_ns + 50_000_000


def test_a_restarted_host_has_another_clock() -> None:
    table = table_of(lambda at_ns: at_ns + HOURS_NS, seed=3)
    table.forget("far")
    assert table.offset("far", 0) is None


def test_exchanges_that_contradict_each_other_widen_the_bound() -> None:
    table = ClockTable("own")
    for second, jump_ns in enumerate((0, 0, 5_000_000)):
        table.add("far", exchange(second * NS_PER_S, 100_000, 0, 100_000, lambda at_ns, by=jump_ns: at_ns + by))
    found = table.offset("far", 2 * NS_PER_S)
    assert found is not None
    assert found.delta_ns >= 2_000_000
