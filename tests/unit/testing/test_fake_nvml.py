"""The fake NVML against closed-form truth, read through the real nvidia-ml-py."""

import ctypes
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llem_ray.testing.nvml import Fault, Gpu, Scenario, Sensor, Waveform, build, environment, fake_nvml
from llem_ray.testing.nvml.library import default_cache

ORIGIN_NS = 1_000_000_000_000
SQUARE = Waveform(((0.0, 650.0, "step"), (0.05, 150.0, "step")), repeat_s=0.1)
RAMP = Waveform(((0.0, 100.0, "step"), (1.0, 100.0, "linear"), (3.0, 500.0, "step"), (4.0, 100.0, "step")))


def one(waveform: Waveform = RAMP, **gpu: object) -> Scenario:
    return Scenario(gpus=(Gpu(uuid="GPU-a", waveform=waveform, **gpu),))


def field(handle: object, number: int) -> tuple[int, int]:
    value = pynvml.nvmlDeviceGetFieldValues(handle, [number])[0]
    return (
        value.nvmlReturn,
        value.value.ullVal if value.valueType == pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG else value.value.uiVal,
    )


def test_ramp_has_the_energy_of_its_area() -> None:
    assert RAMP.energy_j(0.0, 1.0) == pytest.approx(100.0)
    assert RAMP.energy_j(1.0, 3.0) == pytest.approx(600.0)
    assert RAMP.energy_j(3.0, 5.0) == pytest.approx(600.0)
    assert RAMP.energy_j(-2.0, 0.0) == pytest.approx(200.0)
    assert RAMP.power_w(2.0) == pytest.approx(300.0)
    assert RAMP.power_w(3.0) == 500.0


def test_repeating_wave_goes_on_before_and_after() -> None:
    assert SQUARE.energy_j(0.0, 1000.0) == pytest.approx(400.0 * 1000.0)
    assert SQUARE.energy_j(-0.05, 0.05) == pytest.approx(0.05 * 150 + 0.05 * 650)
    assert SQUARE.power_w(-0.01) == 150.0


@pytest.mark.parametrize(
    ("segments", "repeat_s", "says"),
    [
        ((), None, "at least one"),
        (((0.0, 1.0, "step"), (0.0, 2.0, "step")), None, "ascend"),
        (((0.0, -1.0, "step"),), None, "negative"),
        (((0.0, math.nan, "step"),), None, "finite"),
        (((0.0, 1.0, "cubic"),), None, "cubic"),
        (((0.0, 1.0, "step"), (2.0, 1.0, "step")), 2.0, "repeat_s=2.0"),
    ],
)
def test_wave_that_makes_no_sense_is_refused(segments: tuple, repeat_s: float | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Waveform(segments, repeat_s)


powers = st.floats(0.0, 2000.0)
pieces = st.lists(st.tuples(st.floats(0.001, 3.0), powers, st.sampled_from(["step", "linear"])), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(pieces=pieces, repeats=st.booleans(), at=st.lists(st.floats(0.5, 200.0), min_size=1, max_size=8))
def test_counter_equals_the_integral_of_the_wave(pieces: list, repeats: bool, at: list[float]) -> None:
    starts, t_s = [], 0.0
    for span_s, power_w, kind in pieces:
        starts.append((t_s, power_w, kind))
        t_s += span_s
    wave = Waveform(tuple(starts), t_s if repeats else None)
    scenario = one(wave, counter=Sensor(period_s=0.1, phase_s=0.03), energy_base_mj=0.0)
    with fake_nvml(scenario) as fake:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        for seconds in sorted(at):
            fake.clock.sleep_until_ns(ORIGIN_NS + round(seconds * 1e9))
            now_s = scenario.seconds(fake.clock.monotonic_ns())
            tick_s = 0.03 + math.floor((now_s - 0.03) / 0.1) * 0.1
            counter_mj = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            reachable = {
                math.floor(1e3 * wave.energy_j(0.0, tick_s + slip_s) + rounding)
                for slip_s in (-1e-9, 0.0, 1e-9)
                for rounding in (-1e-4, 0.0, 1e-4)
            }
            neighbour = {math.floor(1e3 * wave.energy_j(0.0, tick_s + shift_s)) for shift_s in (-0.1, 0.1)}
            on_a_tick = min((now_s - 0.03) % 0.1, 0.1 - (now_s - 0.03) % 0.1) < 1e-8
            assert counter_mj in (reachable | neighbour if on_a_tick else reachable)
        pynvml.nvmlShutdown()


def test_counter_moves_only_at_its_ticks_and_after_its_lag() -> None:
    sensor = Sensor(period_s=0.1, phase_s=0.02, lag_s=0.015)
    with fake_nvml(one(Waveform.constant(500.0), counter=sensor)) as fake:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        changes, last = [], pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        for ms in range(1, 401):
            fake.clock.sleep_until_ns(ORIGIN_NS + ms * 1_000_000 + 1)
            now = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            if now != last:
                changes.append((ms, now - last))
            last = now
    assert changes == [(35, 50_000), (135, 50_000), (235, 50_000), (335, 50_000)]


def test_instant_power_is_the_mean_of_its_short_window() -> None:
    with fake_nvml(one(SQUARE, instant=Sensor(period_s=0.1, phase_s=0.06, window_s=0.025))) as fake:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        fake.clock.sleep_until_ns(ORIGIN_NS + 1_099_000_000)
        expected_mw = 1e3 * (0.015 * 650 + 0.010 * 150) / 0.025
        assert field(handle, 186) == (0, round(expected_mw))


def test_average_power_is_the_mean_of_a_second_and_legacy_power_follows_the_chip() -> None:
    hopper = Gpu(uuid="GPU-h", waveform=RAMP)
    ampere = Gpu(uuid="GPU-a", waveform=RAMP, name="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0), has_average=False)
    with fake_nvml(Scenario(gpus=(hopper, ampere))) as fake:
        pynvml.nvmlInit()
        h, a = (pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in ("GPU-h", "GPU-a"))
        fake.clock.sleep_until_ns(ORIGIN_NS + 3_000_000_001)
        assert field(h, 185) == (0, 400_000)
        assert pynvml.nvmlDeviceGetPowerUsage(h) == 400_000
        values = pynvml.nvmlDeviceGetFieldValues(a, [83, 185])
        assert [value.nvmlReturn for value in values] == [0, pynvml.NVML_ERROR_NOT_SUPPORTED]
        assert pynvml.nvmlDeviceGetPowerUsage(a) == pytest.approx(497_500, abs=1)


def test_noise_is_seeded_and_of_the_stated_size() -> None:
    def readings(seed: int) -> list[int]:
        with fake_nvml(one(Waveform.constant(300.0), instant=Sensor(window_s=0.025, noise_w=5.0), seed=seed)) as fake:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            values = []
            for _ in range(2000):
                fake.clock.advance_ns(100_000_000)
                values.append(field(handle, 186)[1])
            return values

    first = readings(1)
    assert first == readings(1)
    assert first != readings(2)
    mean = sum(first) / len(first)
    sd = math.sqrt(sum((x - mean) ** 2 for x in first) / len(first))
    assert mean == pytest.approx(300_000, abs=5 * 5_000 / math.sqrt(2000))
    assert sd == pytest.approx(5_000, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("not_supported", pynvml.NVML_ERROR_NOT_SUPPORTED),
        ("no_permission", pynvml.NVML_ERROR_NO_PERMISSION),
        ("timeout", pynvml.NVML_ERROR_TIMEOUT),
        ("gpu_lost", pynvml.NVML_ERROR_GPU_IS_LOST),
    ],
)
def test_error_comes_and_goes_with_its_fault(kind: str, code: int) -> None:
    with fake_nvml(one(faults=(Fault(kind=kind, begin_s=1.0, end_s=2.0),))) as fake:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        for ms, wanted in ((999, 0), (1000, code), (1999, code), (2000, 0)):
            fake.clock.sleep_until_ns(ORIGIN_NS + ms * 1_000_000)
            try:
                pynvml.nvmlDeviceGetPowerUsage(handle)
                seen = 0
            except pynvml.NVMLError as error:
                seen = error.value
            assert (ms, seen) == (ms, wanted)


def test_fault_of_one_field_leaves_the_others() -> None:
    with fake_nvml(one(faults=(Fault(kind="timeout", targets=("average",)), Fault(kind="zero_reading", targets=("instant",))))):
        pynvml.nvmlInit()
        values = pynvml.nvmlDeviceGetFieldValues(pynvml.nvmlDeviceGetHandleByIndex(0), [83, 186, 185])
        assert [value.nvmlReturn for value in values] == [0, 0, pynvml.NVML_ERROR_TIMEOUT]
        assert values[1].value.uiVal == 0


def test_counter_freezes_resets_and_goes_on() -> None:
    faults = (Fault(kind="freeze", begin_s=1.0, end_s=2.0), Fault(kind="counter_reset", begin_s=3.0, value=7.0))
    with fake_nvml(one(Waveform.constant(100.0), faults=faults, energy_base_mj=5e6)) as fake:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        seen = {}
        for ms in (950, 1050, 1950, 2050, 2950, 3050, 3250):
            fake.clock.sleep_until_ns(ORIGIN_NS + ms * 1_000_000)
            seen[ms] = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    base = 5_000_000
    assert seen[950] == base + 90_000
    assert seen[1050] == seen[1950] == base + 100_000
    assert seen[2050] == base + 200_000
    assert seen[2950] == base + 290_000
    assert seen[3050] == 7
    assert seen[3250] == 20_007


def test_slow_call_takes_its_time_on_the_virtual_clock() -> None:
    with fake_nvml(one(faults=(Fault(kind="slow_call", value=3000.0),))) as fake:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        before_ns = fake.clock.monotonic_ns()
        pynvml.nvmlDeviceGetPowerUsage(handle)
        assert fake.clock.monotonic_ns() - before_ns == 3_000_000


def test_init_and_shutdown_are_counted_and_an_unloaded_fake_has_no_driver() -> None:
    with fake_nvml(one()) as fake:
        with pytest.raises(pynvml.NVMLError_Uninitialized):
            pynvml.nvmlDeviceGetCount()
        pynvml.nvmlInit()
        pynvml.nvmlInit()
        pynvml.nvmlShutdown()
        assert pynvml.nvmlDeviceGetCount() == 1
        assert fake.init_count == 1
        pynvml.nvmlShutdown()
        with pytest.raises(pynvml.NVMLError_Uninitialized):
            pynvml.nvmlShutdown()
    with pytest.raises(pynvml.NVMLError_DriverNotLoaded):
        pynvml.nvmlInit()


def test_malformed_scenario_names_its_line(tmp_path: Path) -> None:
    path = one().write(tmp_path / "scenario.txt")
    lines = path.read_text().splitlines()
    lines[5] = "nmae NVIDIA H200"
    path.write_text("\n".join(lines))
    library = ctypes.CDLL(str(build(default_cache())))
    library.fake_nvml_load.argtypes = [ctypes.c_char_p]
    library.fake_nvml_message.restype = ctypes.c_char_p
    assert library.fake_nvml_load(os.fsencode(path)) == 6
    assert b":6: malformed scenario" in library.fake_nvml_message()
    library.fake_nvml_unload()


def test_long_jittered_list_is_taken_whole() -> None:
    n = 100_000
    wave = Waveform(tuple((0.001 * i + 0.0004 * math.sin(i), 300.0 + 200.0 * math.cos(i), "step") for i in range(n)))
    with fake_nvml(one(wave, energy_base_mj=0.0)) as fake:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        fake.clock.sleep_until_ns(ORIGIN_NS + 99_950_000_000)
        truth_mj = 1e3 * wave.energy_j(0.0, 99.9)
        assert pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) == pytest.approx(truth_mj, abs=1.0)


PROBE = """
import json, pynvml, ray._private.thirdparty.pynvml as rays
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager as gpus
from ray.dashboard.modules.reporter.gpu_providers import NvidiaGpuProvider
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(1)
pci = pynvml.nvmlDeviceGetPciInfo(handle)
reported = NvidiaGpuProvider().get_gpu_utilization()
print(json.dumps(dict(
    count=gpus.get_current_node_num_accelerators(), type=gpus.get_current_node_accelerator_type(),
    reporter=[[info["uuid"], info["power_mw"], info["temperature_c"], len(info["processes_pids"])] for info in reported],
    driver=pynvml.nvmlSystemGetDriverVersion(), cuda=pynvml.nvmlSystemGetCudaDriverVersion(),
    bus=pci.busId, bus_number=pci.bus, total=pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2).total,
    capability=pynvml.nvmlDeviceGetCudaComputeCapability(handle),
    limits=pynvml.nvmlDeviceGetPowerManagementLimitConstraints(handle))))
"""


def test_new_process_and_ray_see_its_gpus(tmp_path: Path) -> None:
    gpus = tuple(Gpu(uuid=f"GPU-{i}", waveform=Waveform.constant(200.0 + i), processes=2) for i in range(4))
    path = Scenario(gpus=gpus, clock="realtime", origin_ns=1_700_000_000_000_000_000).write(tmp_path / "scenario.txt")
    env = {**os.environ, **environment(build(default_cache()), path)}
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "count": 4,
        "type": "H200",
        "reporter": [[f"GPU-{i}", 200_000 + 1000 * i, 45, 2] for i in range(4)],
        "driver": "570.86.15",
        "cuda": 12080,
        "bus": "00000000:1C:00.0",
        "bus_number": 0x1C,
        "total": 143_771 * 2**20,
        "capability": [9, 0],
        "limits": [175_000, 700_000],
    }


def test_build_says_what_the_compiler_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(RuntimeError, match="/bin/false could not build"):
        build(tmp_path)
    assert not list(tmp_path.rglob("libnvidia-ml.so.1"))


def test_real_time_runs_on_the_wall_clock() -> None:
    origin_ns = time.time_ns() - 3_600 * 10**9
    scenario = Scenario(gpus=(Gpu(uuid="GPU-a", waveform=SQUARE),), clock="realtime", origin_ns=origin_ns)
    with fake_nvml(scenario):
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        for _ in range(20):
            before_s = scenario.seconds(time.time_ns())
            energy_j = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3 - 1e6
            after_s = scenario.seconds(time.time_ns())
            earliest_j, latest_j = (scenario.energy_j("GPU-a", 0.0, math.floor(t / 0.1) * 0.1) for t in (before_s, after_s))
            assert earliest_j - 0.002 <= energy_j <= latest_j + 0.001
            time.sleep(0.013)
