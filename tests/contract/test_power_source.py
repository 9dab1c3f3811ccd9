"""What every power source must do. A new source joins by a context manager below and a line in SOURCES."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.plugins import find_plugin, plugin_names
from llem_ray.core.power import DeviceState, Method, PowerSample, PowerSource, Scope
from llem_ray.power.nvml import NvmlSource
from llem_ray.power.rapl import RaplSource
from llem_ray.power.replay import ReplaySource
from llem_ray.testing.clock import VirtualClock
from llem_ray.testing.nvml import Gpu, Scenario, Waveform, fake_nvml


@dataclass
class Meter:
    """A source over a fake device that draws power all the time, and how to let time pass for it."""

    source: PowerSource
    clock: Clock
    pass_s: Callable[[float], None]
    power_w: dict[str, float] | None = None
    """True power by device; None where nobody knows it."""


@contextmanager
def nvml(tmp_path: Path) -> Iterator[Meter]:
    gpus = tuple(Gpu(uuid=f"GPU-{w}", waveform=Waveform.constant(w), latency_us=50.0) for w in (120.0, 640.0))
    with fake_nvml(Scenario(gpus=gpus)) as fake:
        power_w = {gpu.uuid: gpu.waveform.power_w(0.0) for gpu in gpus}
        yield Meter(NvmlSource(clock=fake.clock), fake.clock, lambda s: fake.clock.advance_ns(round(s * 1e9)), power_w)


@contextmanager
def rapl(tmp_path: Path) -> Iterator[Meter]:
    power_w = {"rapl:package-0": 150.0, "rapl:package-1": 90.0}
    clock = VirtualClock()
    folders = [tmp_path / f"intel-rapl:{i}" for i in range(2)]
    energy_uj = [5_000_000.0, 7_000_000.0]

    def write() -> None:
        for folder, uj in zip(folders, energy_uj, strict=True):
            part = folder / "energy_uj.part"
            part.write_text(f"{int(uj)}\n")
            with (folder / "energy_uj").open("r+b") as file:
                file.write(part.read_bytes())

    def pass_s(seconds: float) -> None:
        clock.advance_ns(round(seconds * 1e9))
        for i, watts in enumerate(power_w.values()):
            energy_uj[i] += watts * seconds * 1e6
        write()

    for i, folder in enumerate(folders):
        folder.mkdir()
        (folder / "name").write_text(f"package-{i}\n")
        (folder / "max_energy_range_uj").write_text("262143328850\n")
        (folder / "energy_uj").write_text("0\n")
    stop = threading.Event()

    def run_cpu() -> None:
        while not stop.wait(0.001):
            energy_uj[:] = [uj + 1000.0 for uj in energy_uj]
            write()

    busy = threading.Thread(target=run_cpu)
    busy.start()
    try:
        source = RaplSource(tmp_path, clock=clock)
    finally:
        stop.set()
        busy.join()
    yield Meter(source, clock, pass_s, power_w)


@contextmanager
def replay(tmp_path: Path) -> Iterator[Meter]:
    path = tmp_path / "recording.csv"
    rows = [f"{i / 10},GPU-r,300.0,300.0,{30.0 * i}" for i in range(600)]
    path.write_text("t_s,device_uuid,power_w,power_avg_w,energy_j\n" + "\n".join(rows) + "\n")
    clock = VirtualClock()
    yield Meter(ReplaySource(path, clock=clock), clock, lambda s: clock.advance_ns(round(s * 1e9)), {"GPU-r": 300.0})


@contextmanager
def codecarbon(tmp_path: Path) -> Iterator[Meter]:
    module = pytest.importorskip("llem_ray.power.codecarbon")
    yield Meter(module.CodecarbonSource(), SystemClock(), lambda s: None)


SOURCES: dict[str, Callable[[Path], AbstractContextManager[Meter]]] = {
    "nvml": nvml,
    "rapl": rapl,
    "replay": replay,
    "codecarbon": codecarbon,
}


@pytest.fixture(params=SOURCES, ids=str)
def meter(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Meter]:
    with SOURCES[request.param](tmp_path) as opened:
        assert opened.source.name == request.param
        yield opened
        opened.source.close()


def test_every_registered_source_keeps_the_contract() -> None:
    assert set(SOURCES) == set(plugin_names("llem_ray.power_sources"))
    for name in SOURCES:
        assert find_plugin("llem_ray.power_sources", name).value.startswith("llem_ray.power.")


def test_devices_are_distinct_named_and_fixed(meter: Meter) -> None:
    devices = meter.source.devices()
    assert devices
    assert len({device.uuid for device in devices}) == len(devices)
    for device in devices:
        assert device.name
        assert device.source == meter.source.name
        assert device.scope in get_args(Scope)
        assert device.method in get_args(Method)
        assert (device.reason is None) == (device.method != "unavailable")
        if device.counter_quantum_mj is not None:  # a recording's counter may have an unknown one
            assert device.method == "measured_counter"
            assert device.counter_quantum_mj > 0
    meter.pass_s(1.0)
    meter.source.read()
    assert meter.source.devices() == devices


def test_read_gives_one_stamped_sample_a_device_in_order(meter: Meter) -> None:
    assert meter.source.max_hz > 0
    for _ in range(3):
        meter.pass_s(0.2)
        before_ns = meter.clock.monotonic_ns()
        samples = meter.source.read()
        after_ns = meter.clock.monotonic_ns()
        assert [sample.device_uuid for sample in samples] == [device.uuid for device in meter.source.devices()]
        for sample in samples:
            assert isinstance(sample, PowerSample)
            assert before_ns <= sample.t_ns - sample.hw_ns
            assert sample.hw_ns >= 0
            assert sample.t_ns + sample.hw_ns <= after_ns + 1
        assert [sample.t_ns for sample in samples] == sorted(sample.t_ns for sample in samples)


def test_a_part_is_a_number_or_none_and_nothing_at_all_has_a_reason(meter: Meter) -> None:
    meter.pass_s(1.0)
    for sample in meter.source.read():
        parts = (sample.power_mw, sample.power_avg_mw, sample.energy_mj)
        assert all(part is None or math.isfinite(part) for part in parts)
        assert all(power is None or power > 0 for power in parts[:2])
        if all(part is None for part in parts):
            assert sample.error


def test_counters_never_fall_and_gain_the_true_energy(meter: Meter) -> None:
    meter.pass_s(2.0)
    first = {sample.device_uuid: sample.energy_mj for sample in meter.source.read()}
    last = dict(first)
    for _ in range(100):
        meter.pass_s(0.1)
        for sample in meter.source.read():
            if sample.energy_mj is not None and last[sample.device_uuid] is not None:
                assert sample.energy_mj >= last[sample.device_uuid]
                last[sample.device_uuid] = sample.energy_mj
    counted = {device.uuid for device in meter.source.devices() if device.method == "measured_counter"}
    for uuid in counted if meter.power_w is not None else ():
        gain_mj = last[uuid] - first[uuid]
        assert gain_mj == pytest.approx(10.0 * meter.power_w[uuid] * 1e3, rel=0.02)


def test_power_is_the_true_power(meter: Meter) -> None:
    meter.pass_s(2.0)
    for sample in meter.source.read():
        for power_mw in (sample.power_mw, sample.power_avg_mw):
            if power_mw is not None and meter.power_w is not None:
                assert power_mw == pytest.approx(1e3 * meter.power_w[sample.device_uuid], rel=1e-3)


def test_states_belong_to_the_devices(meter: Meter) -> None:
    states = meter.source.read_states()
    assert all(isinstance(state, DeviceState) for state in states)
    assert {state.device_uuid for state in states} <= {device.uuid for device in meter.source.devices()}


def test_close_may_be_repeated_and_leaks_no_file(tmp_path: Path) -> None:
    for name, open_meter in SOURCES.items():
        folder = tmp_path / name
        folder.mkdir()
        with open_meter(folder) as meter:
            meter.source.close()  # the first source of its kind may leave caches open in libraries
            meter.source.close()
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    for name in ("nvml", "rapl", "replay"):
        folder = tmp_path / f"{name}-again"
        folder.mkdir()
        with SOURCES[name](folder) as meter:
            meter.source.read()
            meter.source.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files
