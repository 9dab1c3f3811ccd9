"""Carbon and cost of energy: products with dated inputs, null where an input is."""

from __future__ import annotations

from typing import Final

J_PER_KWH: Final = 3.6e6


def carbon_g(energy_j: float | None, grid_gco2_per_kwh: float | None, pue: float) -> float | None:
    """Emissions of the grid for an energy and what the building adds to it, g CO2 equivalent."""
    if energy_j is None or grid_gco2_per_kwh is None:
        return None
    return energy_j / J_PER_KWH * pue * grid_gco2_per_kwh


def energy_cost(energy_j: float | None, price_per_kwh: float | None, pue: float) -> float | None:
    """Price of an energy and what the building adds to it, in the price's currency."""
    return None if energy_j is None or price_per_kwh is None else energy_j / J_PER_KWH * pue * price_per_kwh
