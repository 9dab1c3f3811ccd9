"""Energy of devices outside a gang, by plain counter difference."""

from __future__ import annotations

import numpy as np
import pytest

from llem_ray.core.power import Trace
from llem_ray.execution.completeness import counter_difference_j

S = 10**9
FAR_NS = 90_000 * S
"""A clock that has run for long: nanoseconds there do not fit into a float."""


def trace(t_s: list[float], energy_j: list[float], begin_ns: int = FAR_NS) -> Trace:
    missing = np.full(len(t_s), np.nan)
    return Trace(
        device_uuid="GPU-0",
        t_ns=begin_ns + np.array([round(t * S) for t in t_s], dtype=np.int64),
        hw_ns=np.zeros(len(t_s), dtype=np.int64),
        power_mw=missing,
        power_avg_mw=missing,
        energy_mj=np.array(energy_j, dtype=np.float64) * 1e3,
    )


def between(readings: Trace, begin_s: float, end_s: float) -> float | None:
    return counter_difference_j(readings, FAR_NS + round(begin_s * S), FAR_NS + round(end_s * S))


def test_edges_between_readings_are_interpolated() -> None:
    readings = trace([0, 1, 2, 3], [0, 100, 300, 400])
    assert between(readings, 1, 2) == pytest.approx(200)
    assert between(readings, 0.5, 2.25) == pytest.approx(325 - 50)


def test_readings_that_are_missing_are_bridged() -> None:
    nan = float("nan")
    assert between(trace([0, 1, 2, 3], [0, nan, nan, 300]), 1, 2) == pytest.approx(100)


@pytest.mark.parametrize(
    ("t_s", "energy_j"),
    [
        ([], []),
        ([0], [0]),
        ([1.1, 2, 3], [0, 100, 200]),
        ([0, 1, 1.9], [0, 100, 200]),
        ([0, 1, 2, 3], [0, 100, 50, 150]),
        ([0, 1, 2, 3], [float("nan")] * 4),
    ],
    ids=["no reading", "one reading", "begins within", "ends within", "runs backwards", "no counter"],
)
def test_what_was_not_seen_wholly_is_not_known(t_s: list[float], energy_j: list[float]) -> None:
    assert between(trace(t_s, energy_j), 1, 2) is None


def test_a_counter_that_stands_still_gave_no_energy() -> None:
    """A device that is off is measured: 0 J, and not nothing."""
    assert between(trace([0, 1, 2, 3], [7, 7, 7, 7]), 1, 2) == 0.0
