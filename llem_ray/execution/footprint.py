"""Carbon and cost of a trial's energy, with the inputs beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llem_ray.core.errors import PluginError
from llem_ray.core.measure_spec import FootprintSpec
from llem_ray.energy.footprint import carbon_g, energy_cost
from llem_ray.power.grid import grid_intensity

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """The inputs of a run, looked up once."""

    spec: FootprintSpec
    grid_gco2_per_kwh: float | None
    grid_source: str | None
    reason: str | None
    """Why the grid's intensity is not known."""


def look_up_footprint(spec: FootprintSpec) -> Footprint:
    """Find the grid's intensity.

    Raises:
        ConfigError: The country is unknown.
    """
    if spec.country is None:
        given = spec.grid_gco2_per_kwh
        source = None if given is None else "footprint.grid_gco2_per_kwh"
        reason = "footprint names neither grid_gco2_per_kwh nor country" if given is None else None
        return Footprint(spec=spec, grid_gco2_per_kwh=given, grid_source=source, reason=reason)
    try:
        found = grid_intensity(spec.country)
    except PluginError as error:
        return Footprint(spec=spec, grid_gco2_per_kwh=None, grid_source=None, reason=" ".join(str(error).split()))
    return Footprint(spec=spec, grid_gco2_per_kwh=found.gco2_per_kwh, grid_source=found.source, reason=None)


def footprint_columns(footprint: Footprint, energy_j: float | None) -> Row:
    """Carbon and cost of an energy; None where it is missing or invalid."""
    spec = footprint.spec
    reasons = {} if spec == FootprintSpec() or footprint.reason is None else {"carbon_g": footprint.reason}
    return {
        "carbon_g": carbon_g(energy_j, footprint.grid_gco2_per_kwh, spec.pue),
        "energy_cost": energy_cost(energy_j, spec.price_per_kwh, spec.pue),
        "grid_gco2_per_kwh": footprint.grid_gco2_per_kwh,
        "grid_source": footprint.grid_source,
        "pue": None if spec == FootprintSpec() else spec.pue,
        "price_per_kwh": spec.price_per_kwh,
        "currency": spec.currency,
        "footprint_as_of": spec.as_of,
        "null_reasons": reasons,
    }
