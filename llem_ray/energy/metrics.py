"""Derived energy metrics: pure functions, None in gives None out, never a made-up 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan, cos, pi, sin, sqrt
from statistics import fmean, stdev
from typing import Final

CONFIDENCE: Final = 0.95


def _per(energy_j: float | None, count: int | None) -> float | None:
    return None if energy_j is None or not count else energy_j / count


def joules_per_output_token(energy_j: float | None, output_tokens: int | None) -> float | None:
    """Energy of the window over output tokens, J; the tokens are the engine's own count."""
    return _per(energy_j, output_tokens)


def joules_per_input_token(energy_j: float | None, input_tokens: int | None) -> float | None:
    """Energy of the whole window over input tokens, J. Not the energy of the prefill."""
    return _per(energy_j, input_tokens)


def joules_per_total_token(energy_j: float | None, input_tokens: int | None, output_tokens: int | None) -> float | None:
    """Energy of the window over input and output tokens, J."""
    return None if input_tokens is None or output_tokens is None else _per(energy_j, input_tokens + output_tokens)


def joules_per_successful_query(energy_j: float | None, successful_queries: int | None) -> float | None:
    """Energy of the window, failed requests included, over requests that succeeded, J."""
    return _per(energy_j, successful_queries)


def output_tokens_per_joule(energy_j: float | None, output_tokens: int | None) -> float | None:
    """Output tokens over energy of the window, 1/J; None for no energy."""
    return None if not energy_j or output_tokens is None else output_tokens / energy_j


def avg_total_gpu_power_w(energy_j: float | None, window_s: float) -> float | None:
    """Mean power of all leased GPUs together, W."""
    return None if energy_j is None or window_s <= 0 else energy_j / window_s


def avg_power_w(energy_j: float | None, window_s: float, devices: int) -> float | None:
    """Mean power of one leased GPU, W."""
    total_w = avg_total_gpu_power_w(energy_j, window_s)
    return None if total_w is None or devices < 1 else total_w / devices


def energy_delay_product_js(energy_j: float | None, window_s: float) -> float | None:
    """Energy x window duration, J s."""
    return None if energy_j is None else energy_j * window_s


def joules_per_flop(energy_j: float | None, flops: float | None) -> float | None:
    """Energy of the window over its floating-point operations, J."""
    return None if energy_j is None or not flops else energy_j / flops


def mfu(flops: float | None, window_s: float, peak_flops_per_s: float | None) -> float | None:
    """Model FLOP utilisation (PaLM, arXiv 2204.02311, appendix B): FLOP done over those possible in the time."""
    return None if flops is None or not peak_flops_per_s or window_s <= 0 else flops / (window_s * peak_flops_per_s)


@dataclass(frozen=True, slots=True)
class Interval:
    """Mean of n repeats with a two-sided Student t-interval. ``half_width`` is None for a single repeat."""

    mean: float
    half_width: float | None
    n: int
    confidence: float = CONFIDENCE


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Interval of the mean over a fixed number of repeats: mean +- t(n - 1) s / sqrt(n). None without values.

    Covers as stated only where n was fixed beforehand: stopping once the interval is tight covers less.
    """
    n = len(values)
    if n == 0:
        return None
    if n == 1:
        return Interval(values[0], None, 1, confidence)
    return Interval(fmean(values), t_quantile((1 + confidence) / 2, n - 1) * stdev(values) / sqrt(n), n, confidence)


def t_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t for whole degrees of freedom, by bisection on its exact distribution function.

    Raises:
        ValueError: ``p`` is not inside (0, 1) or ``degrees`` < 1.
    """
    if not 0.0 < p < 1.0 or degrees < 1:
        raise ValueError(f"no t quantile for p = {p} and {degrees} degrees of freedom")
    if p < 0.5:
        return -t_quantile(1.0 - p, degrees)
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < p:
        low, high = high, 2.0 * high
    while high - low > 1e-12 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def t_probability(t: float, degrees: int) -> float:
    """P(T <= t), exact for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    theta = atan(t / sqrt(degrees))
    cos2 = cos(theta) ** 2
    if degrees % 2:
        term, total = cos(theta), 0.0
        for k in range(3, degrees + 1, 2):
            total += term
            term *= cos2 * (k - 1) / k
        inside = 2 / pi * (theta + sin(theta) * total)
    else:
        term, total = 1.0, 0.0
        for k in range(2, degrees + 1, 2):
            total += term
            term *= cos2 * (k - 1) / k
        inside = sin(theta) * total
    return 0.5 + inside / 2
