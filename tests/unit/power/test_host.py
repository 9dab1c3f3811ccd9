from __future__ import annotations

import os
from pathlib import Path

import pytest

from llem_ray.power.host import container_hint, cpu_model, host_id, read_host_facts


def test_host_id(monkeypatch):
    monkeypatch.setenv("LLEM_RAY_HOST_ID", "node-3")
    assert host_id() == "node-3"
    monkeypatch.delenv("LLEM_RAY_HOST_ID")
    assert host_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_facts_of_this_host():
    facts = read_host_facts()
    assert facts["cpu_count_logical"] == os.cpu_count()
    assert facts["kernel"] == os.uname().release
    assert facts["memory_bytes"] > 1e8
    assert {"hostname", "cpu_model", "cpu_governor", "container", "virtual_machine", "os", "python"} <= set(facts)


@pytest.mark.parametrize(
    ("cpuinfo", "model"),
    [
        (
            "processor\t: 0\nmodel name\t: AMD EPYC 9654 96-Core Processor\nflags\t: fpu hypervisor\n",
            "AMD EPYC 9654 96-Core Processor",
        ),
        ("processor : 0\nCPU part : 0xd4f\n", None),
        ("model name\t: unknown\n", None),
        ("", None),
    ],
)
def test_cpu_model(cpuinfo, model):
    assert cpu_model(cpuinfo) == model


def test_container_hints(tmp_path, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert container_hint(tmp_path) is None
    (tmp_path / "proc/1").mkdir(parents=True)
    (tmp_path / "proc/1/cgroup").write_text("0::/system.slice/containerd-abc.scope\n")
    assert container_hint(tmp_path) == "containerd"
    (tmp_path / ".dockerenv").touch()
    assert container_hint(tmp_path) == "docker"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert container_hint(tmp_path) == "kubernetes"
