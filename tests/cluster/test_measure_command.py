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

    def truth_j(self, uuid: str) -> float:
        shift_ns = time.time_ns() - time.monotonic_ns()
        window = self.result["window"]
        begin_s, end_s = (self.scenario.seconds(window[name] + shift_ns) for name in ("begin_ns", "end_ns"))
        return self.scenario.energy_j(uuid, begin_s, end_s)

    def error(self, uuid: str) -> float:
        return float(self.device(uuid)["energy_j"] / self.truth_j(uuid) - 1.0)


def measure(folder: Path, gpus: tuple[Gpu, ...], *command: str) -> Measured:
    scenario = Scenario(gpus=gpus, clock="realtime", origin_ns=time.time_ns())
    environ = os.environ | environment(build(default_cache()), scenario.write(folder / "scenario.txt"))
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
    """Good GPUs and ones that fail in the middle of the window, which begins 4 to 7 s after the scenario."""
    early, late = {"begin_s": 9.0, "end_s": 11.0}, {"begin_s": 9.0}
    gpus = (
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
    return measure(tmp_path_factory.mktemp("ten"), gpus, "sh", "-c", "echo to stdout; sleep 10; exit 5")


GOOD = ("constant", "prefill-decode", "slow", "locked")


@pytest.mark.parametrize("uuid", GOOD)
def test_truth_is_inside_the_bound_and_near_the_energy(ten_seconds: Measured, uuid: str) -> None:
    device, truth_j = ten_seconds.device(uuid), ten_seconds.truth_j(uuid)
    low_j, high_j = device["bound_j"]
    assert low_j <= truth_j <= high_j
    assert low_j <= device["energy_j"] <= high_j
    assert abs(device["energy_j"] - truth_j) <= 4 * device["u_j"]
    assert 2 * device["u_j"] / device["energy_j"] <= 0.0035
    assert device["method"] == "measured_counter"
    assert device["cross_check_j"] == pytest.approx(device["energy_j"], rel=0.03)
    assert [flag for flag in device["flags"] if flag["severity"] == "invalid"] == []


def test_the_error_is_within_the_goal_for_ten_seconds(ten_seconds: Measured) -> None:
    errors = [ten_seconds.error(uuid) for uuid in GOOD]
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) <= 0.0015, errors


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
        assert "short_window" in {flag["code"] for flag in device["flags"]}
        assert device["u_j"] <= 0.5 * device["energy_j"], "still told from none, and from that of a whole tick"


def test_the_total_is_the_sum_of_what_it_covers(ten_milliseconds: Measured) -> None:
    result = ten_milliseconds.result
    assert result["total"]["covers"] == ["nvml/gpu/constant", "nvml/gpu/slow"]
    assert result["total"]["energy_j"] == pytest.approx(sum(device["energy_j"] for device in result["devices"]))
    assert result["total"]["u_j"] == pytest.approx(math.hypot(*(device["u_j"] for device in result["devices"])), rel=0.5)
    assert "cpu_package" in result["total"]["not_measured"]
