"""An attempt as rows of the ``trials`` and ``requests`` tables, energy apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llem_ray.core.outcome import Completed, Failed
from llem_ray.energy.request_share import BY_PHASES, PhaseParts, share_energy
from llem_ray.execution.records import AttemptEnded
from llem_ray.execution.window_tokens import request_parts
from llem_ray.results import rows as columns
from llem_ray.workloads import latency

Row = dict[str, Any]

_PER_REQUEST = {
    "ttft_s": latency.ttft_s,
    "tpot_s": latency.tpot_s,
    "e2e_latency_s": latency.e2e_latency_s,
    "e2e_from_schedule_s": latency.e2e_from_schedule_s,
    "normalized_tpot_s": latency.normalized_tpot_s,
}


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
    row |= columns.count_columns(outcome.requests, passes=outcome.passes, steps=outcome.steps)
    return row | latency_columns(outcome, ended.group.experiment.engine.world_size if ended.group.gpus else 0)


def latency_columns(done: Completed, gpus: int) -> Row:
    """Latency percentiles and throughputs over the window's requests."""
    summary = latency.summarise_latency(done.requests, gpus)
    spreads = {
        "ttft_s": summary.ttft_s,
        "tpot_s": summary.tpot_s,
        "inter_chunk_s": summary.inter_chunk_s,
        "e2e_latency_s": summary.e2e_latency_s,
        "e2e_from_schedule_s": latency.distribution(map(latency.e2e_from_schedule_s, done.requests)),
        "normalized_tpot_s": summary.normalized_tpot_s,
    }
    row: Row = {}
    for metric, spread in spreads.items():
        row |= columns.distribution_columns(metric, None if spread is None else asdict(spread))
    rates = summary.throughput
    if rates is not None:
        row |= {
            "serving_s": rates.duration_s,
            "output_throughput_tok_s": rates.output_throughput_tok_s,
            "total_token_throughput_tok_s": rates.total_token_throughput_tok_s,
            "request_throughput_req_s": rates.request_throughput_req_s,
            "throughput_per_gpu_tok_s": rates.throughput_per_gpu_tok_s,
        }
    return row


def request_rows(ended: AttemptEnded, trial: Row, *, keep_token_times: bool) -> list[Row]:
    """One row per request of the window; none for a failed attempt. ``trial`` is the attempt's row, energies included."""
    if not isinstance(ended.outcome, Completed):
        return []
    return [
        columns.request_row(
            record,
            trial_id=ended.trial.trial_id,
            attempt=ended.attempt,
            latencies={name: metric(record) for name, metric in _PER_REQUEST.items()},
            keep_token_times=keep_token_times,
            energy_j=energy_j,
        )
        for record, energy_j in zip(ended.outcome.requests, request_energies(trial, ended.outcome), strict=True)
    ]


def request_energies(trial: Row, done: Completed) -> Sequence[float | None]:
    """Energy of each request by the trial's ``request_energy_rule``; nulls where it has none."""
    rule = trial.get("request_energy_rule")
    parts = None
    if rule == BY_PHASES:
        parts = PhaseParts(prefill_j=trial["prefill_energy_j"], decode_j=trial["decode_energy_j"])
    if rule is None:
        return [None] * len(done.requests)
    tokens = request_parts(done)
    return share_energy(
        trial["total_energy_j"], [part.prompt_tokens for part in tokens], [part.output_tokens for part in tokens], parts
    )
