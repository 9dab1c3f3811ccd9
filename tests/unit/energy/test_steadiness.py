"""How steady power is: whole batches as stretches, and the counter at their edges."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from llem_ray.core.power import Calibration, Trace
from llem_ray.core.units import NS_PER_S
from llem_ray.energy.steadiness import cut_pieces, piece_power_w, settle_s, variation
from llem_ray.testing.loads import ConstantLoad, PrefillDecodeLoad, SegmentLoad

TICK_S, POLL_S = 0.1, 0.05
CALIBRATION = Calibration(device_uuid="G", tick_period_s=TICK_S, has_instant=True, has_average=True, lag_s=0.0, call_s=1e-4)


def test_stretches_are_whole_batches_from_the_end() -> None:
    edges_ns = [round(t * NS_PER_S) for t in (0, 0.7, 1.4, 2.1, 2.8, 3.5, 4.2)]
    found = cut_pieces(edges_ns, 2, 1.0)
    assert found is not None
    assert (found / NS_PER_S).tolist() == [1.4, 2.8, 4.2]
    assert cut_pieces(edges_ns, 4, 1.0) is None
    assert cut_pieces([], 1, 1.0) is None


def test_variation_by_hand() -> None:
    """1, 2, 3: mean 2, standard deviation sqrt(2/3)."""
    assert variation([1.0, 2.0, 3.0]) == pytest.approx((2 / 3) ** 0.5 / 2)
    assert variation([0.0, 0.0]) is None


def sampled(load: SegmentLoad, until_s: float, phase_s: float, *, counter: bool = True) -> Trace:
    """What a sampler reads of a counter that ticks every 100 ms, and of power averaged over 25 ms before each tick."""
    t_s = np.arange(0.011, until_s, POLL_S)
    tick_s = np.floor((t_s - phase_s) / TICK_S) * TICK_S + phase_s
    energy_mj = np.floor(load.cumulative_j(tick_s) * 1e3) + 5e9
    power_mw = (load.cumulative_j(tick_s) - load.cumulative_j(tick_s - 0.025)) / 0.025 * 1e3
    return Trace(
        device_uuid="G",
        t_ns=(t_s * NS_PER_S).astype(np.int64),
        hw_ns=np.full(len(t_s), 20_000),
        power_mw=power_mw,
        power_avg_mw=np.full(len(t_s), np.nan),
        energy_mj=energy_mj if counter else np.full(len(t_s), np.nan),
    )


@pytest.mark.parametrize(
    "load", [ConstantLoad(1.0, 30.0), PrefillDecodeLoad(1.0, 30.0, seed=1)], ids=["constant", "prefill/decode"]
)
@pytest.mark.parametrize("phase_s", [0.0, 0.03, 0.08])
def test_power_by_the_counter_is_true_within_two_percent(load: SegmentLoad, phase_s: float) -> None:
    """The readings' own staircase is off by a tick at each edge: 10 % of a stretch of 1 s."""
    edges_s = [5.07, 6.09, 7.2, 8.23, 9.4]
    edges_ns = np.array([round(t * NS_PER_S) for t in edges_s])
    last_s = edges_s[-1] + settle_s(CALIBRATION, POLL_S)
    found = piece_power_w(CALIBRATION, sampled(load, last_s, phase_s), edges_ns, POLL_S)
    true_w = [load.energy_j(a, b) / (b - a) for a, b in pairwise(edges_s)]
    assert found is not None
    assert found.tolist() == pytest.approx(true_w, rel=0.02)


def test_without_a_counter_it_is_the_mean_of_the_readings() -> None:
    edges_ns = np.array([2, 3, 4]) * NS_PER_S
    found = piece_power_w(CALIBRATION, sampled(ConstantLoad(1.0, 30.0), 5.0, 0.0, counter=False), edges_ns, POLL_S)
    assert found is not None
    assert found.tolist() == pytest.approx([400.0, 400.0])


def test_a_counter_that_was_reset_or_ends_too_early_gives_nothing() -> None:
    trace = sampled(ConstantLoad(1.0, 30.0), 5.0, 0.0)
    assert piece_power_w(CALIBRATION, trace, np.array([2, 3, 6]) * NS_PER_S, POLL_S) is None
    trace.energy_mj[60:] -= 4e9
    assert piece_power_w(CALIBRATION, trace, np.array([2, 3, 4]) * NS_PER_S, POLL_S) is None
