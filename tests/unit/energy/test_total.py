from dataclasses import replace

import numpy as np
import pytest

from llem_ray.core.energy import EnergyReading
from llem_ray.energy.total import sum_readings
from llem_ray.energy.validity import flag
from llem_ray.testing.loads import ConstantLoad


def reading(node="n1", uuid="GPU-a", energy_j=100.0, u_j=3.0, **changes):
    whole = EnergyReading(
        node=node,
        device_uuid=uuid,
        name="H100",
        source="nvml",
        scope="gpu",
        method="measured_counter",
        energy_j=energy_j,
        u_j=u_j,
        bound_j=None,
        cross_check_j=None,
        cross_check_ratio=None,
        sensor_rel=0.05,
        edge_step_w=(0.0, 0.0),
        delta_s=0.0,
        lag_s=0.0,
        coverage=1.0,
        mean_power_w=energy_j,
    )
    return replace(whole, **changes)


def keys(readings):
    return [(one.node, one.device_uuid) for one in readings]


def test_sum_over_distinct_devices():
    parts = [reading(uuid="GPU-a"), reading(uuid="GPU-b", energy_j=50.0, u_j=4.0), reading(node="n2", uuid="GPU-a")]
    total = sum_readings(parts, keys(parts))
    assert total.energy_j == 250.0
    assert total.u_j == pytest.approx(np.sqrt(9 + 16 + 9))
    assert total.sensor_j == pytest.approx(12.5)
    assert total.covers == ("nvml/gpu/GPU-a", "nvml/gpu/GPU-b", "nvml/gpu/GPU-a")
    assert total.not_measured == ("cpu_package", "dram", "network", "fans")
    assert total.reason is None


def test_a_device_read_twice_is_an_error():
    with pytest.raises(ValueError, match="GPU-a of node n1 was read twice"):
        sum_readings([reading(), reading()], [("n1", "GPU-a")])


def test_a_missing_gpu_makes_the_total_null():
    """A lost GPU made another tool report 68 % of the energy with no flag."""
    parts = [reading(uuid="GPU-a"), reading(uuid="GPU-b")]
    total = sum_readings(parts, [*keys(parts), ("n1", "GPU-c")])
    assert (total.energy_j, total.u_j, total.sensor_j) == (None, None, None)
    assert total.reason == "partial: GPU-c on n1 did not report"
    assert total.parts == tuple(parts)


def test_a_device_without_energy_and_an_estimate_make_it_null():
    lost = reading(uuid="GPU-b", energy_j=None, u_j=None, reason="no samples")
    guess = reading(uuid="codecarbon:cpu", method="estimated_model", scope="host")
    for part, words in ((lost, "no samples"), (guess, "only estimated")):
        total = sum_readings([reading(), part], keys([reading(), part]))
        assert total.energy_j is None
        assert words in total.reason
    assert sum_readings([], []).energy_j is None


def test_devices_that_are_not_expected_stay_out():
    total = sum_readings([reading(), reading(uuid="GPU-idle")], [("n1", "GPU-a")])
    assert total.energy_j == 100.0
    assert len(total.parts) == 1


def test_invalid_parts_are_summed_and_shown():
    part = reading(flags=(flag("dropped_samples", "50 %"),))
    total = sum_readings([part], keys([part]))
    assert total.energy_j == 100.0
    assert not total.parts[0].valid


def test_clock_offset_is_common_to_a_node_and_lag_to_all():
    steps = {"edge_step_w": (300.0, 310.0)}
    alone_j2 = 610**2 * (0.001**2 + 0.01**2) / 3
    parts = [
        reading(node, uuid, u_j=float(np.sqrt(9 + alone_j2)), delta_s=0.001, lag_s=0.01, **steps)
        for node, uuid in (("n1", "a"), ("n1", "b"), ("n2", "c"))
    ]
    expected_j2 = 3 * 9 + ((0.001 * 1220) ** 2 + (0.001 * 610) ** 2) / 3 + (0.01 * 1830) ** 2 / 3
    assert sum_readings(parts, keys(parts)).u_j == pytest.approx(np.sqrt(expected_j2))


def test_one_device_keeps_its_own_u():
    part = reading(u_j=5.0, delta_s=0.001, lag_s=0.01, edge_step_w=(100.0, 50.0))
    assert sum_readings([part], keys([part])).u_j == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("scope", "left"),
    [("gpu", ("cpu_package", "dram", "network", "fans")), ("module", ("network", "fans")), ("host", ("network",))],
)
def test_what_was_not_measured(scope, left):
    part = reading(scope=scope)
    assert sum_readings([part], keys([part])).not_measured == left


def test_desynchronised_nodes_do_not_inflate(case, device):
    """Mean power times the number of GPUs counts both GPUs for as long as either runs."""
    cases = []
    for i in range(2):
        gpu = device(uuid=f"GPU-{i}")
        cases.append(case(lambda b, e, i=i: ConstantLoad(b + 3 * i, b + 3 * i + 2, busy_w=500.0), 5.0, device=gpu))
    readings = [replace(one.read(), node=f"n{i}") for i, one in enumerate(cases)]
    total = sum_readings(readings, keys(readings))
    assert total.energy_j == pytest.approx(sum(one.true_j for one in cases), rel=0.01)
    busy_mean_w = np.mean([one.trace.power_mw[one.trace.power_mw > 200e3].mean() for one in cases]) / 1e3
    assert busy_mean_w * 2 * 5.0 > 1.8 * total.energy_j
