import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from llem_ray.cli.main import main
from llem_ray.core import plugins

SWEEP = """\
schema_version: 1
name: tiny
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu}
  workload: {input_tokens: 8, output_tokens: 4}
sweep:
  workload.batch_size: [1, 2]
repeats: 2
measure: {min_window_s: 0.2, idle_baseline_s: 0, sources: [replay], gates: {min_coverage: 0.05}}
"""


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def llem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs ``llem-ray`` in this process, in a folder of its own; terminals are 80 columns wide.

    What a command sets in the environment for Ray is gone with the test.
    """
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("LLEM_RAY_RESULTS", raising=False)

    def call(*args: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        captured = capfd.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Ended(code, captured.out, captured.err)

    yield call
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recorded CPU package that draws 50 W for two minutes; the power source ``replay`` plays it."""
    path = tmp_path / "recording.csv"
    rows = (f"{i / 50},package,50,{i},cpu_package" for i in range(6000))
    path.write_text("\n".join(["t_s,device_uuid,power_w,energy_j,scope", *rows]) + "\n")
    monkeypatch.setenv("LLEM_RAY_REPLAY", str(path))
    return path


@pytest.fixture
def only_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine but ``fake``, as if no other were registered: the doctor would import them."""
    registered = plugins.entry_points

    def fewer(group: str) -> list[EntryPoint]:
        return [entry for entry in registered(group=group) if entry.name == "fake" or group != "llem_ray.backends"]

    monkeypatch.setattr(plugins, "entry_points", fewer)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two cells x 2 repeats on the fake engine."""
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP)
    return path
