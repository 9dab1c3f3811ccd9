"""Latency, throughput and goodput columns: by hand on scripted requests, and equal to `vllm bench serve` on any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_bench import PERCENTILES, calculate_metrics, output_of

from llem_ray.core.backend import RequestRecord
from llem_ray.core.energy import Window
from llem_ray.core.measure_spec import SloSpec
from llem_ray.core.outcome import Completed, OnlineRun
from llem_ray.execution.load_rows import goodput_columns
from llem_ray.execution.rows import latency_columns, latency_interval_columns
from llem_ray.results.schema import SCHEMAS

MS = 1_000_000


def record(times_ms: Sequence[int], sent_ms: int, **changes: Any) -> RequestRecord:
    fields: dict[str, Any] = {
        "request_id": f"0-{sent_ms}",
        "prompt_tokens": 10,
        "padded_tokens": 10,
        "output_token_ids": tuple(range(len(times_ms))),
        "finish_reason": "length",
        "scheduled_ns": sent_ms * MS,
        "queued_ns": sent_ms * MS,
        "sent_ns": sent_ms * MS,
        "token_times_ns": tuple(t * MS for t in times_ms),
    }
    return RequestRecord(**(fields | changes))


def completed(records: Sequence[RequestRecord], window_s: float = 2.0) -> Completed:
    window = Window(node="h", begin_ns=0, end_ns=round(window_s * 1e9))
    return Completed(window=window, spans=(), requests=tuple(records), steps=1, passes=1)


SCRIPTED = [
    record([200, 240, 240, 320], 100, scheduled_ns=50 * MS),  # ttft 100, gaps 40 and 80, e2e 220, tpot 40
    record([500], 200, scheduled_ns=200 * MS),  # ttft 300 = e2e, no tpot
    record([600, 1100], 300, prompt_tokens=30),  # ttft 300, gap 500 = tpot, e2e 800
    record([700], 400, finish_reason="abort"),  # failed after a token: in nothing but the adj_ columns
    record([], 450, finish_reason="abort"),
]


def test_every_column_by_hand() -> None:
    row = latency_columns(completed(SCRIPTED), gpus=2)
    by_hand = {
        "ttft_s": (0.100, 0.300, 0.300, (0.100 + 0.300 + 0.300) / 3),  # min, median, max, mean
        "tpot_s": (0.040, 0.270, 0.500, 0.270),
        "inter_chunk_s": (0.040, 0.080, 0.500, (0.040 + 0.080 + 0.500) / 3),
        "e2e_latency_s": (0.220, 0.300, 0.800, 0.440),
        "e2e_from_schedule_s": (0.270, 0.300, 0.800, (0.270 + 0.300 + 0.800) / 3),
        "normalized_tpot_s": (0.055, 0.300, 0.400, (0.055 + 0.300 + 0.400) / 3),
    }
    for metric, (least, median, most, mean) in by_hand.items():
        found = (row[f"{metric}_min"], row[f"{metric}_p50"], row[f"{metric}_max"], row[f"{metric}_mean"])
        assert found == pytest.approx((least, median, most, mean)), metric
    assert row["tpot_s_std"] == pytest.approx(0.230)
    assert row["tpot_s_p90"] == pytest.approx(0.040 + 0.9 * 0.460)
    # first sent at 100 ms, last token of a success at 1,100 ms
    assert row["serving_s"] == pytest.approx(1.0)
    assert row["request_throughput_req_s"] == pytest.approx(3.0)
    assert row["output_throughput_tok_s"] == pytest.approx(7.0)
    assert row["total_token_throughput_tok_s"] == pytest.approx(57.0)
    assert row["throughput_per_gpu_tok_s"] == pytest.approx(3.5)
    assert row["failed_requests"] == 2
    assert set(row) <= set(SCHEMAS["trials"].names)


def test_adjusted_percentiles_count_failures_as_infinitely_late() -> None:
    row = latency_columns(completed(SCRIPTED), gpus=0)
    # ttft 100, 300, 300, inf, inf: index 0.5 x 4 = 2 is 300; 0.9 x 4 = 3.6 is nearest to 4
    assert row["adj_ttft_s_p50"] == pytest.approx(0.300)
    assert row["adj_ttft_s_p90"] == row["adj_ttft_s_p99"] == math.inf
    # tpot 40, 500, inf, inf: 0.5 x 3 = 1.5 is nearest to 2, halves to even
    assert row["adj_tpot_s_p50"] == math.inf
    unharmed = latency_columns(completed(SCRIPTED[:3]), gpus=0)
    assert unharmed["adj_e2e_latency_s_p50"] == pytest.approx(0.300)
    assert unharmed["adj_e2e_latency_s_p99"] == pytest.approx(0.800)
    assert latency_columns(completed(SCRIPTED[3:]), gpus=0)["adj_ttft_s_p50"] == math.inf
    assert latency_columns(completed(SCRIPTED[3:]), gpus=0)["ttft_s_p50"] is None
    assert latency_columns(completed([]), gpus=0)["adj_ttft_s_p50"] is None


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (SloSpec(ttft_ms=300), 3),
        (SloSpec(ttft_ms=299), 1),
        (SloSpec(tpot_ms=40), 2),  # a single token has a TPOT of 0, as vLLM has it
        (SloSpec(e2e_ms=300), 2),
        (SloSpec(ttft_ms=300, tpot_ms=500, e2e_ms=799), 2),
        (SloSpec(preset="mlperf-llama2-70b"), 2),  # 2000 / 200 ms
        (SloSpec(preset="mlperf-llama3.1-8b-interactive"), 1),  # 500 / 30 ms
    ],
)
def test_goodput_by_hand(slo: SloSpec, good: int) -> None:
    row = goodput_columns(completed(SCRIPTED), slo, power_w=50.0)
    assert row["goodput_req_s"] == pytest.approx(good / 1.0)
    assert row["slo_attainment"] == pytest.approx(good / 5)
    assert row["goodput_per_watt"] == pytest.approx(good / 50)
    assert set(row) <= set(SCHEMAS["trials"].names)


def test_no_limits_no_success_and_no_energy() -> None:
    assert goodput_columns(completed(SCRIPTED), SloSpec(), 50.0) == {}
    failed = goodput_columns(completed(SCRIPTED[3:]), SloSpec(ttft_ms=1), 50.0)
    assert (failed["goodput_req_s"], failed["slo_attainment"], failed["goodput_per_watt"]) == (0.0, 0.0, 0.0)
    assert goodput_columns(completed([]), SloSpec(ttft_ms=1), 50.0) == {}
    none = latency_columns(completed(SCRIPTED[3:]), gpus=1)
    assert none["request_throughput_req_s"] == none["output_throughput_tok_s"] == none["throughput_per_gpu_tok_s"] == 0.0
    assert none.get("serving_s") is None
    assert latency_columns(completed([]), gpus=0).get("request_throughput_req_s") is None
    assert goodput_columns(completed(SCRIPTED), SloSpec(ttft_ms=300), None)["goodput_per_watt"] is None


def test_a_part_of_a_run_in_which_no_request_ends_has_a_goodput_of_0() -> None:
    whole = Window(node="h", begin_ns=0, end_ns=2_000 * MS)
    run = OnlineRun(whole=whole, rule="interval", concurrency=1, missed=None)
    part = replace(completed(SCRIPTED), window=replace(whole, begin_ns=1_500 * MS), online=run)
    found = goodput_columns(part, SloSpec(ttft_ms=300), None)
    assert (found["goodput_req_s"], found["slo_attainment"], found["slo_ttft_ms"]) == (0.0, None, 300)


def test_percentile_intervals_and_why_there_are_none() -> None:
    """120 requests of which 20 have one token: no TPOT, and none of p95 and p99."""
    delays_ms = [number * 37 % 120 for number in range(120)]
    times_ms = [[number + 100 + delay, number + 400 + delay] for number, delay in enumerate(delays_ms)]
    many = [record(times if number % 6 else times[:1], number) for number, times in enumerate(times_ms)]
    row = latency_interval_columns(many, 7, alone=True)
    assert row == latency_interval_columns(list(reversed(many)), 7, alone=True)
    assert row != latency_interval_columns(many, 8, alone=True)
    median_s = latency_columns(completed(many), gpus=0)["ttft_s_p50"]
    assert row["ttft_s_p50_lo"] < median_s < row["ttft_s_p50_hi"]
    assert row["ttft_s_p95_lo"] is row["ttft_s_p99_hi"] is None
    assert row["inter_chunk_s_p50_lo"] == row["inter_chunk_s_p90_hi"] == pytest.approx(0.3)
    assert row["tpot_s_p50_lo"] == pytest.approx(0.3)
    assert row["latency_interval_reason"].startswith("ttft_s, e2e_latency_s, e2e_from_schedule_s: 120 requests")
    assert "tpot_s, inter_chunk_s: 100 requests, p95 takes 200, p99 takes 1000" in row["latency_interval_reason"]
    assert set(row) <= set(SCHEMAS["trials"].names)
    few = latency_interval_columns(many[:60], 7, alone=True)
    assert few["ttft_s_p50_lo"] is None
    assert "e2e_from_schedule_s: 60 requests, p50 takes 100, p90 takes 100, p95 takes" in few["latency_interval_reason"]
    together = latency_interval_columns(many, 7, alone=False)
    assert together["ttft_s_p50_lo"] is None
    assert "batch" in together["latency_interval_reason"]
    assert latency_interval_columns([], 7, alone=True)["latency_interval_reason"] is None


LIMITS_MS = {"ttft": 300.0, "tpot": 50.0, "e2el": 900.0}
SLO = SloSpec(ttft_ms=300, tpot_ms=50, e2e_ms=900)
EQUAL = {
    "request_throughput_req_s": "request_throughput",
    "output_throughput_tok_s": "output_throughput",
    "total_token_throughput_tok_s": "total_token_throughput",
    "goodput_req_s": "request_goodput",
    "failed_requests": "failed",
}
"""Our column -> vLLM's key."""
EQUAL_METRICS = {"ttft_s": "ttft", "tpot_s": "tpot", "inter_chunk_s": "itl", "e2e_latency_s": "e2el"}


@st.composite
def records(draw: st.DrawFn) -> list[RequestRecord]:
    found = []
    for index in range(draw(st.integers(1, 8))):
        sent = draw(st.integers(0, 2000))
        times = sorted(sent + 1 + gap for gap in draw(st.lists(st.integers(0, 1500), max_size=6)))
        reason = draw(st.sampled_from(["length", "length", "stop", "abort"]))
        fields = {"finish_reason": reason, "request_id": f"0-{index}", "prompt_tokens": draw(st.integers(1, 500))}
        found.append(record(times, sent, **fields))
    return found


@given(records=records())
def test_equal_to_vllm_bench(records: list[RequestRecord]) -> None:
    """All that both define. Where nothing defines a value ours is null, vLLM's 0."""
    done = completed(records)
    row = latency_columns(done, gpus=0) | goodput_columns(done, SLO, None)
    if row.get("serving_s") is None:
        assert not any(output_of(one).success for one in records)
        return
    theirs = calculate_metrics([output_of(one) for one in records], row["serving_s"], LIMITS_MS)
    for ours, key in EQUAL.items():
        assert row[ours] == pytest.approx(theirs[key]), ours
    for metric, name in EQUAL_METRICS.items():
        pairs = {"mean": theirs[f"mean_{name}_ms"], "std": theirs[f"std_{name}_ms"], "p50": theirs[f"median_{name}_ms"]}
        pairs |= {f"p{p:g}": value for p, value in theirs[f"percentiles_{name}_ms"] if p in PERCENTILES}
        for statistic, value_ms in pairs.items():
            own_s = row[f"{metric}_{statistic}"]
            assert (0.0 if own_s is None else own_s * 1000) == pytest.approx(value_ms, abs=1e-6), (metric, statistic)
