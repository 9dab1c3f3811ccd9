"""An attempt as rows of the ``trials`` and ``requests`` tables, energy apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llem_ray.core.backend import RequestRecord
from llem_ray.core.outcome import Completed, Failed
from llem_ray.energy.request_share import BY_PHASES, PhaseParts, share_energy
from llem_ray.execution.load_rows import counts_of, is_part, load_columns, requests_inside
from llem_ray.execution.records import AttemptEnded
from llem_ray.execution.window_tokens import request_parts
from llem_ray.results import rows as columns
from llem_ray.results.trial_columns import ADJUSTED_METRICS, INTERVAL_METRICS
from llem_ray.workloads import latency
from llem_ray.workloads.percentile_intervals import percentile_intervals
from llem_ray.workloads.windows import count_inside

Row = dict[str, Any]

_PER_REQUEST = {
    "ttft_s": latency.ttft_s,
    "tpot_s": latency.tpot_s,
    "e2e_latency_s": latency.e2e_latency_s,
    "e2e_from_schedule_s": latency.e2e_from_schedule_s,
    "normalized_tpot_s": latency.normalized_tpot_s,
}


IN_BATCHES: Final = "requests of a batch are answered together: they are not independent of each other"
"""Why there is no interval over them."""


def attempt_row(ended: AttemptEnded) -> Row:
    """Who it was, what was loaded for it, how it ended, and what it did."""
    gang, outcome = ended.gang, ended.outcome
    row = columns.trial_row(ended.trial, attempt=ended.attempt, load_key=ended.group.load_key, gpus=ended.group.gpus)
    row |= {"status": "completed", "started_utc": ended.started_utc.replace(tzinfo=None), "gap_s": ended.gap_s}
    if gang is not None:
        row |= {"host": gang.lead.hostname, "node": gang.node, "gang": gang.name, "load_energy_j": gang.load_energy_j}
        row |= {"workers": [columns.worker_entry(worker) for worker in gang.workers]}
        if gang.loaded is not None:
            row |= columns.load_columns(gang.loaded.report) | columns.rank_columns(gang.loaded.ranks)
    if isinstance(outcome, Failed):
        return row | columns.failure_columns(outcome)
    row |= columns.window_columns(outcome.window)
    counts = counts_of(outcome)
    row |= columns.count_columns(
        requests=counts.requests,
        prompt_tokens=counts.prompt_tokens,
        failed_prompt_tokens=counts.failed_prompt_tokens,
        shared_prompt_tokens=counts.shared_prompt_tokens,
        padded_tokens=counts.padded_tokens,
        output_tokens=counts.output_tokens,
        passes=outcome.passes,
        steps=outcome.steps,
    )
    row |= columns.length_columns(requests_inside(outcome)) | columns.turn_columns(outcome.requests)
    row |= load_columns(outcome, ended.trial.experiment.workload.load)
    workload = ended.trial.experiment.workload
    row |= latency_columns(outcome, ended.group.experiment.engine.world_size if ended.group.gpus else 0)
    alone = workload.load.online or workload.batch_size == 1
    return row | latency_interval_columns(requests_inside(outcome), workload.seed, alone=alone)


def latency_interval_columns(requests: Sequence[RequestRecord], seed: int, *, alone: bool) -> Row:
    """How sure the latency percentiles are, or why that is not known.

    Args:
        requests: Those of the window.
        seed: Of its draws.
        alone: Requests are answered one by one.
    """
    done = sorted(filter(latency.succeeded, requests), key=lambda request: (request.sent_ns, request.token_times_ns))
    row: Row = {}
    lacking: dict[str, list[str]] = {}
    for metric in INTERVAL_METRICS:
        values = [of_one for request in done if len(of_one := _values(metric, request))]
        found = percentile_intervals(values, seed) if alone else None
        row |= columns.interval_columns(metric, found.ends if found is not None else {})
        reason = found.why_not if found is not None else IN_BATCHES
        if values and reason is not None:
            lacking.setdefault(reason, []).append(metric)
    reasons = list(lacking) if len(lacking) < 2 else [f"{', '.join(metrics)}: {reason}" for reason, metrics in lacking.items()]
    return row | {"latency_interval_reason": "; ".join(reasons) or None}


def _values(metric: str, request: RequestRecord) -> Sequence[float] | npt.NDArray[np.float64]:
    """What a request adds to the values that percentiles are of."""
    if metric == "inter_chunk_s":
        return latency.inter_chunk_gaps_s(request)
    value = _PER_REQUEST[metric](request)
    return () if value is None else (value,)


def latency_columns(done: Completed, gpus: int) -> Row:
    """Latency percentiles and throughputs over the window's requests: those that ended in it."""
    requests = requests_inside(done)
    summary = latency.summarise_latency(requests, gpus)
    spreads = {
        "ttft_s": summary.ttft_s,
        "tpot_s": summary.tpot_s,
        "inter_chunk_s": summary.inter_chunk_s,
        "e2e_latency_s": summary.e2e_latency_s,
        "e2e_from_schedule_s": latency.distribution(map(latency.e2e_from_schedule_s, filter(latency.succeeded, requests))),
        "normalized_tpot_s": summary.normalized_tpot_s,
    }
    row: Row = {}
    for metric, spread in spreads.items():
        row |= columns.distribution_columns(metric, None if spread is None else asdict(spread))
    done_well = list(filter(latency.succeeded, requests))
    for metric in ADJUSTED_METRICS:
        values = map(_PER_REQUEST[metric], done_well)
        row |= columns.adjusted_columns(metric, latency.adjusted_percentiles(values, summary.failed))
    row["failed_requests"] = summary.failed
    rates = part_throughput(done, gpus) if is_part(done) else summary.throughput
    if rates is not None:
        row |= {
            "serving_s": rates.duration_s,
            "output_throughput_tok_s": rates.output_throughput_tok_s,
            "total_token_throughput_tok_s": rates.total_token_throughput_tok_s,
            "request_throughput_req_s": rates.request_throughput_req_s,
            "throughput_per_gpu_tok_s": rates.throughput_per_gpu_tok_s,
        }
    elif requests and not done_well:  # nothing in whatever time
        row |= {"output_throughput_tok_s": 0.0, "total_token_throughput_tok_s": 0.0, "request_throughput_req_s": 0.0}
        row["throughput_per_gpu_tok_s"] = 0.0 if gpus else None
    return row


def part_throughput(done: Completed, gpus: int) -> latency.Throughput:
    """Rates within a window that is a part of a run: what happened inside to requests that succeeded, over its length."""
    served = list(filter(latency.succeeded, done.requests))
    counts, length_s = count_inside(served, done.window.begin_ns, done.window.end_ns), done.window.duration_s
    return latency.Throughput(
        duration_s=length_s,
        requests=counts.succeeded,
        input_tokens=counts.prompt_tokens,
        output_tokens=counts.output_tokens,
        request_throughput_req_s=counts.succeeded / length_s,
        output_throughput_tok_s=counts.output_tokens / length_s,
        total_token_throughput_tok_s=(counts.prompt_tokens + counts.output_tokens) / length_s,
        throughput_per_gpu_tok_s=counts.output_tokens / length_s / gpus if gpus else None,
    )


def request_rows(ended: AttemptEnded, trial: Row, *, keep_token_times: bool) -> list[Row]:
    """One row per request of the window, of an online trial of the whole run; none for a failed attempt.

    Args:
        ended: The attempt.
        trial: Its row, energies included.
        keep_token_times: Store the time of every token.
    """
    if not isinstance(ended.outcome, Completed):
        return []
    window_ids = {record.request_id for record in requests_inside(ended.outcome)}
    return [
        columns.request_row(
            record,
            trial_id=ended.trial.trial_id,
            attempt=ended.attempt,
            latencies={name: metric(record) for name, metric in _PER_REQUEST.items()},
            keep_token_times=keep_token_times,
            energy_j=energy_j,
            in_window=record.request_id in window_ids,
        )
        for record, energy_j in zip(ended.outcome.requests, request_energies(trial, ended.outcome), strict=True)
    ]


def request_energies(trial: Row, done: Completed) -> Sequence[float | None]:
    """Energy of each request by the trial's ``request_energy_rule``; None without one, and for what is outside the window."""
    rule = trial.get("request_energy_rule")
    parts = None
    if rule == BY_PHASES:
        parts = PhaseParts(prefill_j=trial["prefill_energy_j"], decode_j=trial["decode_energy_j"])
    if rule is None:
        return [None] * len(done.requests)
    tokens = request_parts(done)
    prompts, outputs = [part.prompt_tokens for part in tokens], [part.output_tokens for part in tokens]
    shares_j = share_energy(trial["total_energy_j"], prompts, outputs, parts)
    return [share_j if part.output_tokens or part.prompt_tokens else None for share_j, part in zip(shares_j, tokens, strict=True)]
