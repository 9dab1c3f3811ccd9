from __future__ import annotations

import pytest

from llem_ray.core.errors import ConfigError, PluginError, PowerError, SourceUnavailable
from llem_ray.power.sources import close_sources, count_gpus, measures_cpu, open_sources
from llem_ray.testing.nvml import Gpu, Scenario, Waveform, fake_nvml


@pytest.fixture
def bare_host(tmp_path, monkeypatch):
    """No RAPL; and NVML as this host has it."""
    monkeypatch.setenv("LLEM_RAY_POWERCAP_ROOT", str(tmp_path))
    monkeypatch.delenv("LLEM_RAY_REPLAY", raising=False)


@pytest.fixture
def recording(tmp_path, monkeypatch):
    path = tmp_path / "trace.csv"
    path.write_text("t_s,device_uuid,power_w,scope\n0,cpu-0,100,cpu_package\n")
    monkeypatch.setenv("LLEM_RAY_REPLAY", str(path))
    return path


def test_unknown_source_names_the_known_ones():
    with pytest.raises(PluginError, match=r"nvlm.*codecarbon, nvml, rapl, replay"):
        open_sources(["nvlm"])


def test_a_named_source_must_work(bare_host):
    with pytest.raises(SourceUnavailable, match="RAPL"):
        open_sources(["rapl"])


def test_what_was_opened_is_closed_when_a_later_one_fails(bare_host, recording, monkeypatch):
    closed = []

    def close(source):
        closed.append(source)

    monkeypatch.setattr("llem_ray.power.replay.ReplaySource.close", close)
    with pytest.raises(PowerError):
        open_sources(["replay", "rapl"])
    assert len(closed) == 1


def test_names_are_opened_once_in_order(recording):
    sources, unavailable = open_sources(["replay", "replay"])
    assert ([s.name for s in sources], unavailable) == (["replay"], {})
    assert measures_cpu(sources)
    close_sources(sources)


def test_no_names_no_sources():
    assert open_sources([]) == ([], {})


def test_auto_estimates_the_cpu_where_nothing_measures_it(bare_host):
    sources, unavailable = open_sources("auto")
    names = {source.name for source in sources}
    assert names | set(unavailable) == {"nvml", "rapl", "codecarbon"}
    assert "no CPU package" in unavailable["rapl"]
    assert "replay" not in names | set(unavailable)
    assert not measures_cpu(sources)
    close_sources(sources)


def test_bad_settings_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LLEM_RAY_REPLAY", str(tmp_path / "missing.csv"))
    with pytest.raises(ConfigError, match="cannot be read"):
        open_sources(["replay"])


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [(None, 3), ("", 0), ("-1", 0), ("2", 1), ("0,1,2,3,4", 3), ("GPU-0,GPU-1", 2), ("1,-1,2", 1), ("none", 0)],
)
def test_gpus_that_the_user_hid_are_not_there(visible: str | None, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray leases no others, so a plan must not count on them."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    wave = Waveform(((0.0, 100.0, "step"),))
    with fake_nvml(Scenario(gpus=tuple(Gpu(uuid=f"GPU-{i}", waveform=wave) for i in range(3)))):
        assert count_gpus() == gpus
