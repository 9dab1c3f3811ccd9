"""Service level objectives, and how many requests meet them: goodput as `vllm bench serve` counts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from llem_ray.core.backend import RequestRecord
from llem_ray.core.measure_spec import SloPreset, SloSpec
from llem_ray.workloads.latency import e2e_latency_s, succeeded, tpot_s, ttft_s

MS_PER_S: Final = 1000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The latest that a request may be, ms; None sets no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


PRESETS: Final[Mapping[SloPreset, Limits]] = {
    "mlperf-llama2-70b": Limits(ttft_ms=2000, tpot_ms=200),
    "mlperf-llama2-70b-interactive": Limits(ttft_ms=450, tpot_ms=40),
    "mlperf-llama3.1-405b": Limits(ttft_ms=6000, tpot_ms=175),
    "mlperf-llama3.1-405b-interactive": Limits(ttft_ms=4500, tpot_ms=80),
    "mlperf-llama3.1-8b": Limits(ttft_ms=2000, tpot_ms=100),
    "mlperf-llama3.1-8b-interactive": Limits(ttft_ms=500, tpot_ms=30),
    "mlperf-deepseek-r1": Limits(ttft_ms=2000, tpot_ms=80),
    "mlperf-deepseek-r1-interactive": Limits(ttft_ms=1500, tpot_ms=15),
}
"""MLPerf Inference's latency limits of the server and interactive scenarios. MLPerf asks that the 99th percentiles keep them."""


def limits_of(slo: SloSpec) -> Limits | None:
    """The limits that are asked for; None where there are none."""
    if slo.preset is not None:
        return PRESETS[slo.preset]
    limits = Limits(ttft_ms=slo.ttft_ms, tpot_ms=slo.tpot_ms, e2e_ms=slo.e2e_ms)
    return None if limits == Limits() else limits


def meets(record: RequestRecord, limits: Limits) -> bool:
    """Whether a request succeeded within all limits. The TPOT of a single token is 0, as vLLM has it."""
    if not succeeded(record):
        return False
    tpot = 0.0 if record.output_tokens == 1 else tpot_s(record)
    measured = ((ttft_s(record), limits.ttft_ms), (tpot, limits.tpot_ms), (e2e_latency_s(record), limits.e2e_ms))
    return all(limit is None or (value is not None and value <= limit / MS_PER_S) for value, limit in measured)


def count_good(records: Sequence[RequestRecord], limits: Limits) -> int:
    """Requests that meet all limits."""
    return sum(meets(record, limits) for record in records)
