"""Rules between the fields of one section that types alone cannot state."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, Final

from llem_ray.config.workload_rules import Broken, broken_workload
from llem_ray.core.measure_spec import CV_BATCHES, MLPERF_MIN_S, MeasureSpec, WindowSpec
from llem_ray.core.spec import EngineSpec, ModelSpec
from llem_ray.core.workload_spec import OPEN_LOOPS, LoadSpec, WorkloadSpec


def implied(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """Values of a section with those that others imply filled in: a config has random weights."""
    if section == "model" and values.get("config") is not None and "weights" not in values:
        return {**values, "weights": "random"}
    return values


def broken_rule(section: object) -> Broken | None:
    """The first rule the section breaks."""
    if isinstance(section, ModelSpec):
        return _model(section)
    if isinstance(section, WorkloadSpec):
        return broken_workload(section) or _load(section)
    if isinstance(section, EngineSpec):
        return _engine(section)
    return None


def _model(model: ModelSpec) -> Broken | None:
    if model.id is None and model.config is None:
        return Broken(
            ("model",), "a model needs an id or a config", "set model.id (hub id or folder) or model.config (llama-tiny)"
        )
    if model.id is not None and model.config is not None:
        return Broken(("model", "config"), "a model has either an id or a config, not both", "remove one; null unsets it")
    if model.config is not None and model.weights != "random":
        hint = "remove weights, or use model.id for pretrained weights"
        return Broken(("model", "weights"), "a config alone has no pretrained weights", hint)
    if model.config is not None and model.revision is not None:
        return Broken(("model", "revision"), "a revision belongs to a hub id, not to a config")
    if model.initializer_range is not None and model.weights != "random":
        return Broken(("model", "initializer_range"), "initializer_range is for random weights", "set model.weights: random")
    return None


def _engine(engine: EngineSpec) -> Broken | None:
    if "CUDA_VISIBLE_DEVICES" in (engine.python or ""):
        hint = "leave it out: the scheduler chooses the GPUs, and energy is that of the GPUs it granted"
        return Broken(("engine", "python"), "CUDA_VISIBLE_DEVICES must not be set in the engine's environment", hint)
    workers = engine.gpus or engine.world_size
    if engine.nodes is not None and workers % engine.nodes:
        what = "GPUs" if engine.gpus else "workers (tensor x pipeline x data parallel)"
        return Broken(("engine", "nodes"), f"{workers} {what} cannot be spread evenly over {engine.nodes} nodes")
    return None


_OF_PATTERN: Final[Mapping[str, frozenset[str]]] = {
    "rate_per_s": frozenset({"constant", "poisson", "gamma"}),
    "burstiness": frozenset({"gamma"}),
    "concurrency": frozenset({"closed", "saturated"}),
    "trace": frozenset({"trace"}),
}
"""Field of a load -> the patterns that it belongs to."""
_PLAIN: Final = LoadSpec()
_OPTIONAL: Final = frozenset({("concurrency", "saturated")})


def _load(workload: WorkloadSpec) -> Broken | None:
    load, at = workload.load, ("workload", "load")
    for name, patterns in _OF_PATTERN.items():
        value, listed = getattr(load, name), ", ".join(sorted(patterns))
        if value is not None and load.pattern not in patterns:
            return Broken((*at, name), f"{name} has no meaning for the pattern {load.pattern}", f"it belongs to: {listed}")
        if value is None and load.pattern in patterns and (name, load.pattern) not in _OPTIONAL:
            return Broken((*at, "pattern"), f"the pattern {load.pattern} needs {name}", f"set workload.load.{name}")
    for name in ("trace_speed", "trace_prefixes", "trace_max_input_tokens"):
        if getattr(load, name) != getattr(_PLAIN, name) and load.pattern != "trace":
            return Broken((*at, name), f"{name} has no meaning for the pattern {load.pattern}", "it belongs to: trace")
    return _online(workload) if load.online else None


def _online(workload: WorkloadSpec) -> Broken | None:
    pattern = workload.load.pattern
    if workload.batch_size != 1:
        hint = "leave it out: how many run together is for the engine, or workload.load.concurrency"
        return Broken(("workload", "batch_size"), f"batch_size has no meaning for the pattern {pattern}", hint)
    if workload.requests is None and workload.conversations is None and pattern != "trace":
        what = "requests" if isinstance(workload.turns, int) else "conversations"
        message = f"the pattern {pattern} needs a number of {what}"
        return Broken(("workload", "load", "pattern"), message, f"set workload.{what}")
    return None


def broken_measure(measure: MeasureSpec) -> Broken | None:
    """The first rule within the measure section that does not hold."""
    warmup = measure.warmup
    least = max(warmup.batches, CV_BATCHES)
    if warmup.until_cv is not None and warmup.max_batches < least:
        message = f"until_cv compares {CV_BATCHES} batches: max_batches is at least {least}"
        return Broken(("measure", "warmup", "max_batches"), message, "raise it, or leave it out")
    if measure.slo.preset is not None:
        for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
            if getattr(measure.slo, name) is not None:
                message = f"the preset {measure.slo.preset} has limits of its own"
                return Broken(("measure", "slo", name), message, "give a preset or limits, not both")
    return None


def broken_window(measure: MeasureSpec, workload: WorkloadSpec) -> Broken | None:
    """The first rule between the window that is asked for and a workload that does not hold."""
    if workload.load.online and measure.least_run_s(workload) >= measure.trial_timeout_s:
        message = f"a trial takes {measure.least_run_s(workload):g} s and more, its deadline is {measure.trial_timeout_s:g} s"
        return Broken(("measure", "trial_timeout_s"), message, "raise measure.trial_timeout_s, or ask for less")
    return _window_of(measure, workload)


def _window_of(measure: MeasureSpec, workload: WorkloadSpec) -> Broken | None:
    window, at = measure.window, ("measure", "window")
    for name in ("start_s", "length_s"):
        is_set = getattr(window, name) is not None
        if window.rule == "interval" and not is_set:
            return Broken((*at, "rule"), f"an interval needs {name}", f"set measure.window.{name}")
        if window.rule != "interval" and is_set:
            return Broken((*at, name), f"{name} has no meaning for the rule {window.rule}", "it belongs to: interval")
    rule = window.resolved(workload.load)
    if not workload.load.online and rule in {"steady_state", "interval"}:
        return Broken((*at, "rule"), f"the rule {rule} is for online loads", "set workload.load.pattern, or leave the rule out")
    return _steady_state(workload) if rule == "steady_state" else _long_enough(window, rule, workload)


def _long_enough(window: WindowSpec, rule: str, workload: WorkloadSpec) -> Broken | None:
    """Whether an open loop lasts as long as its window needs."""
    rate_per_s, many = workload.load.rate_per_s, workload.whole_conversations
    needs_s = {"mlperf": MLPERF_MIN_S, "interval": (window.start_s or 0.0) + (window.length_s or 0.0)}.get(rule, 0.0)
    if rate_per_s is None or many is None or many / rate_per_s >= needs_s:
        return None
    message = f"{_named(many, workload)} at {rate_per_s:g}/s last {many / rate_per_s:g} s, the window needs {needs_s:g} s"
    return Broken(("measure", "window", "rule"), message, f"set {_number_of(ceil(needs_s * rate_per_s), workload)} or more")


def _steady_state(workload: WorkloadSpec) -> Broken | None:
    load, many = workload.load, workload.load.concurrency
    if load.pattern in OPEN_LOOPS:
        hint = "use total or interval: an open loop does not saturate the engine"
        return Broken(
            ("measure", "window", "rule"), f"steady_state is for saturated and closed loads, not for {load.pattern}", hint
        )
    whole = workload.whole_conversations
    if many is not None and whole is not None and whole <= 2 * many + 1:
        message = f"{_named(whole, workload)} with {many} in flight have no steady state: it takes {2 * many + 2} and more"
        hint = f"set {_number_of(4 * many, workload)} or more, or measure.window.rule: total"
        return Broken(("workload", "requests" if workload.conversations is None else "conversations"), message, hint)
    return None


def _number_of(conversations: int, workload: WorkloadSpec) -> str:
    """The field that says how many there are, and its value for so many."""
    if workload.conversations is None and isinstance(workload.turns, int):
        return f"workload.requests to {conversations * workload.turns}"
    return f"workload.conversations to {conversations}"


def _named(many: int, workload: WorkloadSpec) -> str:
    if workload.turns == 1:
        return f"{many} requests"
    return f"{many} conversations" + (f" of {workload.turns} turns" if isinstance(workload.turns, int) else "")
