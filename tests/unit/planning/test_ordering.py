"""The order in which gangs start."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
from clusters import EXCLUSIVES, check_schedule, gang, room, sweeps
from hypothesis import given, settings
from hypothesis import strategies as st

from llem_ray.core.errors import PlacementError
from llem_ray.core.measure_spec import Exclusive
from llem_ray.planning import GangRequest, NodeRoom, lower_bound_s, order_requests, simulate
from llem_ray.planning import ordering as ordering_module

EIGHTS = [room(f"n{number}", 8) for number in range(4)]

SCRIPT = """
from llem_ray.planning import GangRequest, NodeRoom, order_requests
nodes = [NodeRoom(node=f"n{n}", gpus=8, free_gpus=8, gangs=0) for n in range(3)]
requests = [GangRequest(key=f"k{n}", gpus=1 << n % 4, duration_s=1.0 + n % 5) for n in range(40)]
print([request.key for request in order_requests(requests, nodes, "none", 3)])
"""


def keys(requests: tuple[GangRequest, ...]) -> list[str]:
    return [request.key for request in requests]


@settings(deadline=None, max_examples=50)
@given(sweep=sweeps(), exclusive=st.sampled_from(EXCLUSIVES), seed=st.integers(0, 9), shuffle=st.randoms(use_true_random=False))
def test_orders_are_whole_reproducible_and_never_beat_the_bound(
    sweep: tuple[tuple[NodeRoom, ...], list[GangRequest]], exclusive: Exclusive, seed: int, shuffle: random.Random
) -> None:
    nodes, requests = sweep
    order = order_requests(requests, nodes, exclusive, seed)
    assert sorted(keys(order)) == sorted(request.key for request in requests)
    schedule = simulate(order, nodes, exclusive)
    check_schedule(schedule, requests, nodes, exclusive)
    assert schedule.makespan_s >= lower_bound_s(requests, nodes, exclusive) * (1 - 1e-9)
    again, others = list(requests), list(nodes)
    shuffle.shuffle(again)
    shuffle.shuffle(others)
    assert order_requests(again, others, exclusive, seed) == order


def test_an_order_does_not_depend_on_hash_randomisation() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONHASHSEED": hash_seed}, stdout=subprocess.PIPE, check=True
        ).stdout
        for hash_seed in ("1", "2", "3")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("exclusive", EXCLUSIVES)
def test_what_costs_the_same_does_not_run_in_the_order_of_its_axis(exclusive: Exclusive) -> None:
    requests = [gang(8, key=f"axis-value-{number:02}") for number in range(40)]
    orders = [keys(order_requests(requests, EIGHTS, exclusive, seed)) for seed in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    # Over the seeds, early and late values come as early on the average: within 5 standard errors of the middle.
    error = 40 / 12**0.5 / 20**0.5
    for value in ("axis-value-00", "axis-value-20", "axis-value-39"):
        assert abs(sum(order.index(value) for order in orders) / 20 - 19.5) < 5 * error


def test_nothing_is_sorted_where_that_saves_no_time() -> None:
    requests = [gang(1, key=f"{number:02}", duration_s=1.0 + number) for number in range(30)]
    order = order_requests(requests, EIGHTS, "cluster", 0)
    assert keys(order) != [request.key for request in requests]
    assert keys(order) != [request.key for request in reversed(requests)]


def test_what_can_never_run_comes_last() -> None:
    requests = [gang(8, key="never", gpu_type="B200"), gang(8, key="a"), gang(32, 8, key="never too"), gang(1, key="b")]
    for nodes in (EIGHTS, []):
        order = keys(order_requests(requests, nodes, "node", 0))
        assert sorted(order) == ["a", "b", "never", "never too"]
    assert set(keys(order_requests(requests, EIGHTS, "node", 0))[2:]) == {"never", "never too"}
    with pytest.raises(PlacementError, match="load group never needs GPU type B200"):
        lower_bound_s(requests, EIGHTS, "node")


@pytest.mark.parametrize("exclusive", ["none", "node"])
def test_a_mixed_sweep_is_packed_within_a_tenth_of_the_bound(exclusive: Exclusive) -> None:
    rng = random.Random(7)
    requests = [
        gang(rng.choice([1, 2, 4, 8]), key=f"{number}", duration_s=min(max(rng.lognormvariate(7.3, 0.8), 300.0), 7200.0))
        for number in range(90)
    ]
    schedule = simulate(order_requests(requests, EIGHTS, exclusive, 0), EIGHTS, exclusive)
    assert schedule.makespan_s <= 1.1 * lower_bound_s(requests, EIGHTS, exclusive)


def test_the_longest_and_the_wide_gangs_are_not_left_to_the_end() -> None:
    requests = [*(gang(1, key=f"{n}") for n in range(64)), gang(1, key="long", duration_s=2.0), gang(16, 2, key="wide")]
    schedule = simulate(order_requests(requests, EIGHTS, "none", 0), EIGHTS, "none")
    assert schedule.makespan_s == lower_bound_s(requests, EIGHTS, "none") == 3.0


def test_a_sweep_too_large_to_simulate_is_ordered_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordering_module, "SIMULATED", 1)
    requests = [gang(1, key="a"), gang(4, key="b"), gang(1, key="c", duration_s=3.0)]
    assert keys(order_requests(requests, EIGHTS, "none", 0)) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("requests", "exclusive", "bound_s"),
    [
        ([], "node", 0.0),
        ([gang(1, key=f"{n}") for n in range(9)], "node", 3.0),
        ([gang(1, key=f"{n}") for n in range(33)], "none", 2.0),
        ([gang(5, key=f"{n}") for n in range(5)], "none", 2.0),
        ([gang(16, 2, key=f"{n}") for n in range(3)], "node", 2.0),
        ([gang(0, key=f"{n}") for n in range(9)], "none", 3.0),
        ([gang(1, key=f"{n}") for n in range(9)], "cluster", 9.0),
        ([gang(1, key="long", duration_s=50.0), gang(8, key="b")], "none", 50.0),
    ],
)
def test_lower_bound(requests: list[GangRequest], exclusive: Exclusive, bound_s: float) -> None:
    assert lower_bound_s(requests, EIGHTS, exclusive) == pytest.approx(bound_s)
