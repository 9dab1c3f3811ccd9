"""`measure` as a command: what goes where, and which exit code is whose. The meter is a recording."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

KEYS = {"uuid", "name", "source", "scope", "method", "energy_j", "u_j", "bound_j", "cross_check_j", "sensor_rel", "flags"}


@dataclass(frozen=True)
class Ended:
    """What a process left behind."""

    code: int
    out: bytes
    err: bytes


def start(folder: Path, name: str, *args: str) -> subprocess.Popen[bytes]:
    """Its output goes to files: a pipe would be held open by what the command leaves behind."""
    command = [sys.executable, "-m", "llem_ray", "measure", *args]
    environ = os.environ | {"LLEM_RAY_REPLAY": str(folder / "recording.csv")}
    with (folder / f"{name}.out").open("wb") as out, (folder / f"{name}.err").open("wb") as err:
        return subprocess.Popen(command, cwd=folder, env=environ, stdout=out, stderr=err)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Several at once, since each waits for seconds."""
    folder = tmp_path_factory.mktemp("measure")
    rows = (f"{i / 50},gpu-a,200,200,{4 * i},gpu\n{i / 50},package,50,,,cpu_package" for i in range(4000))
    (folder / "recording.csv").write_text("\n".join(["t_s,device_uuid,power_w,power_avg_w,energy_j,scope", *rows]) + "\n")
    replay = ("--source", "replay", "--")
    messy = r"printf '\377\000'; echo complaint >&2; sleep 60 & echo $! > pid; kill -TERM $$"
    commands = {
        "json": ("--json", *replay, "sh", "-c", "echo result; sleep 1.5; exit 3"),
        "messy": ("--json", *replay, "sh", "-c", messy),
        "plain": (*replay, "sh", "-c", "echo result; sleep 0.5; exit 9"),
        "stopped": ("--json", *replay, "sh", "-c", "echo started >&2; exec sleep 60"),
        "estimate": ("--json", "--source", "codecarbon", "--", "true"),
    }
    processes = {name: start(folder, name, *args) for name, args in commands.items()}
    while not (folder / "stopped.err").read_bytes():
        assert processes["stopped"].poll() is None
        time.sleep(0.05)
    processes["stopped"].send_signal(signal.SIGTERM)
    codes = {name: process.wait() for name, process in processes.items()}
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    outputs = {name: [(folder / f"{name}.{kind}").read_bytes() for kind in ("out", "err")] for name in commands}
    return {name: Ended(codes[name], *outputs[name]) for name in commands}


def test_the_documented_object(ended: dict[str, Ended]) -> None:
    result = json.loads(ended["json"].out)
    window = result["window"]
    assert window["duration_s"] == pytest.approx((window["end_ns"] - window["begin_ns"]) / 1e9)
    assert window["duration_s"] >= 1.5
    assert [device["uuid"] for device in result["devices"]] == ["gpu-a", "package"]
    for device in result["devices"]:
        assert set(device) >= KEYS
        assert device["reason"] is None
    gpu, package = result["devices"]
    assert gpu["energy_j"] == pytest.approx(200 * window["duration_s"], rel=0.01)
    assert gpu["bound_j"][0] <= gpu["energy_j"] <= gpu["bound_j"][1]
    assert gpu["cross_check_j"] == pytest.approx(gpu["energy_j"], rel=0.05)
    assert (package["method"], package["bound_j"]) == ("measured_power_integral", None)
    assert result["total"]["energy_j"] == pytest.approx(gpu["energy_j"] + package["energy_j"])
    assert result["total"]["covers"] == ["replay/gpu/gpu-a", "replay/cpu_package/package"]
    assert result["estimates"] == []
    assert result["exit_code"] == ended["json"].code == 3


def test_under_json_the_commands_output_is_on_stderr(ended: dict[str, Ended]) -> None:
    assert ended["json"].err == b"result\n"


def test_bytes_signals_and_grandchildren_do_no_harm(ended: dict[str, Ended]) -> None:
    assert ended["messy"].err == b"\xff\x00complaint\n"
    assert ended["messy"].code == 128 + signal.SIGTERM
    assert json.loads(ended["messy"].out)["exit_code"] == 128 + signal.SIGTERM


def test_a_result_is_printed_although_we_were_told_to_end(ended: dict[str, Ended]) -> None:
    assert ended["stopped"].code == 128 + signal.SIGTERM
    result = json.loads(ended["stopped"].out)
    assert result["devices"][0]["energy_j"] > 0


def test_without_json_stdout_is_the_commands_and_the_result_is_for_people(ended: dict[str, Ended]) -> None:
    assert ended["plain"].code == 9
    assert ended["plain"].out == b"result\n"
    text = ended["plain"].err.decode()
    for part in ("exit code 9", "replay of gpu-a [gpu-a]: ", "total: ", " J, ", " W", "short_window", "not measured: dram"):
        assert part in text


def test_an_estimate_is_never_a_measurement(ended: dict[str, Ended]) -> None:
    result = json.loads(ended["estimate"].out)
    assert ended["estimate"].code == 0
    assert result["devices"] == []
    assert (result["total"]["energy_j"], result["total"]["u_j"], result["total"]["covers"]) == (None, None, [])
    assert "nothing here measures" in result["total"]["reason"]
    assert {device["method"] for device in result["estimates"]} == {"estimated_model"}
    assert all(device["energy_j"] > 0 for device in result["estimates"])


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ([], 125, "Missing argument 'COMMAND...'"),
        (["--jsn", "--", "true"], 125, "--json"),
        (["--hz", "0", "--", "true"], 125, "--hz"),
        (["--source", "wattmeter", "--", "true"], 125, "unknown power source 'wattmeter'; known: codecarbon, nvml, rapl, replay"),
        (["--source", "replay", "--", "true"], 125, "set LLEM_RAY_REPLAY"),
        (["--", "no-such-program", "--json"], 127, "'no-such-program' cannot be started: No such file or directory"),
        (["--json", "/"], 126, "'/' cannot be started: Permission denied"),
    ],
)
def test_failures_of_its_own(llem, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, says: str) -> None:
    monkeypatch.delenv("LLEM_RAY_REPLAY", raising=False)
    left = llem("measure", *args)
    assert left.code == code
    assert says in left.err
    assert left.out == ""


def test_a_bad_recording_is_its_own_failure(llem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.csv").write_text("t_s,device_uuid,power_w\n0,gpu,much\n")
    monkeypatch.setenv("LLEM_RAY_REPLAY", "bad.csv")
    left = llem("measure", "--source", "replay", "--", "true")
    assert left.code == 125
    assert "bad.csv:2: power_w: is not a number" in left.err
