"""Rules of the section ``footprint`` that types alone cannot state."""

from __future__ import annotations

import re
from datetime import date

from llem_ray.config.document import Document
from llem_ray.core.measure_spec import FootprintSpec


def check_footprint(document: Document, footprint: FootprintSpec) -> None:
    """Refuse inputs that contradict each other, or that nobody could check later.

    Raises:
        ConfigError: The first of them.
    """
    section = "footprint"
    if footprint.country is not None:
        if not re.fullmatch("[A-Z]{3}", footprint.country):
            allowed = "an ISO 3166 code of three capitals, such as FRA"
            raise document.error((section, "country"), "not a country code", found=footprint.country, allowed=allowed)
        if footprint.grid_gco2_per_kwh is not None:
            hint = "remove one; null unsets it"
            raise document.error((section, "country"), "either country or grid_gco2_per_kwh, not both", hint=hint)
    if footprint.currency is not None and not re.fullmatch("[A-Z]{3}", footprint.currency):
        allowed = "an ISO 4217 code of three capitals, such as EUR"
        raise document.error((section, "currency"), "not a currency code", found=footprint.currency, allowed=allowed)
    if (footprint.price_per_kwh is None) != (footprint.currency is None):
        raise document.error((section,), "price_per_kwh and currency go together", hint="price_per_kwh: 0.25, currency: EUR")
    if footprint.as_of is not None and not _is_date(footprint.as_of):
        raise document.error((section, "as_of"), "not a date", found=footprint.as_of, allowed="YYYY-MM-DD")
    if footprint.as_of is None and (footprint.price_per_kwh is not None or footprint.grid_gco2_per_kwh is not None):
        hint = "as_of: the day these numbers were looked up, YYYY-MM-DD"
        raise document.error((section,), "numbers without a date cannot be checked later", hint=hint)


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
