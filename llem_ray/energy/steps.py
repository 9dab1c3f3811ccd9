"""What a load that moves in steps may have done inside one tick of a counter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from llem_ray.core.power import Float64

STEP_RATE_HZ: Final = 4.0
"""Steps a second that are expected of a load about which nothing is known."""

UNRESOLVED_SHARE: Final = 0.05
"""How often an interval between ticks holds more than its model allows."""

NOISE_REL: Final = 0.01
NOISE_W: Final = 1.0
"""One sigma of the power between two ticks of a load that holds its level."""

SEEN_SHARE: Final = 0.5
"""How often a step leads to a level that was seen nearby."""

ALIGNED: Final = 0.3
"""How often the load steps exactly at the edge, where no guard shows that it does."""

GUARD_REL: Final = 0.45
"""A guard draws less than this share of what is beside it."""

GUARD_NOISE_REL: Final = 0.03

_FILLER: Final = 20
_FIRST_STEPS: Final = (np.arange(8) + 0.5) / 8
_ROUNDING_S: Final = 1e-9
_KEEP: Final = 3e-3


@dataclass(frozen=True, slots=True)
class Inside:
    """The energy between a tick and an edge after it."""

    energy_j: float
    variance_j2: float
    power_w: float
    """Root mean square of the power at the edge: what an error of the ticks' times multiplies."""


@dataclass(frozen=True, slots=True)
class _Levels:
    """Powers that a load may hold, and how often a step leads to each."""

    power_w: Float64
    share: Float64
    sigma_w: Float64


def energy_inside(rate_w: Float64, dt_s: Float64, k: int, x_s: float, *, noise_rel: float, limit_w: float) -> Inside | None:
    """Energy from tick k to ``x_s`` after it, given the power between all ticks around it.

    The load is taken to hold its power between steps, with at most one step in an interval, two in that of the edge, and one
    more exactly at the edge. Levels on either side follow from the intervals there, weighted by how well they explain them.

    Args:
        rate_w: Mean power from each tick to the next.
        dt_s: Length of each of these intervals.
        k: Which of them holds the edge.
        x_s: From its begin to the edge.
        noise_rel: One sigma of ``rate_w``, relative, by the ticks' own irregularity.
        limit_w: No level is above it.

    Returns:
        None when nothing of the kind explains what was seen.
    """
    levels = _levels(rate_w, noise_rel, limit_w)
    before = _filter(levels, rate_w[:k], dt_s[:k])
    after = _filter(levels, rate_w[k + 1 :][::-1], dt_s[k + 1 :][::-1])
    pairs = before[:, None] * after
    p, q = np.nonzero(pairs >= _KEEP * pairs.max())
    cases = _Cases(
        p_w=levels.power_w[p],
        q_w=levels.power_w[q],
        weight=pairs[p, q],
        sigma_w=(levels.sigma_w[p] + levels.sigma_w[q]) / 2,
        levels=levels,
        rate_w=float(rate_w[k]),
        dt_s=float(dt_s[k]),
        x_s=x_s,
    )
    parts = [*cases.free(1 - ALIGNED), *cases.stepping_at_edge(ALIGNED)]
    weight, energy_j, power_w = (np.concatenate([part[i] for part in parts]) for i in range(3))
    total = float(weight.sum())
    if not total > 0:
        return None
    weight = weight / total
    mean_j = float(weight @ energy_j)
    return Inside(mean_j, float(weight @ (energy_j - mean_j) ** 2), float(np.sqrt(weight @ power_w**2)))


def guarded(rate_w: Float64, k: int, *, x_s: float, y_s: float, slack_s: float, ceiling_w: float) -> bool:
    """Whether a side of interval k looks like the guard of a window that begins or ends ``x_s`` after its begin.

    A guard is steady and far below the other side. One of three ticks holds two whole ones at least; the first of three may
    hold the tail of the load. What interval k holds beside the guard must be possible: between the guard's power and
    ``ceiling_w``, where ticks and edge may be ``slack_s`` apart from where they seem.
    """
    before_w, after_w = rate_w[:k][::-1], rate_w[k + 1 :]
    for side_w, busy_w, quiet_s, busy_s in ((before_w, after_w, x_s, y_s), (after_w, before_w, y_s, x_s)):
        for quiet_w in (side_w[0:2], side_w[1:3]):
            if _steady(quiet_w) and quiet_w.max() < GUARD_REL * busy_w.max(initial=rate_w[k]):
                low_w = float(quiet_w[0])
                busy_j = float(rate_w[k]) * (x_s + y_s) - low_w * quiet_s
                if low_w * (busy_s - slack_s) <= busy_j * (1 + GUARD_NOISE_REL) and busy_j <= ceiling_w * (busy_s + slack_s):
                    return True
    return False


def _steady(power_w: Float64) -> bool:
    return len(power_w) == 2 and bool(np.ptp(power_w) <= GUARD_NOISE_REL * power_w.max() + NOISE_W)


def _levels(rate_w: Float64, noise_rel: float, limit_w: float) -> _Levels:
    low_w, high_w = float(rate_w.min()), float(rate_w.max())
    filler_w = np.linspace(0.8 * low_w, min(max(1.3 * high_w, high_w + 0.3 * (high_w - low_w)), max(limit_w, high_w)), _FILLER)
    seen_w = np.sort(rate_w)
    seen_w = seen_w[np.diff(seen_w, prepend=-np.inf) > NOISE_REL / 4 * seen_w]
    power_w = np.concatenate((seen_w, filler_w))
    share = np.concatenate((np.full(len(seen_w), SEEN_SHARE / len(seen_w)), np.full(_FILLER, (1 - SEEN_SHARE) / _FILLER)))
    sigma_w = np.hypot(NOISE_W, np.hypot(NOISE_REL, noise_rel) * power_w)
    return _Levels(power_w, share, sigma_w)


def _filter(levels: _Levels, rate_w: Float64, dt_s: Float64) -> Float64:
    """How likely each level is after the given intervals."""
    p, q = levels.power_w[:, None], levels.power_w[None, :]
    sigma_w = (levels.sigma_w[:, None] + levels.sigma_w[None, :]) / 2
    range_w = float(np.ptp(levels.power_w)) + NOISE_W
    weights = levels.share
    for seen_w, length_s in zip(rate_w, dt_s, strict=True):
        still, one, more = _step_shares(float(length_s))
        holds = weights * still * _normal(seen_w - levels.power_w, levels.sigma_w)
        steps = one * (weights @ _between(seen_w, p, q, sigma_w)) + more / range_w * weights.sum()
        weights = holds + steps * levels.share
        weights = weights / weights.sum()
    return weights


def _step_shares(length_s: float) -> tuple[float, float, float]:
    """Chance of no step, of one, and of more."""
    still = float(np.exp(-STEP_RATE_HZ * length_s)) * (1 - UNRESOLVED_SHARE)
    one = STEP_RATE_HZ * length_s * still
    return still, one, 1 - still - one


def _normal(off_w: Float64, sigma_w: Float64) -> Float64:
    density: Float64 = np.exp(-0.5 * (off_w / sigma_w) ** 2) / (sigma_w * np.sqrt(2 * np.pi))
    return density


def _between(seen_w: float, p_w: Float64, q_w: Float64, sigma_w: Float64) -> Float64:
    """Density of the mean power of an interval with one step, at any time in it, from p to q."""
    low_w, high_w = np.minimum(p_w, q_w) - sigma_w, np.maximum(p_w, q_w) + sigma_w
    density: Float64 = ((seen_w >= low_w) & (seen_w <= high_w)) / (high_w - low_w)
    return density


_Part = tuple[Float64, Float64, Float64]


@dataclass(frozen=True, slots=True)
class _Cases:
    """What may have happened in the interval of the edge, for each pair of levels at its ends."""

    p_w: Float64
    q_w: Float64
    weight: Float64
    sigma_w: Float64
    levels: _Levels
    rate_w: float
    dt_s: float
    x_s: float

    @property
    def whole_j(self) -> float:
        return self.rate_w * self.dt_s

    def free(self, share: float) -> list[_Part]:
        """No step, one, or two, at any time."""
        still, one, two = _step_shares(self.dt_s)
        x_s, y_s = self.x_s, self.dt_s - self.x_s
        same = (np.abs(self.p_w - self.q_w) <= 3 * self.sigma_w) * self.weight
        flat = still * share * same * _normal(self.rate_w - (self.p_w + self.q_w) / 2, self.sigma_w) / self._chance_same()
        left_j, right_j = self.p_w * x_s, self.whole_j - self.q_w * y_s
        rising = self.q_w > self.p_w
        one_j = np.where(rising, np.maximum(left_j, right_j), np.minimum(left_j, right_j))
        on_left = (one_j == left_j) & (left_j != right_j)
        single = one * share * self.weight * _between(self.rate_w, self.p_w, self.q_w, self.sigma_w)
        return [
            self._part(flat, np.full(1, self.rate_w * x_s), np.full(1, self.rate_w)),
            self._part(single, one_j, np.where(on_left, self.p_w, self.q_w)),
            self._two_steps(two * share),
        ]

    def _chance_same(self) -> Float64:
        """A level that holds through is one level, not two that agree: by how often two would."""
        near = np.abs(self.levels.power_w[:, None] - self.p_w) <= 3 * self.sigma_w
        chance: Float64 = np.maximum((near * self.levels.share[:, None]).sum(axis=0), 1e-6)
        return chance

    def stepping_at_edge(self, share: float) -> list[_Part]:
        """A step at the edge: one side holds its level up to it, the other may move or not."""
        still, _, _ = _step_shares(self.dt_s)
        x_s, y_s = self.x_s, self.dt_s - self.x_s
        left_j, right_j = self.p_w * x_s, self.whole_j - self.q_w * y_s
        sigma_j = self.sigma_w * self.dt_s
        both = still * share * self.weight * _normal(left_j - right_j, sigma_j) * self.dt_s
        lower_w, upper_w = float(self.levels.power_w.min()), float(self.levels.power_w.max())
        free = (1 - still) * share * self.weight / 2
        parts = [
            self._part(both / 2, left_j, self.p_w),
            self._part(both / 2, right_j, self.q_w),
        ]
        for energy_j, power_w, other_j, other_s in (
            (left_j, self.p_w, self.whole_j - left_j, y_s),
            (right_j, self.q_w, right_j, x_s),
        ):
            slack_j = 2 * sigma_j
            possible = (other_j >= lower_w * other_s - slack_j) & (other_j <= upper_w * other_s + slack_j)
            density = self.dt_s / ((upper_w - lower_w) * other_s + 2 * slack_j)
            parts.append(self._part(free * possible * density, energy_j, power_w))
        return parts

    def _two_steps(self, share: float) -> _Part:
        """From p to any level at s1, and on to q at s2."""
        first_s = (_FIRST_STEPS * self.dt_s)[:, None, None]
        h_w = self.levels.power_w[None, :, None]
        p_w, q_w = self.p_w[None, None], self.q_w[None, None]
        fall_w = np.where(np.abs(h_w - q_w) < NOISE_W, NOISE_W, h_w - q_w)
        second_s = (self.whole_j - q_w * self.dt_s - (p_w - h_w) * first_s) / fall_w
        possible = (second_s >= first_s - _ROUNDING_S) & (second_s <= self.dt_s + _ROUNDING_S) & (np.abs(h_w - q_w) >= NOISE_W)
        # Both orders of two steps at any time: the density is twice that of each.
        density = 2 / np.abs(fall_w) * self.levels.share[None, :, None] / len(_FIRST_STEPS)
        weight = share * self.weight[None, None] * density * possible
        x_s = self.x_s
        second_s = np.where(possible, np.maximum(second_s, first_s), first_s)
        energy_j = p_w * np.minimum(x_s, first_s) + h_w * np.clip(x_s - first_s, 0, second_s - first_s)
        energy_j = energy_j + q_w * np.maximum(x_s - second_s, 0)
        power_w = np.where(x_s < first_s, p_w, np.where(x_s < second_s, h_w, q_w))
        return self._part(weight, energy_j, power_w)

    @staticmethod
    def _part(weight: Float64, energy_j: Float64, power_w: Float64) -> _Part:
        weight, energy_j, power_w = np.broadcast_arrays(weight, energy_j, power_w)
        return weight.ravel(), energy_j.ravel(), power_w.ravel()
