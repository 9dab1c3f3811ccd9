from dataclasses import replace

import numpy as np
import pytest

from llem_ray.core.energy import EnergyReading
from llem_ray.energy.total import ALIKE, sum_readings
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
        shift_w=0.0,
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
    assert total.u_j == pytest.approx(np.sqrt((1 - ALIKE) * (9 + 16 + 9) + ALIKE * (3 + 4 + 3) ** 2))
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


STEP_W = 610.0


def of_node(node, uuid, *, own_s=0.0, marked_s=0.0, lag_s=0.0):
    """Sampled to 3 J; its node's clock is known to ``own_s``, that of the marking node to ``marked_s``."""
    shift_j2 = STEP_W**2 * (own_s**2 + marked_s**2 + lag_s**2) / 3
    clock = {"delta_s": own_s + marked_s, "common_delta_s": marked_s, "lag_s": lag_s}
    return reading(node, uuid, u_j=float(np.sqrt(9 + shift_j2)), shift_w=STEP_W, **clock)


def added_j2(parts):
    """What clocks and lag add to the variance of the sum."""
    plain = [reading(part.node, part.device_uuid) for part in parts]
    return sum_readings(parts, keys(parts)).u_j ** 2 - sum_readings(plain, keys(plain)).u_j ** 2


def test_lag_is_common_to_all_devices():
    parts = [of_node(node, uuid, lag_s=0.01) for node, uuid in (("n1", "a"), ("n1", "b"), ("n2", "c"))]
    assert added_j2(parts) == pytest.approx((0.01 * 3 * STEP_W) ** 2 / 3)


def test_the_marking_node_s_clock_is_common_to_all_others():
    devices = [("n1", "a"), ("n1", "b"), ("n2", "c"), ("n2", "d"), ("n3", "e")]
    parts = [of_node("n0", "lead"), *(of_node(*device, own_s=0.001, marked_s=0.002) for device in devices)]
    own_j2 = 0.001**2 * (2**2 + 2**2 + 1) * STEP_W**2
    assert added_j2(parts) == pytest.approx((own_j2 + (0.002 * 5 * STEP_W) ** 2) / 3)


def test_clocks_that_err_alike_add_up_where_the_marking_node_s_is_exact():
    parts = [of_node("n0", "lead"), *(of_node(f"n{node}", "a", own_s=0.001) for node in range(1, 16))]
    assert added_j2(parts) == pytest.approx((0.001 * 15 * STEP_W) ** 2 / 3)


def test_sampling_errors_of_a_gang_are_alike_in_part():
    parts = [reading(uuid=f"GPU-{index}") for index in range(64)]
    u_j = sum_readings(parts, keys(parts)).u_j
    assert u_j == pytest.approx(np.sqrt((1 - ALIKE) * 64 * 9 + ALIKE * (64 * 3) ** 2))


def test_one_node_is_as_before_but_for_what_its_devices_share():
    parts = [of_node("n0", "a", lag_s=0.01), of_node("n0", "b", lag_s=0.01)]
    assert added_j2(parts) == pytest.approx((0.01 * 2 * STEP_W) ** 2 / 3)


def test_one_device_keeps_its_own_u():
    part = reading(u_j=5.0, delta_s=0.001, lag_s=0.01, shift_w=150.0)
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
