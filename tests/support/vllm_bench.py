"""The metric formulas of `vllm bench serve` 0.32 (``vllm/benchmarks/serve.py``, ``calculate_metrics``), restated.

``tests/vllm/test_vllm_bench_metrics.py`` holds them against vLLM itself where that is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from llem_ray.core.backend import RequestRecord

PERCENTILES = (50.0, 90.0, 95.0, 99.0)


@dataclass
class Output:
    """What vLLM's client knows of a request, s (``RequestFuncOutput``)."""

    success: bool
    prompt_len: int
    output_tokens: int
    start_time: float
    ttft: float
    latency: float
    itl: list[float]


def output_of(record: RequestRecord) -> Output:
    """What a client would have seen: a chunk for each instant at which tokens arrived."""
    chunks = [time_ns / 1e9 for time_ns in sorted(set(record.token_times_ns))]
    sent = record.sent_ns / 1e9
    done = record.finish_reason != "abort" and bool(chunks)
    return Output(
        success=done,
        prompt_len=record.prompt_tokens,
        output_tokens=record.output_tokens,
        start_time=sent,
        ttft=chunks[0] - sent if chunks else 0.0,
        latency=chunks[-1] - sent if chunks else 0.0,
        itl=[later - earlier for earlier, later in pairwise(chunks)],
    )


def calculate_metrics(outputs: Sequence[Output], dur_s: float, goodput_ms: Mapping[str, float]) -> dict[str, Any]:
    """The keys of vLLM's result that ours are compared with.

    Args:
        outputs: All requests.
        dur_s: Duration of the benchmark.
        goodput_ms: Limits on ``ttft``, ``tpot`` and ``e2el``, ms.
    """
    done = [output for output in outputs if output.success]
    tpots, all_tpots = [], []
    for output in done:
        tpot = 0.0
        if output.output_tokens > 1:
            tpot = (output.latency - output.ttft) / (output.output_tokens - 1)
            tpots.append(tpot)
        all_tpots.append(tpot)
    ttfts = [output.ttft for output in done]
    e2els = [output.latency for output in done]
    itls = [gap for output in done for gap in output.itl]
    limited = {"ttft": ttfts, "tpot": all_tpots, "e2el": e2els}
    chosen = [[value <= limit / 1000 for value in limited[name]] for name, limit in goodput_ms.items()]
    good = sum(map(all, zip(*chosen, strict=True))) if chosen else 0
    total_in, total_out = sum(output.prompt_len for output in done), sum(output.output_tokens for output in done)
    found: dict[str, Any] = {
        "completed": len(done),
        "failed": len(outputs) - len(done),
        "total_input": total_in,
        "total_output": total_out,
        "request_throughput": len(done) / dur_s,
        "request_goodput": good / dur_s,
        "output_throughput": total_out / dur_s,
        "total_token_throughput": (total_in + total_out) / dur_s,
    }
    for name, values in {"ttft": ttfts, "tpot": tpots, "itl": itls, "e2el": e2els}.items():
        known = values or 0
        found[f"mean_{name}_ms"] = np.mean(known) * 1000
        found[f"std_{name}_ms"] = np.std(known) * 1000
        found[f"median_{name}_ms"] = np.median(known) * 1000
        found[f"percentiles_{name}_ms"] = [(p, np.percentile(known, p) * 1000) for p in PERCENTILES]
    return found
