from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

pytest.importorskip("codecarbon")

from llem_ray.power.codecarbon import CodecarbonSource
from llem_ray.testing.clock import VirtualClock


@pytest.fixture(scope="module")
def clock():
    return VirtualClock()


@pytest.fixture(scope="module")
def source(clock):
    opened = CodecarbonSource(clock=clock)
    yield opened
    opened.close()


def test_both_devices_are_estimates_with_a_band(source):
    cpu, ram = source.devices()
    assert (cpu.uuid, cpu.scope, cpu.method) == ("codecarbon:cpu", "cpu_package", "estimated_model")
    assert (ram.uuid, ram.scope, ram.method) == ("codecarbon:ram", "dram", "estimated_model")
    assert cpu.sensor_rel >= 2.5
    assert ram.sensor_rel >= 1.0


def test_a_busy_cpu_is_estimated_higher_than_an_idle_limit(source, clock):
    tdp_w = float(source.devices()[0].name.split(", ")[1].split()[0])
    clock.advance_ns(1_000_000_000)
    held = source.read()[0].power_mw
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    assert source.read()[0].power_mw == held
    clock.advance_ns(1_000_000_000)
    cpu, ram = source.read()
    busy = (1 / os.cpu_count()) * 0.5  # one core was ours half the time at least
    assert (0.1 + 0.9 * busy**3) * tdp_w <= cpu.power_mw / 1000 <= tdp_w
    assert ram.power_mw >= 3000
    assert cpu.energy_mj is None
    assert cpu.t_ns == clock.monotonic_ns()


def test_no_estimate_is_missing_not_zero(source, clock, monkeypatch):
    clock.advance_ns(1_000_000_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: 1 / 0)
    ram = source.read()[1]
    assert ram.power_mw is None
    assert "no estimate" in ram.error


def test_it_writes_nothing_anywhere(tmp_path):
    """In a fresh process with an empty home and working folder, and stderr watched for log lines."""
    script = (
        "import socket\n"
        "def refuse(*_): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "from llem_ray.power.codecarbon import CodecarbonSource\n"
        "source = CodecarbonSource(); source.read(); source.close()\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CODECARBON")} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
