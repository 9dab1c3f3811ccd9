"""Core objects as rows: which part of an experiment, a load report or a reading goes into which column."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from llem_ray.core.backend import LoadReport, Rank, RequestRecord
from llem_ray.core.energy import EnergyReading, Flag, PhaseEnergy, Severity, Window
from llem_ray.core.outcome import Failed
from llem_ray.core.plan import Trial
from llem_ray.core.power import SamplerInfo
from llem_ray.core.workload_spec import LengthSpec, TimeSpec
from llem_ray.results.trial_columns import ADJUSTED_STATISTICS, STATISTICS

Row = dict[str, Any]


def to_json(value: object) -> str:
    """Compact JSON text of a JSON column; what JSON does not know becomes its text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def now_utc() -> datetime:
    """Wall time for columns named ``*_utc``: naive, in UTC, as every reader takes it without a time zone database."""
    return datetime.now(UTC).replace(tzinfo=None)


def trial_row(trial: Trial, *, attempt: int, load_key: str, gpus: int) -> Row:
    """Identity and experiment of one attempt: the columns known before it runs."""
    experiment = trial.experiment
    model, engine, workload, sampling = experiment.model, experiment.engine, experiment.workload, experiment.sampling
    load, turns = workload.load, _single(workload.turns)
    return {
        "trial_id": trial.trial_id,
        "cell_id": trial.cell.cell_id,
        "repeat": trial.repeat,
        "attempt": attempt,
        "load_key": load_key,
        "settings": to_json(dict(trial.cell.settings)),
        "experiment": to_json(asdict(experiment)),
        "backend": engine.backend,
        "model": model.id or model.config,
        "revision": model.revision,
        "weights": "random" if model.config is not None else model.weights,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "device": engine.device,
        "tensor_parallel": engine.tensor_parallel,
        "pipeline_parallel": engine.pipeline_parallel,
        "data_parallel": engine.data_parallel,
        "gpus": gpus,
        "engine_args": to_json(dict(engine.engine_args)),
        "prompt_source": workload.prompts.path or workload.prompts.dataset or workload.prompts.source,
        "batch_size": None if load.online else workload.batch_size,
        "load_pattern": load.pattern,
        "rate_per_s": load.rate_per_s,
        "burstiness": load.burstiness,
        "concurrency": load.concurrency,
        "turns": None if turns is None else int(turns),
        "turn_answers": None if workload.turns == 1 else "generated" if workload.generated_answers else "known",
        "think_time_s": _single(workload.think_time_s) if workload.turns != 1 and load.online else None,
        "trace": load.trace,
        "input_tokens": workload.input_tokens if isinstance(workload.input_tokens, int) else None,
        "output_tokens_requested": workload.output_tokens if isinstance(workload.output_tokens, int) else None,
        "ignore_eos": workload.ignore_eos,
        "workload_seed": workload.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "sampling_seed": sampling.seed,
    }


def _single(value: float | str | LengthSpec | TimeSpec) -> float | None:
    """The number, also of a distribution that has only one; None where it varies."""
    if isinstance(value, LengthSpec | TimeSpec):
        return value.mean if value.distribution == "fixed" else None
    return None if isinstance(value, str) else value


def load_columns(report: LoadReport) -> Row:
    """What was loaded and what it took."""
    return {
        "import_s": report.import_s,
        "construct_s": report.construct_s,
        "compile_s": report.compile_s,
        "warm_s": report.warm_s,
        "dtype": report.dtype,
        "device": report.device,
        "model_commit": report.model_commit,
        "weights": "random" if report.random_weights else "pretrained",
        "parameters": report.parameters,
        "weight_bytes": report.weight_bytes,
        "context_tokens": report.context_tokens,
        "engine_version": engine_version(report),
        "engine_facts": dict(report.notes),
    }


def engine_version(report: LoadReport) -> str | None:
    """Version of the engine's package, as its note ``engine`` tells it: ``vllm 0.32.0``; None where it has none."""
    return report.notes.get("engine", "").partition(" ")[2] or None


def window_columns(window: Window) -> Row:
    """The measured window."""
    return {"begin_ns": window.begin_ns, "end_ns": window.end_ns, "window_s": window.duration_s}


def count_columns(
    *,
    requests: int,
    prompt_tokens: int,
    padded_tokens: int,
    output_tokens: int,
    passes: int,
    steps: int,
    failed_prompt_tokens: int = 0,
    shared_prompt_tokens: int | None = None,
) -> Row:
    """Requests, tokens and steps of a window."""
    return {
        "requests": requests,
        "passes": passes,
        "prompt_tokens": prompt_tokens,
        "failed_prompt_tokens": failed_prompt_tokens,
        "shared_prompt_tokens": shared_prompt_tokens,
        "padded_tokens": padded_tokens,
        "output_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "steps": steps,
    }


def length_columns(requests: Sequence[RequestRecord]) -> Row:
    """Smallest, mean and largest realised lengths of requests."""
    if not requests:
        return {}
    lengths = {"prompt_tokens": [r.prompt_tokens for r in requests], "output_tokens": [r.output_tokens for r in requests]}
    row: Row = {}
    for name, values in lengths.items():
        row |= {f"{name}_min": min(values), f"{name}_mean": sum(values) / len(values), f"{name}_max": max(values)}
    return row


def turn_columns(requests: Iterable[RequestRecord]) -> Row:
    """How many conversations there were, passes counted apart, and their realised turns; nothing without turns."""
    turns = Counter(
        (record.request_id.partition("-")[0], record.conversation) for record in requests if record.conversation is not None
    )
    if not turns:
        return {}
    return {"conversations": len(turns), "turns_mean": sum(turns.values()) / len(turns), "turns_max": max(turns.values())}


def failure_columns(failed: Failed) -> Row:
    """How an attempt failed."""
    return {
        "status": "failed",
        "failure_kind": failed.kind,
        "failure_message": failed.message,
        "failure_traceback": failed.traceback,
    }


def distribution_columns(metric: str, values: Mapping[str, float] | None) -> Row:
    """The columns ``<metric>_mean``, ``<metric>_p50`` and so on of one latency metric.

    Args:
        metric: A key of ``LATENCY_METRICS``.
        values: Statistic -> value; others than those of ``STATISTICS`` are left out. None gives nulls.
    """
    return {f"{metric}_{statistic}": None if values is None else values.get(statistic) for statistic in STATISTICS}


def adjusted_columns(metric: str, values: Mapping[str, float] | None) -> Row:
    """The columns ``adj_<metric>_p50`` and so on. None gives nulls."""
    return {f"adj_{metric}_{statistic}": None if values is None else values[statistic] for statistic in ADJUSTED_STATISTICS}


def interval_columns(metric: str, ends: Mapping[int, tuple[float, float]]) -> Row:
    """The columns ``<metric>_p50_lo``, ``<metric>_p50_hi`` and so on; a percentile that is not in ``ends`` is null."""
    row: Row = {}
    for statistic in ADJUSTED_STATISTICS:
        low, high = ends.get(int(statistic.removeprefix("p")), (None, None))
        row |= {f"{metric}_{statistic}_lo": low, f"{metric}_{statistic}_hi": high}
    return row


def flag_columns(flags: Iterable[Flag]) -> Row:
    """Reason codes by severity, each once, in the order seen, with what was seen."""
    codes: dict[Severity, dict[str, None]] = {"invalid": {}, "flag": {}, "note": {}}
    details: dict[str, list[str]] = {}
    for flag in flags:
        codes[flag.severity][flag.code] = None
        seen = details.setdefault(flag.code, [])
        if flag.detail not in seen:
            seen.append(flag.detail)
    return {
        "invalid_reasons": list(codes["invalid"]),
        "flags": list(codes["flag"]),
        "notes": list(codes["note"]),
        "reason_details": {code: "; ".join(texts) for code, texts in details.items()},
    }


def device_columns(readings: Iterable[EnergyReading]) -> Row:
    """The ``devices`` column."""
    return {"devices": [_device(reading) for reading in readings]}


def _device(reading: EnergyReading) -> Row:
    lo, hi = reading.bound_j or (None, None)
    return {
        "node": reading.node,
        "uuid": reading.device_uuid,
        "name": reading.name,
        "source": reading.source,
        "scope": reading.scope,
        "method": reading.method,
        "energy_j": reading.energy_j,
        "u_j": reading.u_j,
        "bound_lo_j": lo,
        "bound_hi_j": hi,
        "cross_check_j": reading.cross_check_j,
        "cross_check_ratio": reading.cross_check_ratio,
        "sensor_rel": reading.sensor_rel,
        "coverage": reading.coverage,
        "mean_power_w": reading.mean_power_w,
        "flags": [flag.code for flag in reading.flags],
        "reason": reading.reason,
    }


def rank_columns(ranks: Iterable[Rank]) -> Row:
    """The ``ranks`` column."""
    return {"ranks": [asdict(rank) for rank in ranks]}


def worker_entry(worker: Any) -> Row:
    """One process of a gang, for the ``workers`` column; ``worker`` has the attributes of the entry."""
    return {
        "rank": worker.rank,
        "node": worker.node,
        "hostname": worker.hostname,
        "address": worker.address,
        "pid": worker.pid,
        "gpu_uuids": list(worker.gpu_uuids or worker.gpu_ids),
    }


def clock_row(node: str, generation: int, *, run_ns: int, offset_ns: int, delta_ns: int) -> Row:
    """A host's clock beside the run driver's at one instant."""
    return {"node": node, "generation": generation, "run_ns": run_ns, "offset_ns": offset_ns, "delta_ns": delta_ns}


def request_row(
    record: RequestRecord,
    *,
    trial_id: str,
    attempt: int,
    latencies: Mapping[str, float | None],
    keep_token_times: bool,
    energy_j: float | None = None,
    in_window: bool = True,
) -> Row:
    """One request.

    Args:
        record: The request.
        trial_id: Its trial.
        attempt: Its attempt.
        latencies: ``ttft_s``, ``tpot_s``, ``e2e_latency_s``, ``e2e_from_schedule_s`` and ``normalized_tpot_s``.
        keep_token_times: Store the time of every token.
        energy_j: Its share of the window's energy.
        in_window: It ended in the measured window.
    """
    times = record.token_times_ns
    return {
        "trial_id": trial_id,
        "attempt": attempt,
        "request_id": record.request_id,
        "conversation": record.conversation,
        "turn": record.turn,
        "in_window": in_window,
        "prompt_tokens": record.prompt_tokens,
        "shared_prompt_tokens": record.shared_prompt_tokens,
        "padded_tokens": record.padded_tokens,
        "output_tokens": record.output_tokens,
        "output_tokens_requested": record.requested_tokens,
        "finish_reason": record.finish_reason,
        "output_chunks": record.output_chunks,
        "cached_tokens": record.cached_tokens,
        "draft_tokens": record.draft_tokens,
        "accepted_tokens": record.accepted_tokens,
        "scheduled_ns": record.scheduled_ns,
        "queued_ns": record.queued_ns,
        "sent_ns": record.sent_ns,
        "first_token_ns": times[0] if times else None,
        "last_token_ns": times[-1] if times else None,
        **latencies,
        "energy_j": energy_j,
        "token_times_ns": list(times) if keep_token_times else None,
    }


def phase_row(energy: PhaseEnergy, *, gang: str | None, node: str) -> Row:
    """One device's energy over one phase."""
    span = energy.span
    return {
        "gang": gang,
        "node": node,
        "device_uuid": energy.device_uuid,
        "phase": span.phase,
        "begin_ns": span.begin_ns,
        "end_ns": span.end_ns,
        "duration_s": (span.end_ns - span.begin_ns) / 1e9,
        "trial_id": span.trial_id,
        "attempt": span.attempt,
        "energy_j": energy.energy_j,
        "u_j": energy.u_j,
        "method": energy.method,
        "reason": energy.reason,
        "notes": dict(energy.notes) or None,
    }


_HOST_COLUMNS = ("nvidia_driver", "cpu_model", "cpu_count_logical", "cpu_governor", "memory_bytes", "kernel", "container")


def node_row(info: SamplerInfo, versions: Mapping[str, str]) -> Row:
    """One start of a node's sampler."""
    return {
        "node": info.node,
        "hostname": info.hostname,
        "epoch": info.epoch,
        "sampler_pid": info.pid,
        "recorded_utc": now_utc(),
        "sample_hz": info.sample_hz,
        "devices": [_node_device(info, index) for index in range(len(info.devices))],
        "unavailable": dict(info.unavailable),
        "gpu_names": [device.name for device in info.devices if device.scope in {"gpu", "module"}],
        **{name: info.host.get(name) for name in _HOST_COLUMNS},
        "host": to_json(dict(info.host)),
        "versions": dict(versions),
        "notes": list(info.notes),
    }


def _node_device(info: SamplerInfo, index: int) -> Row:
    device = asdict(info.devices[index])
    calibration = info.calibrations.get(device["uuid"])
    return {**device, **({} if calibration is None else {k: v for k, v in asdict(calibration).items() if k != "device_uuid"})}
