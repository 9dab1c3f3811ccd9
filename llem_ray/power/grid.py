"""Carbon intensity of a country's electricity, from the tables that come with codecarbon. Nothing is fetched."""

from __future__ import annotations

import difflib
import importlib.util
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from llem_ray.core.errors import ConfigError, PluginError
from llem_ray.core.plugins import install_command

MIX_FILE: Final = "data/private_infra/global_energy_mix.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class GridIntensity:
    """Mean over a year of a country's grid."""

    gco2_per_kwh: float
    source: str
    """Who says so, and of which year."""


def grid_intensity(country: str) -> GridIntensity:
    """Carbon intensity of a country, g CO2 equivalent per kWh.

    Args:
        country: ISO 3166 code of three letters.

    Raises:
        PluginError: codecarbon is not installed.
        ConfigError: Its table does not have the country.
    """
    table = _table()
    found = table.get(country)
    if found is None or found.get("carbon_intensity") is None:
        near = difflib.get_close_matches(country, table, n=3, cutoff=0.6)
        raise ConfigError(
            "codecarbon's table has no such country",
            f"near: {', '.join(near)}" if near else None,
            field="footprint.country",
            found=country,
            allowed=f"one of {len(table)} ISO 3166 codes of three letters (FRA, USA), or set footprint.grid_gco2_per_kwh",
        )
    source = f"codecarbon {version('codecarbon')}: {found.get('country_name', country)}, {found.get('year', 'undated')}"
    return GridIntensity(gco2_per_kwh=float(found["carbon_intensity"]), source=source)


def _table() -> dict[str, Any]:
    spec = importlib.util.find_spec("codecarbon")
    if spec is None or spec.origin is None:
        raise PluginError("footprint.country needs codecarbon's tables", install_command("codecarbon"))
    path = Path(spec.origin).parent / MIX_FILE
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PluginError(f"this codecarbon has no table of countries at {path}: {error}") from error
    return dict(table)
