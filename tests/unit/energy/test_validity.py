import re
from pathlib import Path

import pytest

from llem_ray.core.measure_spec import GateSpec
from llem_ray.core.power import DeviceState
from llem_ray.energy import validity
from llem_ray.energy.validity import REASONS, check_foreign_load, check_states, flag

S = 10**9


def state(t_s, **values):
    return DeviceState(t_ns=t_s * S, device_uuid="GPU-a", **values)


def test_the_table_is_whole():
    for code, reason in REASONS.items():
        assert reason.code == code
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", code)
        assert reason.severity in ("invalid", "flag", "note")
        assert reason.meaning.endswith(".")
        assert reason.action.endswith(".")


def test_severities_of_the_method():
    by_severity = {
        "invalid": "counter_mismatch counter_reset counter_frozen implausible dropped_samples gpu_lost uuid_changed "
        "node_missing token_count_mismatch",
        "flag": "short_window edge_gap throttled foreign_process not_thermally_stable not_stationary shared_node random_weights",
        "note": "power_capped no_cross_check",
    }
    for severity, listed in by_severity.items():
        assert {REASONS[code].severity for code in listed.split()} == {severity}


def test_every_code_in_the_room_is_in_the_table():
    room = Path(validity.__file__).parent
    used = {code for path in room.glob("*.py") for code in re.findall(r'flag\("([a-z_]+)"', path.read_text())}
    assert used >= {"counter_reset", "edge_gap", "no_cross_check", "throttled"}
    assert used <= set(REASONS)


def test_an_unknown_code_is_refused():
    with pytest.raises(KeyError):
        flag("surprise", "")


@pytest.mark.parametrize(
    ("window_s", "ratio", "flagged"),
    [(5.0, 1.031, True), (5.0, 1.029, False), (4.9, 0.93, False), (4.9, 0.91, True), (0.5, 2.0, False), (9.0, None, False)],
)
def test_cross_check_gates(window_s, ratio, flagged):
    assert bool(validity.check_cross_check(ratio, window_s, GateSpec())) is flagged


def test_throttling_counts_its_seconds_inside_the_window():
    states = [state(0, clock_event_mask=0x8), state(2, clock_event_mask=0x44), state(5, clock_event_mask=0x1)]
    flags = {f.code: f.detail for f in check_states(states, 1 * S, 9 * S)}
    assert flags["throttled"].startswith("4.0 s")
    assert "0x48" in flags["throttled"]
    assert flags["power_capped"] == "3.0 s"


def test_unrelated_clock_events_are_no_throttling():
    assert check_states([state(0, clock_event_mask=0x1 | 0x2 | 0x10 | 0x100)], 0, 9 * S) == ()


@pytest.mark.parametrize(("last_c", "flagged"), [(60.0, False), (60.5, True), (39.0, True)])
def test_thermal_drift(last_c, flagged):
    states = [state(0, temperature_c=20.0), state(1, temperature_c=50.0), state(5, temperature_c=last_c), state(9)]
    assert bool(check_states(states, 1 * S, 8 * S)) is flagged


def test_foreign_load():
    assert check_foreign_load(memory_used_bytes=None) == ()
    assert check_foreign_load(memory_used_bytes=1 << 30) == ()
    assert check_foreign_load(memory_used_bytes=(1 << 30) + 1)[0].code == "foreign_process"
    assert check_foreign_load(memory_used_bytes=0, idle_power_w=98.0, baseline_power_w=90.0) == ()
    assert check_foreign_load(memory_used_bytes=0, idle_power_w=100.0, baseline_power_w=90.0)[0].severity == "flag"
