"""How many tokens each request has: numbers drawn from a distribution, the same on every machine.

The one source of chance is ``random.Random(text).random()``, the Mersenne Twister seeded by the SHA-512 of a text: Python
promises its numbers for good, which numpy does not for its distributions (NEP 19). Each length takes one such number and
turns it into a length by the inverse of the distribution's cumulative function, so that bounds cut the distribution off
instead of piling lengths up at them.
"""

from __future__ import annotations

import math
import os
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import NormalDist
from typing import Final

from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import LengthSpec
from llem_ray.workloads.prompt_files import read_text

_MOST: Final = 2.0**53
_MOST_LOG: Final = 700.0


def draw_lengths(spec: int | LengthSpec, count: int, seed: str, *, answers: Sequence[int] | None = None) -> list[int]:
    """``count`` lengths in tokens; more of them begin with the same ones.

    ``normal`` and ``lognormal`` are cut off at the bounds: their mean and spread before that are those asked for. With m and s
    the mean and standard deviation of the length, a lognormal's logarithm has the variance ln(1 + (s/m)^2) and the mean
    ln(m) less half of that. Numbers are rounded to the nearest whole one, halves up.

    Args:
        spec: A length, or a distribution that ``load_lengths`` has read where it names a file.
        count: How many.
        seed: Text that decides them.
        answers: Lengths of the known answers, for ``answer``.

    Raises:
        ConfigError: An answer has no tokens.
    """
    if isinstance(spec, int):
        return [spec] * count
    if spec.distribution == "answer":
        if answers is None:
            raise ConfigError("the prompts have no known answers", field="workload.output_tokens", found="distribution: answer")
        return [_answer(spec, length, index) for index, length in enumerate(answers)]
    draws = random.Random(seed)  # noqa: S311 - not a secret
    length_of = _quantile(spec)
    return [length_of(draws.random()) for _ in range(count)]


def load_lengths(spec: LengthSpec, base_dir: str | os.PathLike[str], field: str) -> LengthSpec:
    """The distribution with the lengths of its file as ``values`` and ``weights``; as it is where it names none.

    Args:
        spec: A distribution.
        base_dir: Folder that a relative ``path`` starts from.
        field: What the errors blame.

    Raises:
        ConfigError: The file is missing, empty, or has a line that is no length; the line is named.
    """
    if spec.path is None:
        return spec
    path = Path(base_dir) / Path(spec.path).expanduser()
    values: list[int] = []
    weights: list[float] = []
    for number, line in enumerate(read_text(path, "file of lengths", f"{field}.path").split("\n"), start=1):
        if line.strip():
            value, weight = _parse_line(line, str(path), number, f"{field}.path")
            values.append(value)
            weights.append(weight)
    if not values or not sum(weights) > 0:
        found = "no line" if not values else "weights of 0 only"
        allowed = "lines of a number of tokens, or tokens,weight"
        raise ConfigError("the file of lengths is empty", file=str(path), field=f"{field}.path", found=found, allowed=allowed)
    return replace(spec, path=None, values=tuple(values), weights=tuple(weights))


def _parse_line(line: str, path: str, number: int, field: str) -> tuple[int, float]:
    first, _, second = line.partition(",")
    try:
        value, weight = int(first), float(second) if second.strip() else 1.0
    except ValueError:
        value, weight = 0, 1.0
    if value < 1 or not 0 <= weight < math.inf:
        allowed = "a number of tokens >= 1, or tokens,weight"
        found = line.strip()[:60]
        raise ConfigError("not a length", file=path, line=number, field=field, found=found, allowed=allowed)
    return value, weight


def _answer(spec: LengthSpec, length: int, index: int) -> int:
    if length < 1 and spec.min is None:
        hint = "set workload.output_tokens.min"
        message = f"the known answer of request {index} has no tokens"
        raise ConfigError(message, hint, field="workload.output_tokens", found="0 tokens", allowed="at least 1")
    return min(max(length, spec.min or 1), spec.max or length)


def _quantile(spec: LengthSpec) -> Callable[[float], int]:
    """The length for a number from [0, 1)."""
    least, most = spec.min or 1, spec.max
    if spec.distribution == "empirical":
        return _empirical(spec)
    if spec.distribution == "uniform":
        assert most is not None
        return lambda draw: least + int(draw * (most - least + 1))
    assert spec.mean is not None
    if spec.distribution == "fixed" or not spec.std:
        length = math.floor(spec.mean + 0.5)
        return lambda _draw: length
    if spec.distribution == "normal":
        dist, logarithmic = NormalDist(spec.mean, spec.std), False
    else:
        variance = math.log1p((spec.std / spec.mean) ** 2)
        dist, logarithmic = NormalDist(math.log(spec.mean) - variance / 2, math.sqrt(variance)), True
    low = dist.cdf(math.log(least - 0.5) if logarithmic else least - 0.5)
    high = 1.0 if most is None else dist.cdf(math.log(most + 0.5) if logarithmic else most + 0.5)

    def length_of(draw: float) -> int:
        share = min(max(low + (high - low) * draw, math.ulp(0.0)), 1 - 2.0**-53)
        drawn = dist.inv_cdf(share)
        found = math.floor(min(math.exp(min(drawn, _MOST_LOG)) if logarithmic else drawn, _MOST) + 0.5)
        return min(max(found, least), most or found)

    return length_of


def _empirical(spec: LengthSpec) -> Callable[[float], int]:
    assert spec.values is not None
    weights = spec.weights or (1.0,) * len(spec.values)
    drawn = [(value, weight) for value, weight in zip(spec.values, weights, strict=True) if weight]
    sums = list(accumulate(weight for _, weight in drawn))
    return lambda draw: drawn[bisect_right(sums, draw * sums[-1], hi=len(sums) - 1)][0]
