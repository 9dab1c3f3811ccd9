"""Asks an interpreter what it can do with an engine, in a process that cannot hang or crash this one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import llem_ray
from llem_ray.backends.process.proxy import find_command
from llem_ray.core.errors import ConfigError, PluginError
from llem_ray.core.plugins import EXTRAS, find_plugin, install_command

PROBE_TIMEOUT_S: Final = 120.0
"""vLLM's import takes 7 s on a free machine."""

_NOT_INHERITED: Final = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONEXECUTABLE", "VIRTUAL_ENV")
_PIP: Final = "pip install "
_OUTPUT_CHARS: Final = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCheck:
    """One inference engine in one interpreter."""

    name: str
    interpreter: str
    """Path or command of the interpreter."""
    python: str | None
    """Its version; None where it did not answer."""
    importable: bool
    """The engine is there and its own check passes."""
    versions: Mapping[str, str]
    """Package -> version."""
    device: str | None
    """What it could use; None where that is not known."""
    problem: str | None
    """Why it does not work there, and what to do about it."""


def probe_engine(name: str, command: str | None = None, base_dir: str = ".", timeout_s: float = PROBE_TIMEOUT_S) -> EngineCheck:
    """Have an interpreter import an engine and check it with a tiny model. Never raises for what does not work there.

    Args:
        name: The engine.
        command: Interpreter or command as ``engine.python`` has it; None: this one.
        base_dir: Folder that a relative path starts from.
        timeout_s: Deadline; then all processes of the probe are killed.
    """
    shown = command or sys.executable
    try:
        target = find_plugin("llem_ray.backends", name).value
        words = find_command(command, base_dir) if command is not None else (sys.executable,)
    except (ConfigError, PluginError) as error:
        return _failed(
            name, shown, " ".join(filter(None, (error.message, error.found if isinstance(error, ConfigError) else None)))
        )
    with tempfile.TemporaryDirectory(prefix="llem-ray-doctor-") as folder:
        report = _run(name, target, words, Path(folder), own=command is None, timeout_s=timeout_s)
    if isinstance(report, str):
        return _failed(name, shown, report)
    problem, hint = report["problem"], report["hint"]
    if problem is not None and (hint is None or hint.startswith(_PIP)):
        hint = _hint(name, command) if hint is None else f"{command} -m {hint}" if command is not None else hint
    return EngineCheck(
        name=name,
        interpreter=shown,
        python=report["python"],
        importable=problem is None,
        versions=report["versions"],
        device=report["device"],
        problem=f"{problem}\n  hint: {hint}" if problem and hint else problem,
    )


def _hint(name: str, command: str | None) -> str | None:
    extra = EXTRAS.get(name)
    if extra is None:
        return None
    return f"{f'{command} -m ' if command is not None else ''}{install_command(extra)}"


def _failed(name: str, interpreter: str, problem: str) -> EngineCheck:
    return EngineCheck(
        name=name, interpreter=interpreter, python=None, importable=False, versions={}, device=None, problem=problem
    )


def _run(name: str, target: str, command: Sequence[str], folder: Path, *, own: bool, timeout_s: float) -> dict[str, Any] | str:
    """The probe's report, or why there is none."""
    environment = {key: value for key, value in os.environ.items() if own or key not in _NOT_INHERITED}
    (folder / "path").mkdir()
    (folder / "path" / "llem_ray").symlink_to(Path(llem_ray.__file__).parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder / "path"), environment.get("PYTHONPATH"))))
    report = folder / "report.json"
    arguments = ["-m", "llem_ray.backends.process.probe", "--engine", name, "--target", target, "--report", str(report)]
    with (folder / "output").open("w+b") as output:
        try:
            process = subprocess.Popen(
                [*command, *arguments],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot be executed: {error.strerror}"
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"no answer within {timeout_s:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the engine's helpers, too
            process.wait()
        with contextlib.suppress(OSError, ValueError):
            answer = json.loads(report.read_text(encoding="utf-8"))
            if isinstance(answer, dict) and {"python", "versions", "device", "problem", "hint"} <= answer.keys():
                return answer
        output.seek(0)
        said = " ".join(output.read().decode(errors="replace").split())[-_OUTPUT_CHARS:]
    return f"it ended with code {code} and no report" + (f": {said}" if said else "")
