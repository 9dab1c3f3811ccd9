"""Faults of a GPU, injected into the driver's library and measured by the whole path: the right flag, never a wrong joule.

Fake NVML -> nvidia-ml-py -> NvmlSource -> SamplerLoop -> TraceBuffer -> read_window. One GPU a fault, all sampled together.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from llem_ray.core.energy import EnergyReading, Window
from llem_ray.core.measure_spec import GateSpec
from llem_ray.energy.estimator import edge_margin_s, read_window
from llem_ray.energy.validity import check_foreign_load
from llem_ray.power.nvml import NvmlSource
from llem_ray.power.sampler import SamplerLoop
from llem_ray.power.traces import TraceBuffer
from llem_ray.testing.nvml import Fault, Gpu, Scenario, Sensor, Waveform, fake_nvml

BEGIN_S, END_S, STOP_S = 5.0, 15.0, 19.0
WAVE = Waveform(((0.0, 90.0, "step"), (BEGIN_S, 400.0, "step"), (END_S, 90.0, "step")))
POWERS = ("instant", "average", "legacy")


def gpu(name: str, *faults: Fault, **changes: object) -> Gpu:
    phases = {"counter": Sensor(phase_s=0.037), "average": Sensor(window_s=1.0, phase_s=0.037)}
    return Gpu(uuid=name, waveform=WAVE, faults=faults, **(phases | changes))


GPUS = (
    gpu("clean"),
    gpu("counter_reset", Fault(kind="counter_reset", begin_s=10.0)),
    gpu("counter_reset_high", Fault(kind="counter_reset", begin_s=10.0, value=9e8)),
    gpu("reset_before", Fault(kind="counter_reset", begin_s=4.0)),
    gpu("freeze", Fault(kind="freeze", begin_s=8.0, end_s=12.0)),
    gpu("freeze_to_the_end", Fault(kind="freeze", begin_s=8.0)),
    gpu("lost", Fault(kind="gpu_lost", begin_s=8.0)),
    gpu("lost_before", Fault(kind="gpu_lost", begin_s=3.0)),
    gpu("timeouts", Fault(kind="timeout", begin_s=8.0, end_s=10.0)),
    gpu("timeouts_at_the_edge", Fault(kind="timeout", begin_s=14.7, end_s=15.2)),
    gpu("denied", Fault(kind="no_permission", begin_s=4.0)),
    gpu("zero_counter", Fault(kind="zero_reading", begin_s=8.0, end_s=8.3, targets=("counter",))),
    gpu("zero_power", Fault(kind="zero_reading", begin_s=8.0, end_s=12.0, targets=POWERS)),
    gpu("hot", Fault(kind="temperature", begin_s=9.0, value=71.0)),
    gpu("throttled", Fault(kind="clock_events", begin_s=9.0, end_s=11.0, value=0x40)),
    gpu("capped", Fault(kind="clock_events", begin_s=9.0, end_s=11.0, value=0x04)),
    gpu("over_its_limit", power_limit_w=200.0),
    gpu("gain", counter=Sensor(phase_s=0.037, gain=1.1)),
    gpu("no_average", has_average=False, compute_capability=(8, 0)),
    gpu("no_counter", has_counter=False, has_legacy_energy=False),
    gpu("nothing", *(), has_counter=False, has_legacy_energy=False, has_instant=False, has_average=False, has_legacy_power=False),
    gpu("mig", mig=True),
    gpu("module", module_extra_w=120.0, power_limit_w=1000.0),
    gpu("foreign", memory_used_bytes=3 * 2**30),
)


@dataclass
class Measured:
    """A sampled scenario."""

    scenario: Scenario
    loop: SamplerLoop
    traces: TraceBuffer

    def window(self, begin_s: float = BEGIN_S, end_s: float = END_S) -> Window:
        begin_ns, end_ns = (self.scenario.origin_ns + round(t_s * 1e9) for t_s in (begin_s, end_s))
        return Window(node="n", begin_ns=begin_ns, end_ns=end_ns)

    def read(self, uuid: str, begin_s: float = BEGIN_S, end_s: float = END_S) -> EnergyReading:
        info, window = self.loop.info(), self.window(begin_s, end_s)
        calibration, period_s = info.calibrations[uuid], info.periods_s.get(uuid, 0.05)
        margin_ns = round(edge_margin_s(calibration, period_s) * 1e9)
        return read_window(
            device=next(device for device in info.devices if device.uuid == uuid),
            calibration=calibration,
            trace=self.traces.trace(uuid, window.begin_ns - margin_ns, window.end_ns + margin_ns),
            window=window,
            sample_period_s=period_s,
            gates=GateSpec(),
            idle_power_w=90.0,
            states=self.traces.states(uuid, window.begin_ns - 2_000_000_000, window.end_ns),
        )


def measure(gpus: tuple[Gpu, ...]) -> Iterator[Measured]:
    scenario = Scenario(gpus=gpus)
    with fake_nvml(scenario) as fake:
        loop = SamplerLoop([NvmlSource(clock=fake.clock, lag_s=0.0)], node="n", clock=fake.clock)
        loop.calibrate(2.0)
        loop.run_until(scenario.origin_ns + round(STOP_S * 1e9))
        traces = TraceBuffer()
        for batch in loop.fetch(0, flush=True):
            traces.append(batch)
        yield Measured(scenario, loop, traces)
        loop.close()


@pytest.fixture(scope="module")
def measured() -> Iterator[Measured]:
    yield from measure(GPUS)


def codes(reading: EnergyReading) -> set[str]:
    return {flag.code for flag in reading.flags}


@pytest.mark.parametrize(
    ("uuid", "wanted", "valid"),
    [
        ("clean", set(), True),
        ("counter_reset", {"counter_reset"}, False),
        ("counter_reset_high", {"counter_reset"}, False),
        ("reset_before", set(), True),
        ("freeze", {"counter_frozen"}, False),
        ("freeze_to_the_end", {"counter_frozen"}, False),
        ("timeouts", {"dropped_samples"}, False),
        ("timeouts_at_the_edge", {"edge_gap"}, True),
        ("zero_counter", {"zero_reading"}, True),
        ("hot", {"not_thermally_stable"}, True),
        ("throttled", {"throttled"}, True),
        ("capped", {"power_capped"}, True),
        ("over_its_limit", {"implausible"}, False),
        ("gain", {"counter_mismatch"}, False),
        ("no_average", {"no_cross_check"}, True),
        ("zero_power", {"no_cross_check"}, True),
        ("no_counter", {"no_cross_check"}, True),
        ("module", set(), True),
    ],
)
def test_fault_gets_its_flag(measured: Measured, uuid: str, wanted: set[str], valid: bool) -> None:
    reading = measured.read(uuid)
    assert wanted <= codes(reading), reading
    assert reading.valid == valid, reading
    if not wanted:
        assert not codes(reading)


@pytest.mark.parametrize("uuid", ["lost", "lost_before", "denied", "nothing", "mig"])
def test_a_gpu_that_cannot_be_measured_gives_no_valid_energy(measured: Measured, uuid: str) -> None:
    reading = measured.read(uuid)
    assert not reading.valid
    assert reading.reason or reading.flags


@pytest.mark.parametrize(
    ("uuid", "code"), [("lost", "gpu_lost"), ("timeouts", "timeout"), ("denied", "no_permission"), ("zero_power", "zero_reading")]
)
def test_the_reason_of_every_missing_reading_arrives(measured: Measured, uuid: str, code: str) -> None:
    window = measured.window()
    errors = measured.traces.errors(uuid, window.begin_ns, window.end_ns)
    assert len(errors) > 30
    assert all(text.startswith(code + ":") for _, text in errors)


@pytest.mark.parametrize("uuid", [gpu.uuid for gpu in GPUS])
def test_a_joule_called_valid_is_true_and_none_is_negative(measured: Measured, uuid: str) -> None:
    for begin_s, end_s in ((BEGIN_S, END_S), (6.0, 8.5), (9.5, 11.5), (12.5, 12.7)):
        reading = measured.read(uuid, begin_s, end_s)
        assert reading.energy_j is None or reading.energy_j >= 0
        if reading.valid:
            truth_j = measured.scenario.energy_j(uuid, begin_s, end_s)
            known_rel = 0.1 if uuid == "gain" else 0.0  # a gain error is systematic: only the cross-check can see it
            assert abs(reading.energy_j - truth_j) <= 3 * reading.u_j + known_rel * truth_j + 0.001, reading
        if reading.bound_j is not None and uuid not in ("gain", "over_its_limit"):
            assert reading.bound_j[0] <= measured.scenario.energy_j(uuid, begin_s, end_s) <= reading.bound_j[1]


def test_methods_say_what_was_measured(measured: Measured) -> None:
    assert measured.read("clean").method == "measured_counter"
    assert measured.read("no_counter").method == "measured_power_integral"
    assert measured.read("counter_reset").method == "measured_power_integral"
    assert measured.read("nothing").method == "unavailable"
    assert (measured.read("module").scope, measured.read("clean").scope) == ("module", "gpu")


def test_a_short_window_is_flagged(measured: Measured) -> None:
    assert codes(measured.read("clean", 7.0, 7.2)) >= {"short_window"}


def test_memory_in_use_before_the_load_is_a_foreign_process(measured: Measured) -> None:
    window = measured.window(2.0, 4.0)
    for uuid, flagged in (("foreign", True), ("clean", False)):
        states = measured.traces.states(uuid, window.begin_ns, window.end_ns)
        assert states
        assert bool(check_foreign_load(memory_used_bytes=states[-1].memory_used_bytes)) == flagged


def test_slow_calls_are_noted_and_flagged() -> None:
    slow = gpu("slow", Fault(kind="slow_call", begin_s=6.0, end_s=14.0, value=30_000.0))
    for measured in measure((slow,)):
        reading = measured.read("slow")
        assert codes(reading) & {"dropped_samples", "edge_gap"}, reading
        assert any("slowed down" in note for note in measured.loop.info().notes)
        truth_j = measured.scenario.energy_j("slow", BEGIN_S, END_S)
        assert abs(reading.energy_j - truth_j) <= 3 * reading.u_j


def test_one_lost_gpu_does_not_disturb_its_neighbours(measured: Measured) -> None:
    alone = list(measure((replace(GPUS[0], uuid="clean"),)))
    assert measured.read("clean").energy_j == pytest.approx(alone[0].read("clean").energy_j, rel=1e-6)
