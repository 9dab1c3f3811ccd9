"""Power readings as a staircase that can be integrated exactly between any two times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from llem_ray.core.power import Float64, Int64
from llem_ray.core.units import MW_PER_W, NS_PER_S
from llem_ray.energy.edge import shift_power_w

INSTANT_WINDOW_S: Final = 0.025
"""What A100 and H100 average over for one instant power reading (arXiv 2312.02741)."""

AVERAGE_WINDOW_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class PowerCurve:
    """Readings held around their own time. Times are s from ``origin_ns``."""

    origin_ns: int
    edge_s: Float64
    """n + 1 ascending times: reading i is held from edge i to edge i + 1."""
    power_w: Float64
    period_s: float
    window_s: float
    """Each reading is the mean over this long."""

    def energy_j(self, begin_ns: int, end_ns: int) -> float:
        """Integral from begin to end, J; the first and the last reading are held outwards."""
        x_s = (np.array([begin_ns, end_ns], dtype=np.int64) - self.origin_ns) / NS_PER_S
        cumulative_j = np.concatenate(([0.0], np.cumsum(self.power_w * np.diff(self.edge_s))))
        inside_j = np.interp(x_s, self.edge_s, cumulative_j)
        before_s, after_s = np.minimum(x_s - self.edge_s[0], 0.0), np.maximum(x_s - self.edge_s[-1], 0.0)
        total_j = inside_j + before_s * self.power_w[0] + after_s * self.power_w[-1]
        return float(total_j[1] - total_j[0])

    def u_j(self, begin_ns: int, end_ns: int) -> float:
        """One sigma of the integral, clock offset not included: readings see a part of the time, edges fall between readings.

        The inside term is the readings' successive-difference sd times sqrt(W T); at an edge a step of power is known to
        T / sqrt(12), and a step seen through a boxcar of width w loses up to w / 8 of itself.
        """
        begin_s, end_s = (begin_ns - self.origin_ns) / NS_PER_S, (end_ns - self.origin_ns) / NS_PER_S
        inside = (self.edge_s[1:] > begin_s) & (self.edge_s[:-1] < end_s)
        steps_w = np.diff(self.power_w[inside])
        sd_w = float(np.sqrt(np.mean(steps_w**2) / 2)) if len(steps_w) else 0.0
        edge_s = float(np.hypot(self.period_s / np.sqrt(12.0), self.window_s / 8))
        edges_j2 = sum(((after_w - before_w) * edge_s) ** 2 for before_w, after_w in map(self._around_w, (begin_s, end_s)))
        return float(np.sqrt(sd_w**2 * (end_s - begin_s) * self.period_s + edges_j2))

    def shift_w(self, begin_ns: int, end_ns: int) -> float:
        """What a shift of the window multiplies, W."""
        begin_s, end_s = (begin_ns - self.origin_ns) / NS_PER_S, (end_ns - self.origin_ns) / NS_PER_S
        return shift_power_w(self._around_w(begin_s), self._around_w(end_s))

    def _around_w(self, at_s: float) -> tuple[float, float]:
        """Power before and after a time, W."""
        reach_s = 1.5 * self.period_s + self.window_s
        around = np.searchsorted(self.edge_s, [at_s - reach_s, at_s + reach_s]) - 1
        before_w, after_w = self.power_w[np.clip(around, 0, len(self.power_w) - 1)]
        return float(before_w), float(after_w)


def staircase(
    t_ns: Int64, power_mw: Float64, *, origin_ns: int, period_s: float, window_s: float, sample_period_s: float
) -> PowerCurve:
    """Hold each reading around the middle of what it averaged over.

    A reading published at tau is the mean over (tau - w, tau] and is held until the next one at tau + T: moving that staircase
    back by (T + w) / 2 centres each step on its boxcar. Readings that are NaN are left out. At least one must be there.
    """
    valid = np.isfinite(power_mw)
    t_s = (t_ns[valid] - origin_ns) / NS_PER_S
    middle_s = (t_s[1:] + t_s[:-1]) / 2
    edge_s = np.concatenate(([t_s[0] - sample_period_s / 2], middle_s, [t_s[-1] + period_s]))
    return PowerCurve(origin_ns, edge_s - (period_s + window_s) / 2, power_mw[valid] / MW_PER_W, period_s, window_s)


def nearest_reading(t_ns: Int64, power_mw: Float64, *, origin_ns: int, sample_period_s: float) -> PowerCurve:
    """Hold each reading over the time that is nearest to it: for estimates that say nothing of their own timing."""
    valid = np.isfinite(power_mw)
    t_s = (t_ns[valid] - origin_ns) / NS_PER_S
    edge_s = np.concatenate(([t_s[0] - sample_period_s / 2], (t_s[1:] + t_s[:-1]) / 2, [t_s[-1] + sample_period_s / 2]))
    return PowerCurve(origin_ns, edge_s, power_mw[valid] / MW_PER_W, sample_period_s, 0.0)


def reading_period_s(t_ns: Int64, power_mw: Float64, sample_period_s: float) -> float:
    """How often the meter publishes a new power: the median time between changes, at least the poll period."""
    valid = np.isfinite(power_mw)
    t_s, power = t_ns[valid] / NS_PER_S, power_mw[valid]
    changes_s = t_s[1:][np.diff(power) != 0]
    if len(changes_s) < 6:
        return max(sample_period_s, 0.1)
    return max(sample_period_s, float(np.median(np.diff(changes_s))))
