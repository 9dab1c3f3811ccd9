"""X2: energy of a window from the 1 s average power alone, to compare the counter with."""

from __future__ import annotations

from typing import Final

import numpy as np

from llem_ray.core.power import Calibration, Float64, Trace
from llem_ray.core.units import MW_PER_W, NS_PER_S

DEFAULT_PERIOD_S: Final = 0.1
"""How often the average is published where the counter's period does not tell."""

REACH_PERIODS: Final = 3.0


def average_energy_j(trace: Trace, calibration: Calibration, end_ns: int, seconds: int) -> tuple[float | None, str | None]:
    """Energy of the ``seconds`` before ``end_ns``: the sum over k < seconds of A(end - k) x 1 s.

    A(t) is the mean power over (t - 1 s, t], interpolated between the times at which it was published.

    Returns:
        The energy in J, or None and why there is none.
    """
    if seconds < 1:
        return None, "the window is under 1 s"
    margin_ns = NS_PER_S
    near = trace.between(end_ns - (seconds - 1) * NS_PER_S - margin_ns, end_ns + margin_ns)
    valid = np.isfinite(near.power_avg_mw)
    if not calibration.has_average or np.count_nonzero(valid) < 2:
        return None, "the meter has no 1 s average power"
    t_s = (near.t_ns[valid] - end_ns) / NS_PER_S
    average_w = near.power_avg_mw[valid] / MW_PER_W
    period_s = calibration.tick_period_s or DEFAULT_PERIOD_S
    period_s = period_s if period_s > DEFAULT_PERIOD_S / 10 else DEFAULT_PERIOD_S
    wanted_s = -np.arange(seconds, dtype=np.float64)
    after = np.searchsorted(t_s, wanted_s)
    inside = (after > 0) & (after < len(t_s))
    at = np.clip(after, 1, len(t_s) - 1)
    if not inside.all() or float((t_s[at] - t_s[at - 1]).max()) > REACH_PERIODS * period_s:
        return None, "samples of the 1 s average power are missing"
    published_s, published_w = _published(t_s, average_w, period_s)
    return float(np.interp(wanted_s, published_s, published_w).sum()), None


def _published(t_s: Float64, average_w: Float64, period_s: float) -> tuple[Float64, Float64]:
    """Times and values at which the average was published.

    A change seen at poll i was published halfway since poll i - 1, on average. An average that did not change was published
    all the same: the old value is repeated one period before a change that comes after a long rest.
    """
    changed = np.flatnonzero(np.diff(average_w) != 0) + 1
    new_s = (t_s[changed] + t_s[changed - 1]) / 2
    rested = np.diff(np.concatenate(([t_s[0]], new_s))) > 1.5 * period_s
    times_s = np.concatenate(([t_s[0]], new_s, new_s[rested] - period_s, [t_s[-1]]))
    values_w = np.concatenate(([average_w[0]], average_w[changed], average_w[changed - 1][rested], [average_w[-1]]))
    order = np.argsort(times_s, kind="stable")
    return times_s[order], values_w[order]
