from dataclasses import replace

import numpy as np
import pytest

from llem_ray.core.energy import Baseline
from llem_ray.energy.idle import NetEnergy, effective_count, idle_baseline, net_energy, sum_net
from llem_ray.testing.loads import Segment, SegmentLoad
from llem_ray.testing.sensor import SensorModel


def flat(begin, end):
    return SegmentLoad([Segment(begin, 90.0)])


def drifting(begin, end):
    return SegmentLoad([Segment(begin, 90.0, "linear"), Segment(end, 100.0)])


def wandering(begin, end):
    rng = np.random.default_rng(int(begin * 1e6) % 2**31)
    power, segments = 90.0, []
    for t in np.arange(begin - 3, end + 3, 0.05):
        power = 90 + 0.97 * (power - 90) + rng.normal(0, 2)
        segments.append(Segment(float(t), power))
    return SegmentLoad(segments)


def baseline(one, trace=None, **changes):
    return idle_baseline(
        **{
            "device": one.device,
            "calibration": one.model.calibration(one.device.uuid),
            "trace": one.trace if trace is None else trace,
            "window": one.window,
            "sample_period_s": one.model.poll_s,
            "kind": "bare",
            **changes,
        }
    )


def test_a_steady_baseline_is_sharp(case):
    one = case(flat, 10.0)
    result = baseline(one)
    assert result.power_w == pytest.approx(90.0, abs=0.05)
    assert result.u_w < 0.2
    assert (result.kind, result.begin_ns, result.end_ns) == ("bare", one.window.begin_ns, one.window.end_ns)


def test_without_a_counter_power_readings_serve(case):
    one = case(flat, 10.0)
    result = baseline(one, replace(one.trace, energy_mj=one.trace.energy_mj * np.nan))
    assert result.power_w == pytest.approx(90.0, abs=0.05)


def test_a_counter_alone_serves(case):
    one = case(wandering, 10.0, model=SensorModel(tick_s=0.001, power_tick_s=None))
    result = baseline(one)
    assert result.power_w == pytest.approx(one.true_j / 10, abs=0.05)
    assert result.u_w > 0.3


def test_drift_is_half_its_size(case):
    result = baseline(case(drifting, 10.0))
    assert result.power_w == pytest.approx(95.0, abs=0.1)
    assert result.u_w == pytest.approx(5.0, rel=0.1)


def test_no_samples_is_a_reason(case):
    one = case(flat, 10.0)
    result = baseline(one, one.trace.between(0, 1))
    assert (result.power_w, result.u_w) == (None, None)
    assert result.reason == "no samples"


def test_an_invalid_stretch_is_no_baseline(case):
    one = case(flat, 10.0, model=SensorModel(drop=0.5))
    result = baseline(one)
    assert result.power_w is None
    assert "dropped_samples" in result.reason


def test_effective_count():
    rng = np.random.default_rng(0)
    white = rng.normal(size=4000)
    assert effective_count(white) == pytest.approx(4000, rel=0.15)
    correlated = np.zeros(20_000)
    for i in range(1, len(correlated)):
        correlated[i] = 0.9 * correlated[i - 1] + rng.normal()
    assert effective_count(correlated) == pytest.approx(20_000 * (1 - 0.9) / (1 + 0.9), rel=0.3)
    assert effective_count(np.full(10, 3.0)) == 10
    assert effective_count(np.array([1.0])) == 1


def make_baseline(power_w, u_w, **changes):
    whole = Baseline(device_uuid="GPU-sim", kind="bare", power_w=power_w, u_w=u_w, begin_ns=0, end_ns=1)
    return replace(whole, **changes)


def test_net_is_signed(case):
    one = case(flat, 10.0)
    reading = one.read()
    net = net_energy(reading, make_baseline(100.0, 0.5), one.window)
    assert net.energy_j == pytest.approx(-100.0, abs=1.0)
    assert net.u_j == pytest.approx(np.hypot(reading.u_j, 5.0))


def test_net_needs_a_baseline_of_its_own_device(case):
    one = case(flat, 10.0)
    reading = one.read()
    assert net_energy(reading, None, one.window).reason == "no idle baseline was taken"
    assert "no samples" in net_energy(reading, make_baseline(None, None, reason="no samples"), one.window).reason
    gone = replace(reading, energy_j=None, reason="masked")
    assert net_energy(gone, make_baseline(90.0, 0.1), one.window).reason == "masked"
    with pytest.raises(ValueError, match="does not belong"):
        net_energy(reading, make_baseline(90.0, 0.1, device_uuid="GPU-x"), one.window)


def test_sum_of_net():
    one, other = NetEnergy(10.0, 5.0, idle_u_j=3.0), NetEnergy(-4.0, 8.0, idle_u_j=4.0)
    total = sum_net([one, other], 12.0)
    assert (total.energy_j, total.u_j, total.idle_u_j) == (6.0, 13.0, 5.0)
    assert sum_net([one, other], None).u_j is None
    assert sum_net([one, NetEnergy(10.0, None)], 12.0) == NetEnergy(20.0, None)
    assert sum_net([one, NetEnergy(None, None, "why")], 12.0).reason == "why"
    assert sum_net([], None).energy_j is None
