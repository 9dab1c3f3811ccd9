"""Mean of repeats with a 95 % confidence interval by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Final

_T975: Final = (
    12.7062047362, 4.3026527297, 3.1824463053, 2.7764451052, 2.5705818356, 2.4469118511, 2.3646242516, 2.3060041352,
    2.2621571628, 2.2281388520, 2.2009851601, 2.1788128297, 2.1603686565, 2.1447866879, 2.1314495456, 2.1199052992,
    2.1098155778, 2.1009220402, 2.0930240544, 2.0859634473, 2.0796138447, 2.0738730679, 2.0686576104, 2.0638985616,
    2.0595385528, 2.0555294386, 2.0518305165, 2.0484071418, 2.0452296421, 2.0422724563,
)  # fmt: skip
"""97.5 % quantile of Student's t for 1 to 30 degrees of freedom."""

_Z975: Final = 1.9599639845400545


def student_t_975(degrees: int) -> float:
    """97.5 % quantile of Student's t.

    Exact to 1e-9 up to 30 degrees of freedom, to 1e-5 beyond by the Cornish-Fisher expansion (Abramowitz and Stegun,
    26.7.5).

    Raises:
        ValueError: ``degrees`` is less than 1.
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, not {degrees}")
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    z = _Z975
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % interval; the half-width is None for a single value.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    if len(values) == 1:
        return values[0], None
    return fmean(values), student_t_975(len(values) - 1) * stdev(values) / math.sqrt(len(values))
