"""`llem-ray measure` as a user runs it, in real time, against a fake driver whose true energy is known exactly.

The waveforms run on CLOCK_REALTIME and the window is on CLOCK_MONOTONIC: a confusion of the two would show as a wrong energy.
"""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llem_ray.testing.nvml import Fault, Gpu, Scenario, Sensor, Waveform, build, default_cache, environment

pytestmark = [pytest.mark.slow, pytest.mark.alone]

PREFILL_DECODE = Waveform.of([(0.0, 680, "step"), (0.08, 400, "step"), (0.55, 640, "step"), (0.64, 390, "step")], repeat_s=1.07)
SLOW = Waveform.of([(0.0, 150, "linear"), (7.0, 620, "linear"), (13.0, 150, "step")], repeat_s=13.1)
LOCKED = Waveform.of([(0.0, 650, "step"), (0.05, 150, "step")], repeat_s=0.1)
SENSORS = {"counter": Sensor(phase_s=0.031), "average": Sensor(window_s=1.0, phase_s=0.017)}


def gpu(name: str, waveform: Waveform, *faults: Fault, **changes: object) -> Gpu:
    return Gpu(uuid=name, waveform=waveform, faults=faults, **(SENSORS | changes))  # type: ignore[arg-type]


@dataclass
class Measured:
    """What a run of the command gave."""

    scenario: Scenario
    result: dict[str, Any]
    returncode: int
    stderr: str
    before_s: float
    """From the start of the process to the window."""
    after_s: float

    def device(self, uuid: str) -> dict[str, Any]:
        return next(device for device in self.result["devices"] if device["uuid"] == uuid)

    @property
    def window_s(self) -> tuple[float, float]:
        """Its edges in the scenario."""
        shift_ns = time.time_ns() - time.monotonic_ns()
        window = self.result["window"]
        return self.scenario.seconds(window["begin_ns"] + shift_ns), self.scenario.seconds(window["end_ns"] + shift_ns)

    def truth_j(self, uuid: str) -> float:
        return self.scenario.energy_j(uuid, *self.window_s)

    def error(self, uuid: str) -> float:
        return float(self.device(uuid)["energy_j"] / self.truth_j(uuid) - 1.0)


def measure(folder: Path, gpus: tuple[Gpu, ...], *command: str) -> Measured:
    library = build(default_cache())
    scenario = Scenario(gpus=gpus, clock="realtime", origin_ns=time.time_ns())
    environ = os.environ | environment(library, scenario.write(folder / "scenario.txt"))
    begin_s = time.monotonic()
    arguments = [sys.executable, "-m", "llem_ray", "measure", "--json", "--source", "nvml", "--", *command]
    done = subprocess.run(arguments, env=environ, capture_output=True, text=True, check=False)
    end_s = time.monotonic()
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    before_s, after_s = result["window"]["begin_ns"] / 1e9 - begin_s, end_s - result["window"]["end_ns"] / 1e9
    return Measured(scenario, result, done.returncode, done.stderr, before_s, after_s)


@pytest.fixture(scope="module")
def ten_seconds(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Good GPUs and ones that fail in the middle of the window, which begins as late as this machine needs to start."""
    fault_s = 9.0
    for number in range(4):
        measured = measure(
            tmp_path_factory.mktemp(f"ten-{number}"), failing_at(fault_s), "sh", "-c", "echo to stdout; sleep 10; exit 5"
        )
        begin_s, end_s = measured.window_s
        if begin_s + 1.0 < fault_s < end_s - 3.0:
            return measured
        fault_s = begin_s + 4.0
    pytest.fail(f"never did the window begin when it was expected to; the last one lay in {begin_s:.1f} to {end_s:.1f} s")


def failing_at(fault_s: float) -> tuple[Gpu, ...]:
    early, late = {"begin_s": fault_s, "end_s": fault_s + 2.0}, {"begin_s": fault_s}
    return (
        gpu("constant", Waveform.constant(300.0)),
        gpu("prefill-decode", PREFILL_DECODE),
        gpu("slow", SLOW),
        gpu("locked", LOCKED),
        gpu("lost", PREFILL_DECODE, Fault(kind="gpu_lost", **late)),
        gpu("reset", PREFILL_DECODE, Fault(kind="counter_reset", **late)),
        gpu("frozen", PREFILL_DECODE, Fault(kind="freeze", **early)),
        gpu("throttled", PREFILL_DECODE, Fault(kind="clock_events", value=0x40, **late)),
        gpu("no-counter", PREFILL_DECODE, has_counter=False, has_legacy_energy=False),
        gpu("denied", PREFILL_DECODE, Fault(kind="no_permission")),
        gpu("mig", PREFILL_DECODE, mig=True),
    )


GOOD = ("constant", "prefill-decode", "slow", "locked")


@pytest.mark.parametrize("uuid", GOOD)
def test_truth_is_inside_the_bound_and_near_the_energy(ten_seconds: Measured, uuid: str) -> None:
    device, truth_j = ten_seconds.device(uuid), ten_seconds.truth_j(uuid)
    low_j, high_j = device["bound_j"]
    assert low_j <= truth_j <= high_j
    assert low_j <= device["energy_j"] <= high_j
    # In 700 simulated windows the error was over three sigma in three, and 2 u / E 0.3 % at most.
    assert abs(device["energy_j"] - truth_j) <= 6 * device["u_j"]
    flags = {flag["code"] for flag in device["flags"]}
    assert 2 * device["u_j"] / device["energy_j"] <= (0.02 if "edge_gap" in flags else 0.005)
    assert device["method"] == "measured_counter"
    assert device["cross_check_j"] == pytest.approx(device["energy_j"], rel=0.03)
    assert [flag for flag in device["flags"] if flag["severity"] == "invalid"] == []


def test_the_error_is_small_beside_that_of_other_methods(ten_seconds: Measured) -> None:
    """The goal for ten seconds is 0.15 % RMS over many windows; of one window it may be three times that."""
    errors = [ten_seconds.error(uuid) for uuid in GOOD]
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) <= 0.0045, errors


@pytest.mark.parametrize(
    ("uuid", "code", "severity"),
    [
        ("lost", "gpu_lost", "invalid"),
        ("reset", "counter_reset", "invalid"),
        ("frozen", "counter_frozen", "invalid"),
        ("throttled", "throttled", "flag"),
    ],
)
def test_faults_are_flagged(ten_seconds: Measured, uuid: str, code: str, severity: str) -> None:
    flags = {flag["code"]: flag["severity"] for flag in ten_seconds.device(uuid)["flags"]}
    assert flags.get(code) == severity, flags


def test_without_a_counter_power_is_integrated(ten_seconds: Measured) -> None:
    device = ten_seconds.device("no-counter")
    assert device["method"] == "measured_power_integral"
    assert device["bound_j"] is None
    assert device["energy_j"] == pytest.approx(ten_seconds.truth_j("no-counter"), rel=0.2)


@pytest.mark.parametrize("uuid", ["denied", "mig"])
def test_what_cannot_be_measured_is_null_with_a_reason(ten_seconds: Measured, uuid: str) -> None:
    device = ten_seconds.device(uuid)
    assert (device["energy_j"], device["u_j"], device["bound_j"]) == (None, None, None)
    assert device["reason"]


def test_a_total_without_one_of_its_devices_is_null_and_names_it(ten_seconds: Measured) -> None:
    total = ten_seconds.result["total"]
    assert (total["energy_j"], total["u_j"]) == (None, None)
    assert "denied" in total["reason"]
    assert not any("mig" in cover for cover in total["covers"])


def test_the_command_is_passed_through(ten_seconds: Measured) -> None:
    assert ten_seconds.returncode == ten_seconds.result["exit_code"] == 5
    assert ten_seconds.stderr == "to stdout\n"
    assert ten_seconds.result["window"]["duration_s"] >= 10.0


def test_samples_are_taken_before_and_after_the_window(ten_seconds: Measured) -> None:
    assert ten_seconds.before_s >= 2.0 + 1.3
    assert ten_seconds.after_s >= 1.3


@pytest.fixture(scope="module")
def ten_milliseconds(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    gpus = (gpu("constant", Waveform.constant(300.0)), gpu("slow", SLOW))
    return measure(tmp_path_factory.mktemp("short"), gpus, "sleep", "0.01")


def test_a_command_shorter_than_a_tick_has_an_energy_with_its_uncertainty(ten_milliseconds: Measured) -> None:
    for uuid in ("constant", "slow"):
        device, truth_j = ten_milliseconds.device(uuid), ten_milliseconds.truth_j(uuid)
        assert device["bound_j"][0] <= truth_j <= device["bound_j"][1]
        assert abs(device["energy_j"] - truth_j) <= 4 * device["u_j"]
        flags = {flag["code"] for flag in device["flags"]}
        assert "short_window" in flags
        if "edge_gap" not in flags:
            assert device["u_j"] <= 0.5 * device["energy_j"], "still told from none, and from that of a whole tick"


def test_the_total_is_the_sum_of_what_it_covers(ten_milliseconds: Measured) -> None:
    result = ten_milliseconds.result
    assert result["total"]["covers"] == ["nvml/gpu/constant", "nvml/gpu/slow"]
    assert result["total"]["energy_j"] == pytest.approx(sum(device["energy_j"] for device in result["devices"]))
    assert result["total"]["u_j"] == pytest.approx(math.hypot(*(device["u_j"] for device in result["devices"])), rel=0.5)
    assert "cpu_package" in result["total"]["not_measured"]
