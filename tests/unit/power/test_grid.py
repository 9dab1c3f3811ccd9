"""Carbon intensity by country from codecarbon's own tables."""

from __future__ import annotations

import importlib.util

import pytest

from llem_ray.core.errors import ConfigError, PluginError
from llem_ray.core.measure_spec import FootprintSpec
from llem_ray.core.plugins import install_command
from llem_ray.execution.footprint import look_up_footprint
from llem_ray.power.grid import grid_intensity


def test_a_country_has_an_intensity_with_its_year() -> None:
    pytest.importorskip("codecarbon")
    found = grid_intensity("FRA")
    assert 10 < found.gco2_per_kwh < 200
    assert found.source.startswith("codecarbon ")
    assert "France, 20" in found.source
    footprint = look_up_footprint(FootprintSpec(country="FRA"))
    assert (footprint.grid_gco2_per_kwh, footprint.grid_source, footprint.reason) == (found.gco2_per_kwh, found.source, None)


def test_an_unknown_country_is_one_error() -> None:
    pytest.importorskip("codecarbon")
    with pytest.raises(ConfigError, match=r"footprint.country: codecarbon's table has no such country\n  found: FRX") as caught:
        grid_intensity("FRX")
    assert "FRA" in (caught.value.hint or "")


def test_without_codecarbon_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PluginError, match="needs codecarbon's tables"):
        grid_intensity("FRA")
    footprint = look_up_footprint(FootprintSpec(country="FRA"))
    assert footprint.grid_gco2_per_kwh is None
    assert install_command("codecarbon") in (footprint.reason or "")
