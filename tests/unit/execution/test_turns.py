"""Hosts are accounted for one after the other."""

from __future__ import annotations

import pytest

from llem_ray.core.units import NS_PER_S
from llem_ray.execution.turns import Turns


@pytest.mark.parametrize("n", [1, 3, 10, 1000])
def test_everybody_has_one_turn_in_a_period_wherever_it_begins(n: int) -> None:
    begin_ns = 12_345_678_901
    turns, items = Turns(20.0, begin_ns), list(range(n))
    taken = [item for step in range(1, 41) for item in turns.take(items, begin_ns + step * NS_PER_S // 2)]
    assert sorted(taken) == items


def test_turns_are_spread_evenly() -> None:
    turns, items = Turns(20.0, 0), list(range(1000))
    assert {len(turns.take(items, step * NS_PER_S)) for step in range(1, 100)} == {50}


def test_after_a_long_absence_nobody_has_two() -> None:
    turns, items = Turns(20.0, 0), list(range(7))
    assert sorted(turns.take(items, 1000 * NS_PER_S)) == items
    assert turns.take(items, 1000 * NS_PER_S) == []


def test_none_before_the_begin_and_none_of_nobody() -> None:
    turns = Turns(20.0, 100 * NS_PER_S)
    assert turns.take([1, 2], 99 * NS_PER_S) == []
    assert turns.take([], 200 * NS_PER_S) == []
