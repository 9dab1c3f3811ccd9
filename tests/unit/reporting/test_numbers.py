from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llem_ray.core.progress import format_setting
from llem_ray.reporting.numbers import format_duration, format_energy, format_uncertain, format_value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (float("nan"), "-"), (0, "0"), (0.42131, "0.4213"), (12.3456, "12.35"), (1024.4, "1024"),
        (123456.0, "123456"), (0.00012346, "0.0001235"), (1.2e-9, "1.200e-09"), (-3.14159, "-3.142"), (9.9999e12, "1.000e+13"),
    ],
)  # fmt: skip
def test_values(value: float | None, text: str) -> None:
    assert format_value(value) == text


@given(st.floats(1e-6, 1e9))
def test_a_shown_value_is_the_value(value: float) -> None:
    assert float(format_value(value)) == pytest.approx(value, rel=6e-4)


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (0.42134, 0.00213, "0.4213 ±0.0021"), (12.3, 4.0, "12.3 ±4.0"), (1234.5, 56.0, "1234 ±56"), (0.5, None, "0.5000"),
        (0.5, 0.0, "0.5000"), (None, 1.0, "-"), (0.5, float("inf"), "0.5000"),
    ],
)  # fmt: skip
def test_uncertain_values(value: float | None, half: float | None, text: str) -> None:
    assert format_uncertain(value, half) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (None, "-"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3600, "1 h 00 min"),
        (7800, "2 h 10 min"), (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)  # fmt: skip
def test_durations(duration_s: float | None, text: str) -> None:
    assert format_duration(duration_s) == text


@pytest.mark.parametrize(("energy_j", "text"), [(None, "-"), (950.0, "950 J"), (12_500.0, "12.5 kJ"), (11_520_000.0, "3.20 kWh")])
def test_energies(energy_j: float | None, text: str) -> None:
    assert format_energy(energy_j) == text


def test_settings_as_people_read_them() -> None:
    assert format_setting({"distribution": "normal", "mean": 60.0, "std": 8.5, "max": 90}) == "normal(mean=60, std=8.5, max=90)"
    assert format_setting({"distribution": "empirical", "values": [1, 2]}) == "empirical(values=[1, 2])"
    assert [format_setting(value) for value in ("a", 4, True, None, {"b": 1})] == ["a", "4", "true", "null", '{"b": 1}']


def test_a_half_width_far_below_the_value_is_rounded_up_to_the_digits_there_is_room_for() -> None:
    assert format_uncertain(0.01430667, 0.00000055) == "0.0143067 ±0.0000006"
    assert format_uncertain(0.01430667, 0.00000055, 4) == "0.01431 ±0.00001"
    assert format_uncertain(12345.678, 0.012, 4) == "12346 ±1"
    assert format_uncertain(0.4213, 0.0021, 4) == "0.4213 ±0.0021"
    assert format_uncertain(0.0, 0.0021) == "0.0000 ±0.0021"
