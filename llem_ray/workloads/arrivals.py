"""When requests are sent: schedules of open loops, made before a run and fixed by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

from llem_ray.core.backend import LoadSchedule
from llem_ray.core.errors import ConfigError
from llem_ray.core.units import ns_from_s
from llem_ray.core.workload_spec import LoadSpec
from llem_ray.workloads.traces import Arrival


def gamma_arrivals_s(count: int, rate_per_s: float, burstiness: float, seed: int) -> tuple[float, ...]:
    """Arrival times, s: sums of gamma(shape=burstiness, scale=1 / (rate x burstiness)) gaps, as `vllm bench serve` draws them.

    Burstiness 1 is a Poisson process. The times are stretched so that the last one is at count / rate: the asked rate is met by
    every draw, not only on average.
    """
    draws = random.Random(f"{seed}/arrivals")  # noqa: S311 - not a secret
    sums = list(accumulate(draws.gammavariate(burstiness, 1.0 / (rate_per_s * burstiness)) for _ in range(count)))
    stretch = count / rate_per_s / sums[-1] if sums[-1] > 0 else 0.0
    return tuple(time_s * stretch for time_s in sums)


def constant_arrivals_s(count: int, rate_per_s: float) -> tuple[float, ...]:
    """Arrival times with equal gaps, s: gamma arrivals of infinite burstiness. The last is at count / rate."""
    return tuple((index + 1) / rate_per_s for index in range(count))


def make_schedule(load: LoadSpec, count: int, seed: int, trace: Sequence[Arrival] = ()) -> LoadSchedule:
    """How ``count`` requests are sent under an online load.

    Args:
        load: The load; not ``batch``.
        count: Number of requests.
        seed: Seed of the gaps between arrivals.
        trace: What ``load_trace`` returned, at least ``count`` arrivals; for ``trace`` only.

    Raises:
        ConfigError: The load lacks what its pattern needs.
    """
    if load.pattern in {"saturated", "closed"}:
        return LoadSchedule(max_in_flight=load.concurrency)
    if load.pattern == "trace":
        times_s = tuple((arrival.at_s - trace[0].at_s) / load.trace_speed for arrival in trace[:count])
    elif load.rate_per_s is None:
        raise ConfigError(f"{load.pattern} arrivals need a rate", field="workload.load.rate_per_s", found="nothing")
    elif load.pattern == "constant":
        times_s = constant_arrivals_s(count, load.rate_per_s)
    else:
        times_s = gamma_arrivals_s(count, load.rate_per_s, load.burstiness or 1.0, seed)
    return LoadSchedule(send_at_ns=tuple(ns_from_s(time_s) for time_s in times_s))
