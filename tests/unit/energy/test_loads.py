import numpy as np
import pytest

from llem_ray.testing.loads import RestlessLoad, Segment, SegmentLoad, six_loads
from llem_ray.testing.sensor import SensorModel, simulate_trace

LOADS = {**six_loads(10.0, 12.3, seed=3), "restless": RestlessLoad(10.0, 12.3, seed=3)}


@pytest.mark.parametrize("name", LOADS)
def test_energy_is_the_integral_of_power(name):
    load = LOADS[name]
    edges = np.linspace(8.0, 14.0, 600_001)
    middles = (edges[1:] + edges[:-1]) / 2
    numeric = float(load.power_w(middles).sum() * 1e-5)
    assert load.energy_j(8.0, 14.0) == pytest.approx(numeric, rel=2e-5)


@pytest.mark.parametrize("name", LOADS)
def test_segments_rebuild_the_load(name):
    load = LOADS[name]
    segments = load.segments(9.1, 13.7)
    assert segments[0].t_s == 9.1
    assert segments[-1].t_s == 13.7
    rebuilt = SegmentLoad(segments)
    for t0, t1 in ((9.1, 13.7), (9.95, 10.05), (12.25, 12.45), (11.0, 11.1)):
        assert rebuilt.energy_j(t0, t1) == pytest.approx(load.energy_j(t0, t1), abs=1e-9)


def test_a_cut_through_a_ramp_keeps_its_slope():
    ramp = SegmentLoad([Segment(0.0, 100.0, "linear"), Segment(1.0, 300.0)])
    cut = ramp.segments(0.25, 0.75)
    assert [(s.t_s, s.power_w, s.kind) for s in cut] == [(0.25, 150.0, "linear"), (0.75, 250.0, "step")]


def test_idle_outside_and_steps_at_the_edges():
    for name in ("constant", "prefill_decode", "poisson_bursts", "locked_square"):
        before, after = LOADS[name].power_w(np.array([10.0 - 1e-9, 12.3]))
        assert (before, after) == (90.0, 90.0)


def test_segments_must_ascend():
    with pytest.raises(ValueError, match="ascending"):
        SegmentLoad([Segment(1.0, 5.0), Segment(1.0, 6.0)])
    with pytest.raises(ValueError, match="needs segments"):
        SegmentLoad([])


def test_the_simulated_counter_ticks_and_never_leads():
    load = LOADS["constant"]
    trace = simulate_trace(load, 8.0, 14.0, seed=1, model=SensorModel(base_mj=0.0))
    true_mj = load.cumulative_j(trace.t_ns / 1e9) * 1e3
    assert np.all(trace.energy_mj <= true_mj + 650)
    assert np.all(true_mj - trace.energy_mj <= 0.1 * 400e3 + 1 + 650)
    changes = np.count_nonzero(np.diff(trace.energy_mj))
    assert abs(changes - 60) <= 2
