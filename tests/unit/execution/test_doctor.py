"""The doctor goes on whatever an engine or a meter does to it."""

import platform
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from llem_ray.core import plugins
from llem_ray.core.errors import PowerPermissionDenied
from llem_ray.core.plugins import install_command
from llem_ray.execution.doctor import examine_host
from llem_ray.execution.interpreter import EngineCheck, probe_engine
from llem_ray.power.replay import ReplaySource
from llem_ray.testing.nvml import Gpu, Scenario, Waveform, fake_nvml


class DeniedSource:
    """Opens, and then may not list its devices."""

    name = "denied"
    max_hz = 1.0
    closed = False

    def devices(self) -> None:
        raise PowerPermissionDenied("the register is root's", "run as root")

    def close(self) -> None:
        type(self).closed = True


def healthy(name: str, interpreter: str | None, base_dir: str) -> EngineCheck:
    """Finds nothing wrong, and imports nothing."""
    return EngineCheck(
        name=name, interpreter=interpreter or "ours", python="3.12.0", importable=True, versions={}, device="cpu", problem=None
    )


def broken_source() -> None:
    raise OSError(5, "Input/output error")


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plug-ins of others, as if they were installed."""
    here = __name__
    found = {
        "llem_ray.backends": [
            EntryPoint("gone", "no_such_package.backend:Backend", "llem_ray.backends"),
            EntryPoint("crashes", f"{here}:missing_attribute", "llem_ray.backends"),
        ],
        "llem_ray.power_sources": [
            EntryPoint("denied", f"{here}:DeniedSource", "llem_ray.power_sources"),
            EntryPoint("broken", f"{here}:broken_source", "llem_ray.power_sources"),
            EntryPoint("replay", "llem_ray.power.replay:ReplaySource", "llem_ray.power_sources"),
        ],
    }
    monkeypatch.setattr(plugins, "entry_points", lambda group: found[group])


def test_what_does_not_work_is_told_and_the_rest_goes_on(strangers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLEM_RAY_REPLAY", raising=False)
    report = examine_host()
    engines = {engine.name: engine for engine in report.engines}
    assert not engines["gone"].importable
    assert "no_such_package" in (engines["gone"].problem or "")
    assert (engines["crashes"].problem or "").startswith("AttributeError: ")
    problems = {source.name: source.problem or "" for source in report.sources}
    assert problems["denied"] == "the register is root's\n  hint: run as root"
    assert problems["broken"] == "OSError: [Errno 5] Input/output error"
    assert "LLEM_RAY_REPLAY" in problems["replay"]
    assert DeniedSource.closed
    assert not report.can_measure


def test_gpus_are_listed_with_their_method() -> None:
    wave = Waveform.constant(100.0)
    with fake_nvml(Scenario(gpus=(Gpu(uuid="GPU-a", waveform=wave), Gpu(uuid="GPU-b", waveform=wave, mig=True)))):
        report = examine_host(probe=healthy)
    nvml = next(source for source in report.sources if source.name == "nvml")
    assert nvml.problem is None
    assert [(device.uuid, device.shared) for device in nvml.devices] == [("GPU-a", False), ("GPU-b", True)]
    assert report.can_measure
    assert {device.memory_bytes for device in nvml.devices} == {143_771 * 2**20}
    assert report.host["nvidia_driver"] == "570.86.15"


def test_a_recording_counts_as_a_meter(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.csv").write_text("t_s,device_uuid,power_w\n0,gpu,100\n1,gpu,100\n")
    monkeypatch.setenv("LLEM_RAY_REPLAY", str(tmp_path / "r.csv"))
    report = examine_host([("vllm", "/opt/vllm/bin/python")], probe=healthy)
    assert [(engine.name, engine.interpreter) for engine in report.engines][-1] == ("vllm", "/opt/vllm/bin/python")
    replay = next(source for source in report.sources if source.name == ReplaySource.name)
    assert [device.uuid for device in replay.devices] == ["gpu"]
    assert report.as_dict()["can_measure"] is True


def command(tmp_path: Path, script: str) -> str:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_an_interpreter_checks_an_engine_by_itself(tmp_path: Path) -> None:
    found = probe_engine("fake", sys.executable, str(tmp_path))
    assert (found.importable, found.problem, found.python) == (True, None, platform.python_version())
    assert found.interpreter == sys.executable


@pytest.mark.parametrize(
    ("script", "timeout_s", "says"),
    [
        ("echo no engine here >&2; exit 3", 60.0, "it ended with code 3 and no report: no engine here"),
        ("echo '{}' > report.json", 60.0, "it ended with code 0 and no report"),
        ("sleep 60 & wait", 0.5, "no answer within 0.5 s"),
        (None, 60.0, "no such interpreter"),
    ],
)
def test_an_interpreter_that_does_not_work_is_told(tmp_path: Path, script: str | None, timeout_s: float, says: str) -> None:
    path = command(tmp_path, script) if script else "absent/python"
    found = probe_engine("fake", path, str(tmp_path), timeout_s=timeout_s)
    assert not found.importable
    assert (found.problem or "").startswith(says)


def test_what_an_engine_lacks_is_told_with_the_command_of_its_interpreter(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.symlink_to(sys.executable)
    found = probe_engine("transformers", f"{bare} -S", str(tmp_path))
    assert "No module named 'torch'" in (found.problem or "")
    assert f"hint: {bare} -S -m {install_command('transformers')}" in (found.problem or "")


def test_an_unknown_engine_is_told() -> None:
    assert "unknown engine 'nothing'" in (probe_engine("nothing").problem or "")
