"""Rules between the fields of one section that types alone cannot state."""

from __future__ import annotations

from typing import Any, NamedTuple

from llem_ray.config.fields import Path
from llem_ray.core.spec import EngineSpec, ModelSpec, WorkloadSpec


class Broken(NamedTuple):
    """A rule that does not hold, and the field to blame."""

    path: Path
    message: str
    hint: str | None = None


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
        return _workload(section)
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


def _workload(workload: WorkloadSpec) -> Broken | None:
    prompts = workload.prompts
    if prompts.source == "file" and not prompts.path:
        return Broken(("workload", "prompts", "source"), "source: file needs workload.prompts.path")
    if prompts.source != "file" and prompts.path is not None:
        return Broken(("workload", "prompts", "path"), "a path is for source: file", "set workload.prompts.source: file")
    if prompts.source == "synthetic" and workload.input_tokens is None:
        hint = "set workload.input_tokens"
        return Broken(("workload", "prompts", "source"), "synthetic prompts have no natural length", hint)
    return None
