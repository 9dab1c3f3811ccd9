"""Request records to latency and throughput, with the definitions and keys of `vllm bench serve`.

Times are s from ``sent``, the moment before a request was handed to the engine. What is undefined is None, never 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llem_ray.core.backend import RequestRecord
from llem_ray.core.units import NS_PER_S, s_from_ns


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """Numbers of one metric over many requests, in the metric's unit."""

    count: int
    mean: float
    std: float
    """Population standard deviation (ddof 0), as vLLM has it."""
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    """Percentiles interpolate linearly (numpy ``linear``)."""
    max: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """Rates of successful requests over the time from the first dispatch to the last response."""

    duration_s: float
    requests: int
    """Requests that succeeded."""
    input_tokens: int
    output_tokens: int
    request_throughput_req_s: float
    output_throughput_tok_s: float
    total_token_throughput_tok_s: float
    throughput_per_gpu_tok_s: float | None
    """Output tokens per s and GPU; None without a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencySummary:
    """Latency and throughput of a window. A part is None where no request defines it."""

    ttft_s: Distribution | None
    tpot_s: Distribution | None
    inter_chunk_s: Distribution | None
    """Gaps between chunks, pooled over requests."""
    e2e_latency_s: Distribution | None
    normalized_tpot_s: Distribution | None
    throughput: Throughput | None
    failed: int
    """Requests that were aborted; they count in nothing else."""


def ttft_s(record: RequestRecord) -> float | None:
    """Time to first token: first token - sent. None without a token."""
    return s_from_ns(record.token_times_ns[0] - record.sent_ns) if record.token_times_ns else None


def e2e_latency_s(record: RequestRecord) -> float | None:
    """End-to-end latency: last token - sent. None without a token."""
    return s_from_ns(record.token_times_ns[-1] - record.sent_ns) if record.token_times_ns else None


def e2e_from_schedule_s(record: RequestRecord) -> float | None:
    """Last token - scheduled: what a user sees when the load generator itself was late. None without a token."""
    return s_from_ns(record.token_times_ns[-1] - record.scheduled_ns) if record.token_times_ns else None


def tpot_s(record: RequestRecord) -> float | None:
    """Time per output token after the first: (e2e - ttft) / (output_tokens - 1). None for fewer than 2 tokens."""
    if record.output_tokens < 2:
        return None
    return s_from_ns(record.token_times_ns[-1] - record.token_times_ns[0]) / (record.output_tokens - 1)


def normalized_tpot_s(record: RequestRecord) -> float | None:
    """e2e / output_tokens (GuideLLM's TPOT). None without a token."""
    e2e = e2e_latency_s(record)
    return None if e2e is None else e2e / record.output_tokens


def inter_chunk_gaps_s(record: RequestRecord) -> npt.NDArray[np.float64]:
    """Gaps between consecutive chunks (vLLM's ITL): tokens delivered at the same instant are one chunk."""
    return np.diff(np.unique(np.asarray(record.token_times_ns, dtype=np.int64))).astype(np.float64) / NS_PER_S


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """Mean, spread and percentiles of the values that are not None; None when there are none."""
    known = np.asarray([value for value in values if value is not None], dtype=np.float64)
    if known.size == 0:
        return None
    p50, p90, p95, p99 = (float(p) for p in np.percentile(known, [50, 90, 95, 99], method="linear"))
    return Distribution(
        count=int(known.size),
        mean=float(known.mean()),
        std=float(known.std()),
        min=float(known.min()),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        max=float(known.max()),
    )


def throughput(records: Sequence[RequestRecord], gpus: int = 0) -> Throughput | None:
    """Rates of the successful requests; None when none succeeded or no time passed.

    Args:
        records: All requests of a window, in any order.
        gpus: Tensor x pipeline x data parallel GPUs; 0 on the CPU.
    """
    done = [record for record in records if succeeded(record)]
    if not done:
        return None
    duration_s = s_from_ns(max(r.token_times_ns[-1] for r in done) - min(r.sent_ns for r in records))
    if duration_s <= 0:
        return None
    inputs, outputs = sum(r.prompt_tokens for r in done), sum(r.output_tokens for r in done)
    return Throughput(
        duration_s=duration_s,
        requests=len(done),
        input_tokens=inputs,
        output_tokens=outputs,
        request_throughput_req_s=len(done) / duration_s,
        output_throughput_tok_s=outputs / duration_s,
        total_token_throughput_tok_s=(inputs + outputs) / duration_s,
        throughput_per_gpu_tok_s=outputs / duration_s / gpus if gpus else None,
    )


def summarise_latency(records: Sequence[RequestRecord], gpus: int = 0) -> LatencySummary:
    """Every latency metric of a window over its successful requests."""
    done = [record for record in records if succeeded(record)]
    return LatencySummary(
        ttft_s=distribution(map(ttft_s, done)),
        tpot_s=distribution(map(tpot_s, done)),
        inter_chunk_s=distribution(float(gap) for record in done for gap in inter_chunk_gaps_s(record)),
        e2e_latency_s=distribution(map(e2e_latency_s, done)),
        normalized_tpot_s=distribution(map(normalized_tpot_s, done)),
        throughput=throughput(records, gpus),
        failed=len(records) - len(done),
    )


def adjusted_percentiles(values: Iterable[float | None], failures: int) -> dict[str, float] | None:
    """p50, p90, p95 and p99 with each failure counted as +inf, by numpy's method ``nearest``; None without values or failures.

    A service that drops its slowest requests does not look faster by them.
    """
    known = [value for value in values if value is not None] + [float("inf")] * failures
    if not known:
        return None
    found = np.percentile(np.asarray(known, dtype=np.float64), [50, 90, 95, 99], method="nearest")
    return dict(zip(("p50", "p90", "p95", "p99"), map(float, found), strict=True))


def succeeded(record: RequestRecord) -> bool:
    """It was not aborted, and gave a token."""
    return record.finish_reason != "abort" and record.output_tokens > 0
