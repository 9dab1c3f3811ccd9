"""Each metric against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llem_ray.core.backend import RequestRecord
from llem_ray.workloads import latency

MS = 1_000_000


def record(times_ms: list[int], sent_ms: int = 100, **changes: Any) -> RequestRecord:
    fields: dict[str, Any] = {
        "request_id": "r",
        "prompt_tokens": 10,
        "padded_tokens": 12,
        "output_token_ids": tuple(range(len(times_ms))),
        "finish_reason": "length",
        "scheduled_ns": 40 * MS,
        "queued_ns": 60 * MS,
        "sent_ns": sent_ms * MS,
        "token_times_ns": tuple(t * MS for t in times_ms),
    }
    return RequestRecord(**(fields | changes))


def test_one_request_by_hand() -> None:
    # sent at 100 ms, tokens at 150, 170, 180 and 240 ms
    r = record([150, 170, 180, 240])
    assert latency.ttft_s(r) == pytest.approx(0.050)
    assert latency.e2e_latency_s(r) == pytest.approx(0.140)
    assert latency.e2e_from_schedule_s(r) == pytest.approx(0.200)
    assert latency.tpot_s(r) == pytest.approx(0.030)
    assert latency.normalized_tpot_s(r) == pytest.approx(0.035)


def test_tokens_of_one_chunk_are_one_gap() -> None:
    r = record([150, 170, 170, 230])
    assert latency.inter_chunk_gaps_s(r) == pytest.approx([0.020, 0.060])
    assert latency.tpot_s(r) == pytest.approx(0.080 / 3)


def test_one_token_has_no_tpot() -> None:
    r = record([150])
    assert latency.ttft_s(r) == latency.e2e_latency_s(r) == pytest.approx(0.050)
    assert latency.tpot_s(r) is None


def test_no_token_has_no_latency() -> None:
    r = record([], finish_reason="abort")
    metrics = (latency.ttft_s, latency.e2e_latency_s, latency.e2e_from_schedule_s, latency.tpot_s, latency.normalized_tpot_s)
    assert [metric(r) for metric in metrics] == [None] * 5


def test_percentiles_are_numpy_linear() -> None:
    d = latency.distribution([4.0, None, 1.0, 3.0, 2.0])
    assert d is not None
    assert (d.count, d.mean, d.min, d.max) == (4, 2.5, 1.0, 4.0)
    assert d.std == pytest.approx(np.sqrt(1.25))
    assert (d.p50, d.p90, d.p95, d.p99) == pytest.approx((2.5, 3.7, 3.85, 3.97))
    assert latency.distribution([None, None]) is None
    assert latency.distribution([]) is None


def test_throughput_runs_from_first_dispatch_to_last_response() -> None:
    records = [record([150, 200], sent_ms=100), record([300, 350, 600], sent_ms=250)]
    t = latency.throughput(records, gpus=2)
    assert t is not None
    assert (t.requests, t.input_tokens, t.output_tokens) == (2, 20, 5)
    assert t.duration_s == pytest.approx(0.5)
    assert t.request_throughput_req_s == pytest.approx(4)
    assert t.output_throughput_tok_s == pytest.approx(10)
    assert t.total_token_throughput_tok_s == pytest.approx(50)
    assert t.throughput_per_gpu_tok_s == pytest.approx(5)


def test_throughput_without_gpu_or_success_is_null() -> None:
    on_cpu = latency.throughput([record([150])])
    assert on_cpu is not None
    assert on_cpu.throughput_per_gpu_tok_s is None
    assert latency.throughput([]) is None
    assert latency.throughput([record([150], finish_reason="abort")]) is None
    assert latency.throughput([record([100])]) is None


def test_summary_counts_failures_apart() -> None:
    s = latency.summarise_latency([record([150, 170]), record([200]), record([], finish_reason="abort")])
    assert s.failed == 1
    assert s.ttft_s is not None
    assert s.ttft_s.count == 2
    assert s.tpot_s is not None
    assert s.tpot_s.count == 1
    assert s.inter_chunk_s is not None
    assert s.inter_chunk_s.mean == pytest.approx(0.020)
    empty = latency.summarise_latency([])
    assert (empty.ttft_s, empty.throughput, empty.failed) == (None, None, 0)
