"""NvmlSource over the real nvidia-ml-py and the fake driver library."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pynvml
import pytest

from llem_ray.core.errors import PowerPermissionDenied, SourceUnavailable
from llem_ray.power.nvml import NvmlSource, driver_facts
from llem_ray.power.nvml.native import own_error
from llem_ray.testing.nvml import FakeNvml, Fault, Gpu, Scenario, Sensor, Waveform, fake_nvml

ORIGIN_NS = 1_000_000_000_000
WAVE = Waveform(((0.0, 100.0, "step"), (1.0, 500.0, "step")))

Open = Callable[..., tuple[NvmlSource, FakeNvml]]


@pytest.fixture
def open_source() -> Iterator[Open]:
    with ExitStack() as stack:

        def open_(*gpus: Gpu, **scenario: object) -> tuple[NvmlSource, FakeNvml]:
            fake = stack.enter_context(fake_nvml(Scenario(gpus=gpus, **scenario)))
            source = NvmlSource(clock=fake.clock)
            stack.callback(source.close)
            return source, fake

        yield open_


def gpu(uuid: str = "GPU-a", **changes: object) -> Gpu:
    return Gpu(uuid=uuid, waveform=changes.pop("waveform", WAVE), **changes)


def at(fake: FakeNvml, seconds: float) -> None:
    fake.clock.sleep_until_ns(ORIGIN_NS + round(seconds * 1e9))


def test_reads_counter_instant_and_average_of_every_gpu(open_source: Open) -> None:
    source, fake = open_source(gpu("GPU-a"), gpu("GPU-b", waveform=Waveform.constant(250.0), latency_us=400.0))
    at(fake, 1.55)
    a, b = source.read()
    assert (a.device_uuid, b.device_uuid) == ("GPU-a", "GPU-b")
    assert a.energy_mj == 1e9 + 1e3 * (100 + 0.5 * 500)
    assert a.power_mw == 500_000
    assert a.power_avg_mw == pytest.approx(300_000)
    assert (a.error, b.error) == (None, None)
    assert b.power_mw == b.power_avg_mw == 250_000
    assert (a.t_ns, a.hw_ns) == (ORIGIN_NS + 1_550_000_000, 0)
    assert (b.t_ns, b.hw_ns) == (ORIGIN_NS + 1_550_200_000, 200_000)


def test_polls_one_gpu_with_one_native_call(open_source: Open) -> None:
    source, fake = open_source(gpu(latency_us=100.0))
    before_ns = fake.clock.monotonic_ns()
    source.read()
    assert fake.clock.monotonic_ns() - before_ns == 100_000


def test_devices_are_named_by_uuid_with_limit_and_method(open_source: Open) -> None:
    source, _ = open_source(
        gpu("GPU-a"),
        gpu("GPU-b", name="NVIDIA A10", power_limit_w=150.0, has_counter=False, has_legacy_energy=False),
        gpu("GPU-c", mig=True),
        gpu(
            "GPU-d",
            has_counter=False,
            has_instant=False,
            has_average=False,
            has_legacy_energy=False,
            has_legacy_power=False,
        ),
    )
    a, b, c, d = source.devices()
    assert (a.uuid, a.name, a.index, a.scope, a.method) == ("GPU-a", "NVIDIA H200", 0, "gpu", "measured_counter")
    assert (a.power_limit_mw, a.counter_quantum_mj, a.sensor_rel, a.shared) == (700_000, 1.0, 0.05, False)
    assert (b.name, b.power_limit_mw, b.method, b.counter_quantum_mj) == ("NVIDIA A10", 150_000, "measured_power_integral", None)
    assert c.shared
    assert d.method == "unavailable"
    assert d.reason


def test_module_of_a_superchip_is_read_as_a_module(open_source: Open) -> None:
    source, fake = open_source(gpu(name="NVIDIA GH200 480GB", module_extra_w=120.0, waveform=Waveform.constant(400.0)))
    at(fake, 3.0)
    first = source.read()[0]
    at(fake, 5.0)
    second = source.read()[0]
    assert source.devices()[0].scope == "module"
    assert second.power_mw == second.power_avg_mw == 520_000
    assert second.energy_mj - first.energy_mj == 2 * 520_000


def test_a_module_scope_that_equals_the_gpu_is_a_gpu(open_source: Open) -> None:
    source, _ = open_source(gpu(module_extra_w=0.0))
    assert source.devices()[0].scope == "gpu"


@pytest.mark.parametrize(
    ("capability", "column"),
    [((7, 0), "power_mw"), ((8, 0), "power_mw"), ((8, 6), "power_avg_mw"), ((9, 0), "power_avg_mw"), ((12, 0), "power_avg_mw")],
)
def test_legacy_power_goes_to_the_column_of_what_it_means(open_source: Open, capability: tuple[int, int], column: str) -> None:
    source, fake = open_source(gpu(compute_capability=capability, has_instant=False, has_average=False))
    at(fake, 1.55)
    sample = source.read()[0]
    expected_mw = {"power_mw": 500_000, "power_avg_mw": 300_000}[column]
    assert getattr(sample, column) == pytest.approx(expected_mw)
    assert {sample.power_mw, sample.power_avg_mw} == {None, getattr(sample, column)}
    assert sample.error is None


def test_a100_has_instant_power_and_no_average(open_source: Open) -> None:
    source, fake = open_source(gpu(compute_capability=(8, 0), has_average=False))
    at(fake, 1.55)
    sample = source.read()[0]
    assert (sample.power_mw, sample.power_avg_mw, sample.error) == (500_000, None, None)


def test_legacy_energy_stands_in_for_the_field(open_source: Open) -> None:
    source, fake = open_source(gpu(has_counter=False))
    at(fake, 1.55)
    assert source.devices()[0].method == "measured_counter"
    assert source.read()[0].energy_mj == 1e9 + 350_000


@pytest.mark.parametrize(
    ("kind", "prefix"), [("gpu_lost", "gpu_lost"), ("timeout", "timeout"), ("no_permission", "no_permission")]
)
def test_one_failing_gpu_leaves_the_other(open_source: Open, kind: str, prefix: str) -> None:
    source, fake = open_source(gpu("GPU-a", faults=(Fault(kind=kind, begin_s=1.0, end_s=2.0),)), gpu("GPU-b"))
    at(fake, 1.5)
    bad, good = source.read()
    assert bad.error.startswith(prefix + ":")
    assert (bad.power_mw, bad.power_avg_mw, bad.energy_mj) == (None, None, None)
    assert good.error is None
    assert good.energy_mj > 1e9
    at(fake, 2.5)
    assert source.read()[0].error is None


def test_each_field_has_its_own_return_code(open_source: Open) -> None:
    source, fake = open_source(gpu(faults=(Fault(kind="timeout", begin_s=1.0, targets=("instant",)),)))
    at(fake, 1.55)
    sample = source.read()[0]
    assert sample.energy_mj == 1e9 + 350_000
    assert sample.power_mw is None
    assert sample.power_avg_mw == pytest.approx(300_000)
    assert sample.error == "timeout: NVML: Timeout (field 186)"


def test_zero_watts_is_no_reading(open_source: Open) -> None:
    source, fake = open_source(gpu(faults=(Fault(kind="zero_reading", begin_s=1.0, targets=("instant", "average", "legacy")),)))
    at(fake, 1.55)
    sample = source.read()[0]
    assert (sample.power_mw, sample.power_avg_mw) == (None, None)
    assert sample.energy_mj == 1e9 + 350_000
    assert sample.error.startswith("zero_reading")


def test_zero_watts_of_the_legacy_call_is_no_reading(open_source: Open) -> None:
    faults = (Fault(kind="zero_reading", begin_s=1.0, targets=("instant", "average", "legacy")),)
    source, fake = open_source(gpu(has_instant=False, has_average=False, faults=faults))
    at(fake, 1.55)
    sample = source.read()[0]
    assert (sample.power_mw, sample.power_avg_mw) == (None, None)
    assert sample.error.startswith("zero_reading")


def test_a_field_that_fails_while_opening_is_polled_later(open_source: Open) -> None:
    source, fake = open_source(gpu(faults=(Fault(kind="timeout", end_s=0.5),)))
    assert source.read()[0].error.startswith("timeout")
    at(fake, 1.55)
    sample = source.read()[0]
    assert (sample.energy_mj, sample.power_mw, sample.error) == (1e9 + 350_000, 500_000, None)


def test_a_gpu_that_is_lost_from_the_start_is_shown(open_source: Open) -> None:
    source, _ = open_source(gpu("GPU-a", faults=(Fault(kind="gpu_lost"),)), gpu("GPU-b"))
    lost, fine = source.devices()
    assert (lost.uuid, lost.method, fine.uuid) == ("nvml:index-0", "unavailable", "GPU-b")
    assert lost.reason.startswith("gpu_lost")
    assert [sample.device_uuid for sample in source.read()] == ["nvml:index-0", "GPU-b"]
    assert source.read()[0].error.startswith("gpu_lost")
    assert source.read_states()[0].temperature_c is None


def test_states_tell_heat_clocks_memory_and_limit(open_source: Open) -> None:
    faults = (
        Fault(kind="temperature", begin_s=1.0, value=88.0),
        Fault(kind="clock_events", begin_s=1.0, value=0x40),
        Fault(kind="memory_used", begin_s=1.0, value=3 * 2**30),
        Fault(kind="power_limit", begin_s=1.0, value=400_000),
    )
    source, fake = open_source(gpu(processes=3, faults=faults))
    at(fake, 0.5)
    before = source.read_states()[0]
    at(fake, 1.5)
    after = source.read_states()[0]
    assert (before.temperature_c, before.clock_event_mask, before.memory_used_bytes) == (45, 0, 512 * 2**20)
    assert (before.sm_clock_mhz, before.memory_clock_mhz, before.process_count, before.power_limit_mw) == (1980, 3201, 3, 700_000)
    assert (after.temperature_c, after.clock_event_mask, after.memory_used_bytes) == (88, 0x40, 3 * 2**30)
    assert (after.power_limit_mw, after.t_ns) == (400_000, ORIGIN_NS + 1_500_000_000)


def test_state_parts_fail_one_by_one(open_source: Open) -> None:
    source, _ = open_source(gpu(faults=(Fault(kind="not_supported", targets=("state",)),)))
    state = source.read_states()[0]
    parts = (state.temperature_c, state.sm_clock_mhz, state.clock_event_mask, state.memory_used_bytes, state.process_count)
    assert parts == (None,) * 5
    assert source.read()[0].error is None


@pytest.mark.parametrize(
    ("scenario", "error", "says"),
    [
        ({"gpus": (gpu(),), "init_code": 9}, SourceUnavailable, "Driver Not Loaded"),
        ({"gpus": (gpu(),), "init_code": 4}, PowerPermissionDenied, "Insufficient Permissions"),
        ({"gpus": (gpu(),), "init_code": 18}, SourceUnavailable, "version mismatch"),
        ({"gpus": ()}, SourceUnavailable, "lists no GPU"),
    ],
)
def test_source_that_cannot_work_says_why(scenario: dict, error: type, says: str) -> None:
    with fake_nvml(Scenario(**scenario)) as fake:
        with pytest.raises(error, match=says) as raised:
            NvmlSource()
        assert raised.value.hint
        assert fake.init_count == 0


NO_LIBRARY = """
import ctypes
from llem_ray.core.errors import SourceUnavailable
from llem_ray.power.nvml import NvmlSource, driver_facts
try:
    ctypes.CDLL("libnvidia-ml.so.1")
except OSError:
    try:
        NvmlSource()
    except SourceUnavailable as error:
        print(error, driver_facts())
else:
    print("this host has a driver")
"""


def test_host_without_a_driver_library_is_told_so() -> None:
    done = subprocess.run([sys.executable, "-c", NO_LIBRARY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "has a driver" in done.stdout:
        pytest.skip("this host has an NVIDIA driver library")
    assert "Shared Library Not Found" in done.stdout
    assert "install the NVIDIA driver" in done.stdout
    assert done.stdout.rstrip().endswith("{}")


def test_every_init_has_its_shutdown() -> None:
    with fake_nvml(Scenario(gpus=(gpu(),))) as fake:
        first, second = NvmlSource(clock=fake.clock), NvmlSource(clock=fake.clock)
        assert fake.init_count == 2
        first.close()
        first.close()
        assert fake.init_count == 1
        assert second.read()[0].error is None
        second.close()
        assert fake.init_count == 0


def test_driver_facts_for_the_environment_record() -> None:
    with fake_nvml(Scenario(gpus=(gpu(),))) as fake:
        assert driver_facts() == {"nvidia_driver": "570.86.15", "cuda_driver": "12.8"}
        assert fake.init_count == 0
    assert driver_facts() == {}


def test_unknown_native_error_is_a_failed_read() -> None:
    assert type(own_error(pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN), "x")).__name__ == "ReadFailed"


def test_lag_is_declared_only_where_it_is_known(open_source: Open) -> None:
    source, fake = open_source(gpu(counter=Sensor(lag_s=0.02)))
    assert not hasattr(source, "lag_s")
    known = NvmlSource(clock=fake.clock, lag_s=0.02)
    assert known.lag_s == 0.02
    known.close()
