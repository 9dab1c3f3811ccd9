"""Builds the fake ``libnvidia-ml.so.1`` with the host's C compiler and loads it in front of pynvml."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Final

from llem_ray.testing.nvml.scenario import Scenario

LIBRARY_NAME: Final = "libnvidia-ml.so.1"
SCENARIO_VARIABLE: Final = "LLEM_RAY_FAKE_NVML_SCENARIO"


def build(dest: Path) -> Path:
    """Compile the library below ``dest``, unless this very source is there already; returns the path of the library.

    Raises:
        RuntimeError: There is no C compiler, or it failed; the text is the compiler's.
    """
    source = resources.files("llem_ray.testing.nvml").joinpath("fake_nvml.c").read_bytes()
    folder = dest / hashlib.sha256(source).hexdigest()[:16]
    library = folder / LIBRARY_NAME
    if library.is_file():
        return library
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("the fake NVML needs a C compiler: install gcc, or set CC")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest) as scratch:
        made = Path(scratch) / LIBRARY_NAME
        flags = ["-O2", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{LIBRARY_NAME}", "-o", str(made), "-lm"]
        done = subprocess.run([compiler, *flags], input=source, capture_output=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{compiler} could not build the fake NVML:\n{done.stderr.decode(errors='replace')}")
        made.replace(library)  # whole or absent, also when two processes build at once
    return library


def default_cache() -> Path:
    """Folder that keeps the built library between runs: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llem-ray" / "fake-nvml"


def environment(library: Path, scenario_file: Path, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables that give a new process the fake NVML: the dynamic loader finds it before a real one.

    Args:
        library: What ``build`` returned.
        scenario_file: What ``Scenario.write`` wrote.
        base: Where a present LD_LIBRARY_PATH is taken from; default: this process's environment.
    """
    present = (os.environ if base is None else base).get("LD_LIBRARY_PATH")
    path = f"{library.parent}:{present}" if present else str(library.parent)
    return {"LD_LIBRARY_PATH": path, SCENARIO_VARIABLE: str(scenario_file)}


class NvmlClock:
    """A virtual monotonic clock that the fake NVML shares: a reading is taken at the time this clock shows.

    A slow call of the fake moves it, as it would move a real clock.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._time_ns = library.fake_nvml_time_ns
        self._time_ns.restype = ctypes.c_int64
        self._set_time_ns = library.fake_nvml_set_time_ns
        self._set_time_ns.argtypes = [ctypes.c_uint64]
        self._set_time_ns.restype = None

    def monotonic_ns(self) -> int:
        """Now, in ns."""
        return int(self._time_ns())

    def sleep_until_ns(self, t_ns: int) -> None:
        """Jump to ``t_ns``; never back."""
        if t_ns > self.monotonic_ns():
            self._set_time_ns(t_ns)

    def advance_ns(self, duration_ns: int) -> None:
        """Let ``duration_ns`` pass."""
        self._set_time_ns(self.monotonic_ns() + duration_ns)


class FakeNvml:
    """The fake library in this process, with a scenario in it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._library.fake_nvml_load.argtypes = [ctypes.c_char_p]
        self._library.fake_nvml_message.restype = ctypes.c_char_p
        self._library.fake_nvml_unload.restype = None
        self.clock = NvmlClock(library)

    @property
    def init_count(self) -> int:
        """How many nvmlInit calls have no nvmlShutdown yet."""
        return int(self._library.fake_nvml_init_count())

    def load(self, scenario: Scenario) -> None:
        """Replace the scenario. Devices keep their handles; a virtual clock restarts at the scenario's origin.

        Raises:
            ValueError: The library refused the scenario.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = scenario.write(Path(folder) / "scenario.txt")
            if self._library.fake_nvml_load(os.fsencode(path)) != 0:
                raise ValueError(self._library.fake_nvml_message().decode())

    def unload(self) -> None:
        """Forget the scenario and every nvmlInit; nvmlInit then finds no driver."""
        self._library.fake_nvml_unload()


@contextmanager
def fake_nvml(scenario: Scenario, cache: Path | None = None) -> Iterator[FakeNvml]:
    """The fake NVML in this process: whatever loads ``libnvidia-ml.so.1`` from now on gets it, since glibc matches the SONAME.

    A process that has already loaded the real library keeps that one. On exit the scenario is unloaded, and the fake then
    says that no driver is loaded.

    Args:
        scenario: What it pretends.
        cache: Folder for the built library; default: ``default_cache()``.

    Raises:
        RuntimeError: The library could not be built.
        ValueError: It refused the scenario.
    """
    library = ctypes.CDLL(str(build(cache or default_cache())))
    fake = FakeNvml(library)
    fake.load(scenario)
    try:
        yield fake
    finally:
        fake.unload()
