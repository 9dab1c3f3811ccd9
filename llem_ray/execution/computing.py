"""FLOP of an attempt and what follows from them: columns of the ``trials`` table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llem_ray.core.backend import LoadReport
from llem_ray.core.flops import parameter_model
from llem_ray.core.outcome import Completed
from llem_ray.core.spec import Experiment
from llem_ray.energy.metrics import joules_per_flop, mfu
from llem_ray.energy.peak_flops import peak_flops_per_s
from llem_ray.energy.phase_split import shares_inside
from llem_ray.execution.records import GangRecord
from llem_ray.execution.window_tokens import request_parts

Row = dict[str, Any]


def flop_columns(gang: GangRecord, done: Completed, energy_j: float | None) -> Row:
    """FLOP, J/FLOP and MFU of a window; the energy is None where it is missing or invalid."""
    report = gang.loaded.report if gang.loaded is not None else None
    flops, method, reason = count_flops(done, report)
    peak = _peak(gang, report)
    reasons = {"flops": reason} if reason else {}
    if isinstance(peak, str):
        reasons |= {"mfu": peak}
    known_peak = None if isinstance(peak, str) else peak
    return {
        "flops": flops,
        "flops_method": method,
        "joules_per_flop": joules_per_flop(energy_j, flops),
        "peak_flops_per_s": known_peak,
        "mfu": mfu(flops, done.window.duration_s, known_peak),
        "null_reasons": reasons,
    }


def count_flops(done: Completed, report: LoadReport | None) -> tuple[float | None, str | None, str | None]:
    """FLOP of a window, how they were counted, and why they are not known.

    The engine's own count of every step comes first, then the model's architecture, then two for each parameter and token.
    """
    log = done.step_log
    inside = np.empty(0) if log is None else shares_inside(log.begin_ns, log.end_ns, done.window.begin_ns, done.window.end_ns)
    if log is not None and len(log) and np.isfinite(log.flops).all():
        return float(inside @ np.asarray(log.flops)), "engine", None
    model = report.flop_model if report is not None else None
    if model is None and report is not None and report.parameters is not None:
        model = parameter_model(report.parameters)
    if model is None:
        return None, None, "the engine tells neither FLOP nor the model's size"
    parts = request_parts(done)
    prompt_tokens = sum(record.prompt_tokens for record in done.requests)
    computed = sum(log.prefill_tokens) if log is not None and len(log) else prompt_tokens
    if computed < prompt_tokens:
        return None, None, f"the engine computed {computed} of {prompt_tokens} prompt tokens, the others were cached"
    cached = sum(record.cached_tokens or 0 for record in done.requests)
    if cached and (log is None or not len(log)):
        return None, None, f"{cached} of {prompt_tokens} prompt tokens were cached"
    return sum(part.flops(model) for part in parts), model.method, None


def _peak(gang: GangRecord, report: LoadReport | None) -> float | str:
    """Dense peak of the gang's GPUs together, FLOP/s; a text says why it is not known."""
    if not gang.group.gpus or report is None or report.device != "cuda":
        return "the model did not run on GPUs"
    if is_quantised(gang.group.experiment) or "quantization" in report.notes:
        return "the number format of a quantised model's products is not known"
    total = 0.0
    for item in gang.devices:
        found = peak_flops_per_s(item.device.name, report.dtype)
        if isinstance(found, str):
            return found
        total += found
    return total or "no GPU was measured"


def is_quantised(experiment: Experiment) -> bool:
    """The sweep asks for quantised weights. Of a checkpoint that is quantised already the engine's notes tell."""
    arguments: Mapping[str, Any] = experiment.engine.engine_args
    named = (name for name, value in arguments.items() if value)
    return experiment.model.quantization is not None or any(
        name.startswith(("quant", "load_in_", "bitsandbytes")) for name in named
    )
