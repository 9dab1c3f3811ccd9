from __future__ import annotations

import pytest

from llem_ray.core.errors import ConfigError, SourceUnavailable
from llem_ray.power.replay import ReplaySource, read_recording

S = 1_000_000_000

TWO_GPUS = """\
t_s,device_uuid,power_w,energy_j
100.0,GPU-a,300,5000
100.1,GPU-a,310,5030.5
100.15,GPU-b,200,
100.2,GPU-a,,5061
100.3,GPU-a,330,5094
"""


@pytest.fixture
def recorded(tmp_path, clock):
    def write(text=TWO_GPUS, **options):
        path = tmp_path / "trace.csv"
        path.write_text(text)
        return ReplaySource(path, clock=clock, **options)

    return write


def at(source, clock, begin, s):
    clock.sleep_until_ns(begin + round(s * S))
    return source.read()


def test_holds_the_latest_row(recorded, clock):
    source, begin = recorded(), clock.monotonic_ns()
    a, b = at(source, clock, begin, 0.0)
    assert (a.power_mw, a.energy_mj, a.t_ns) == (300_000.0, 5_000_000.0, begin)
    assert b.power_mw is None
    assert "not begun" in b.error
    a, b = at(source, clock, begin, 0.16)
    assert (a.power_mw, a.energy_mj) == (310_000.0, 5_030_500.0)
    assert (b.power_mw, b.energy_mj, b.error) == (200_000.0, None, None)
    a, _ = at(source, clock, begin, 0.25)
    assert (a.power_mw, a.energy_mj, a.error) == (None, 5_061_000.0, None)


def test_says_when_it_is_over(recorded, clock):
    source, begin = recorded(), clock.monotonic_ns()
    assert at(source, clock, begin, 0.39)[0].power_mw == 330_000.0
    assert [s.error for s in at(source, clock, begin, 0.41)] == ["the recording is over"] * 2


def test_loops_with_a_counter_that_only_rises(recorded, clock):
    source, begin = recorded(loop=True), clock.monotonic_ns()
    readings = [at(source, clock, begin, k * 0.1 + 0.05)[0] for k in range(12)]
    energy = [s.energy_mj for s in readings]
    assert energy == sorted(set(energy))
    assert [energy[4] - energy[0], energy[8] - energy[4]] == pytest.approx([94_000 * 4 / 3] * 2)
    assert [s.power_mw for s in readings[4:8]] == [300_000.0, 310_000.0, None, 330_000.0]


def test_devices_say_what_was_recorded(recorded):
    source = recorded("t_s,device_uuid,power_w,scope,energy_j\n0,GPU-a,1,,1\n0,rapl:package-0,2,cpu_package,\n")
    assert [(d.uuid, d.scope, d.method, d.source) for d in source.devices()] == [
        ("GPU-a", "gpu", "measured_counter", "replay"),
        ("rapl:package-0", "cpu_package", "measured_power_integral", "replay"),
    ]


def test_path_and_loop_from_the_environment(tmp_path, clock, monkeypatch):
    path = tmp_path / "trace.csv"
    path.write_text(TWO_GPUS)
    monkeypatch.setenv("LLEM_RAY_REPLAY", str(path))
    monkeypatch.setenv("LLEM_RAY_REPLAY_LOOP", "1")
    source = ReplaySource(clock=clock)
    clock.advance_ns(100 * S)
    assert source.read()[0].error is None
    monkeypatch.delenv("LLEM_RAY_REPLAY")
    with pytest.raises(SourceUnavailable, match="LLEM_RAY_REPLAY"):
        ReplaySource(clock=clock)


@pytest.mark.parametrize(
    ("text", "line", "field", "found"),
    [
        ("", 1, None, "nothing"),
        ("t_s,power_w\n", 1, None, "t_s, power_w"),
        ("t_s,device_uuid,power_w,colour\n", 1, None, "t_s, device_uuid, power_w, colour"),
        ("t_s,device_uuid,power_w\n", None, None, None),
        ("t_s,device_uuid,power_w\n0,a,1\n1,a,x\n", 3, "power_w", "x"),
        ("t_s,device_uuid,power_w\n0,a,nan\n", 2, "power_w", "nan"),
        ("t_s,device_uuid,power_w\n,a,1\n", 2, "t_s", None),
        ("t_s,device_uuid,power_w\n0,,1\n", 2, "device_uuid", None),
        ("t_s,device_uuid,power_w\n0,a,1\n0,a,1\n", 3, "t_s", "0"),
        ("t_s,device_uuid,power_w\n5,a,1\n4,b,1\n", 3, "t_s", "4"),
        ("t_s,device_uuid,power_w\n0,a\n", 2, None, None),
        ("t_s,device_uuid,power_w\n0,a,1,2\n", 2, None, None),
        ("t_s,device_uuid,power_w,scope\n0,a,1,moon\n", 2, "scope", "moon"),
    ],
)
def test_a_bad_file_names_line_and_field(tmp_path, text, line, field, found):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_recording(path)
    error = caught.value
    assert (error.file, error.line, error.field, error.found) == (str(path), line, field, found)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00t_s", b'"t_s'])
def test_a_file_that_is_no_text_or_missing(tmp_path, content):
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_recording(path)
    assert caught.value.file == str(path)
