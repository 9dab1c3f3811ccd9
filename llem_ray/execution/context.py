"""Whether requests fit into the model's context: asked where its config can be read, before anything is started."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from llem_ray.backends.checkpoint_files import local_config
from llem_ray.backends.context_limit import ContextLimit, context_limit
from llem_ray.backends.model_source import find_model
from llem_ray.core.errors import ConfigError
from llem_ray.core.plan import LoadGroup
from llem_ray.core.spec import EngineSpec, Experiment, ModelSpec
from llem_ray.core.workload_spec import LengthSpec, WorkloadSpec
from llem_ray.workloads.extents import require_context
from llem_ray.workloads.online import taken
from llem_ray.workloads.sources import Sources


@dataclass(frozen=True, slots=True)
class ContextLimits:
    """Limits of models by their engines, each worked out once.

    Args:
        base_dir: Folder that relative paths start from.
    """

    base_dir: str
    _known: dict[tuple[ModelSpec, str, str], ContextLimit | None] = field(default_factory=dict)

    def of(self, experiment: Experiment) -> ContextLimit | None:
        """The limit; None where only the engine can tell. A model that is wrong is refused elsewhere."""
        model, engine = experiment.model, experiment.engine
        key = (model, engine.backend, repr(engine.engine_args))
        if key not in self._known:
            self._known[key] = _limit(model, engine, self.base_dir)
        return self._known[key]


def check_contexts(experiments: Iterable[Experiment], sources: Sources, base_dir: str) -> None:
    """Refuse requests that are certain to be longer than their model's context. Loads nothing.

    Args:
        experiments: With workloads of which ``sources`` can read everything.
        sources: Their files.
        base_dir: Folder that relative paths start from.

    Raises:
        ConfigError: One is; or the trace has fewer arrivals than are to be replayed.
    """
    limits, seen = ContextLimits(base_dir), set[tuple[ContextLimit, WorkloadSpec]]()
    for experiment in experiments:
        limit = limits.of(experiment)
        if limit is not None and (limit, experiment.workload) not in seen:
            seen.add((limit, experiment.workload))
            workload = sources.resolved(experiment.workload)
            arrivals = taken(workload, sources.trace(workload.load.trace))
            require_context(workload, arrivals, limit.tokens, limit.origin)


def unsure_workloads(group: LoadGroup, base_dir: str) -> tuple[tuple[WorkloadSpec, ...], bool]:
    """Workloads of the group that only the engine's own tokenizer and config can judge; True: it has no others.

    Args:
        group: Whose trials ``check_contexts`` has passed.
        base_dir: Folder that relative paths start from.
    """
    known = ContextLimits(base_dir).of(group.experiment) is not None
    workloads = dict.fromkeys(trial.experiment.workload for trial in group.trials)
    unsure = tuple(workload for workload in workloads if not known or _needs_tokenizer(workload))
    return unsure, len(unsure) == len(workloads)


def _needs_tokenizer(workload: WorkloadSpec) -> bool:
    answers = isinstance(workload.output_tokens, LengthSpec) and workload.output_tokens.distribution == "answer"
    return workload.recorded or workload.prompts.chat_template or workload.input_tokens is None or answers


def _limit(model: ModelSpec, engine: EngineSpec, base_dir: str) -> ContextLimit | None:
    try:
        config, _ = local_config(find_model(model, base_dir), model)
    except ConfigError:
        config = {}
    return context_limit(config, model, engine)
