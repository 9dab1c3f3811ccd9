"""How evenly a gang's devices worked: time at idle power inside a window, and energies that differ between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from llem_ray.core.power import Float64
from llem_ray.core.units import MW_PER_W

BUSY_QUANTILE: Final = 0.95
IDLE_SHARE: Final = 0.10
"""A reading counts as idle up to this share of the way from idle power to busy power."""
MIN_CONTRAST: Final = 1.2
"""Below this ratio of busy to idle power the two cannot be told apart."""


def idle_bubble_share(power_mw: Float64, idle_power_w: float) -> float | None:
    """Share of a window's instant power readings that are idle: up to idle + 10 % of (busy - idle), busy their 95th percentile.

    Args:
        power_mw: Instant power inside the window, shape (n,), mW; NaN where it was not read.
        idle_power_w: Idle power with the model loaded, W.

    Returns:
        None without readings. 1 when nothing in the window is busy: its busy power is within 20 % of idle.
    """
    known_w = power_mw[np.isfinite(power_mw)] / MW_PER_W
    if not len(known_w):
        return None
    busy_w = float(np.quantile(known_w, BUSY_QUANTILE))
    if busy_w < MIN_CONTRAST * idle_power_w:
        return 1.0
    return float(np.mean(known_w <= idle_power_w + IDLE_SHARE * (busy_w - idle_power_w)))


def rank_imbalance(energies_j: Sequence[float]) -> float | None:
    """(Largest - smallest) / mean of the devices' energies over one window; 0 for a single device, None without energy."""
    mean_j = sum(energies_j) / len(energies_j) if energies_j else 0.0
    return (max(energies_j) - min(energies_j)) / mean_j if mean_j > 0 else None
