"""From samples around a command to its energy, on a virtual clock that the fake driver shares."""

import math

import pytest

from llem_ray.core.units import ns_from_s
from llem_ray.execution.command import CommandLife, NotStarted
from llem_ray.execution.measure import CommandMeasurement, evaluate_life, measure_command, to_json
from llem_ray.power.nvml import NvmlSource
from llem_ray.power.sampler import SamplerLoop
from llem_ray.power.traces import TraceBuffer
from llem_ray.testing.nvml import Fault, Gpu, Scenario, Sensor, Waveform, fake_nvml

LOAD = Waveform.of([(0.0, 90.0, "step"), (5.0, 420.0, "step"), (15.0, 90.0, "step")])
MARGIN_S = 1.4


def measured(*gpus: Gpu, begin_s: float = 5.0, duration_s: float = 10.0) -> CommandMeasurement:
    """A command whose life is exactly [begin_s, begin_s + duration_s] of the scenario."""
    scenario = Scenario(gpus=gpus)
    begin_ns, end_ns = (scenario.origin_ns + ns_from_s(t_s) for t_s in (begin_s, begin_s + duration_s))
    with fake_nvml(scenario) as fake:
        loop = SamplerLoop([NvmlSource(clock=fake.clock)], node="here", clock=fake.clock)
        loop.calibrate(2.0)
        loop.run_until(end_ns + ns_from_s(MARGIN_S))
        buffer = TraceBuffer()
        for batch in loop.fetch(0, flush=True):
            buffer.append(batch)
        info = loop.info()
        loop.close()
    return evaluate_life(info, buffer, CommandLife(begin_ns=begin_ns, end_ns=end_ns, exit_code=0), ns_from_s(MARGIN_S))


def gpu(name: str, *faults: Fault, **changes: object) -> Gpu:
    return Gpu(uuid=name, waveform=LOAD, faults=faults, counter=Sensor(phase_s=0.037), **changes)  # type: ignore[arg-type]


def test_the_energy_of_a_load_that_lasts_as_long_as_the_command() -> None:
    result = measured(gpu("a"), gpu("b"))
    assert result.window.duration_s == 10.0
    for reading in result.readings:
        assert reading.energy_j == pytest.approx(4200.0, rel=0.0015)
        assert reading.bound_j is not None
        assert reading.bound_j[0] <= 4200.0 <= reading.bound_j[1]
        assert reading.valid
    assert result.total.energy_j == pytest.approx(8400.0, rel=0.0015)
    assert result.total.covers == ("nvml/gpu/a", "nvml/gpu/b")
    assert result.total.reason is None


@pytest.mark.parametrize("duration_s", [0.01, 0.1, 0.5, 1.0])
def test_short_commands_get_an_energy_within_its_bound(duration_s: float) -> None:
    (reading,) = measured(gpu("a"), begin_s=8.0, duration_s=duration_s).readings
    assert reading.energy_j == pytest.approx(420.0 * duration_s, rel=0.01)
    assert reading.bound_j is not None
    assert reading.bound_j[0] <= 420.0 * duration_s <= reading.bound_j[1]
    assert ("short_window" in {item.code for item in reading.flags}) == (duration_s < 1.0)


def test_a_gpu_lost_on_the_way_makes_the_total_invalid() -> None:
    result = measured(gpu("good"), gpu("gone", Fault(kind="gpu_lost", begin_s=5.5)))
    good, gone = result.readings
    assert good.valid
    assert not gone.valid
    assert {"gpu_lost", "dropped_samples"} <= {item.code for item in gone.flags}
    object_ = to_json(result)
    assert [device["valid"] for device in object_["devices"]] == [True, False]
    assert object_["total"]["valid"] is False
    assert to_json(measured(gpu("good")))["total"]["valid"] is True


def test_a_board_shared_by_tenants_is_null_and_in_no_total() -> None:
    result = measured(gpu("whole"), gpu("sliced", mig=True))
    assert result.readings[1].energy_j is None
    assert "MIG" in (result.readings[1].reason or "")
    assert result.total.covers == ("nvml/gpu/whole",)
    assert result.total.energy_j == pytest.approx(4200.0, rel=0.0015)


def test_when_nothing_measures_the_total_says_why() -> None:
    dark = gpu("dark", has_counter=False, has_instant=False, has_average=False, has_legacy_energy=False, has_legacy_power=False)
    result = measured(dark)
    assert result.total.energy_j is None
    assert result.total.reason is not None
    assert result.total.reason.startswith("nothing here measures: NVIDIA H200: NVML gives neither energy nor power")
    (device,) = to_json(result)["devices"]
    assert (device["energy_j"], device["method"], device["bound_j"]) == (None, "unavailable", None)


def test_json_holds_finite_numbers_only() -> None:
    result = to_json(measured(gpu("a", power_limit_w=0.0)))
    stack = [result]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
        else:
            assert not isinstance(value, float) or math.isfinite(value)


def test_a_command_that_is_not_there_costs_no_calibration() -> None:
    result = measure_command(["no-such-program"], sources=["no-such-source-either"])
    assert isinstance(result, NotStarted)
    assert result.exit_code == 127
