"""Loads one rank of a gang, together with the others."""

from __future__ import annotations

from dataclasses import replace as replaced

from llem_ray.backends.model_source import ModelSource
from llem_ray.backends.transformers.arguments import TransformersArgs
from llem_ray.backends.transformers.engine import Engine, find_device, load_engine
from llem_ray.backends.transformers.follower import Follower
from llem_ray.backends.transformers.gang import Gang
from llem_ray.backends.transformers.replica import Replica
from llem_ray.core.backend import BackendConfig, LoadReport
from llem_ray.core.errors import EngineDied, HangError, LoadError


def load_gang(
    config: BackendConfig, source: ModelSource, args: TransformersArgs, import_s: float
) -> tuple[Gang | Follower, LoadReport]:
    """Meet the other ranks, load this one's share of the model, and report.

    Raises:
        LoadError: It could not be loaded here, or by another rank.
        DeviceMemoryError: A device is too small.
    """
    replica = Replica(config, args, find_device(config))
    engine: Engine | None = None
    try:
        replica.meet()
        engine, report = load_engine(config, source, args, import_s, replica)
        gang = Follower(engine, replica) if replica.layout.rank else Gang(engine, replica)
        return gang, replaced(report, notes={**report.notes, **gang.start()})
    except BaseException as error:
        replica.report_failure(error)
        if engine is not None:
            engine.close()
        replica.close()
        if isinstance(error, EngineDied | HangError):
            raise LoadError(f"the gang did not load: {error.message}", error.hint) from error
        raise
