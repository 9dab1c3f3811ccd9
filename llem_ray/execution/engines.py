"""Where an engine runs: in this process, or in one of its own."""

from __future__ import annotations

from llem_ray.backends.process.proxy import ProcessBackend
from llem_ray.core.backend import BackendConfig, InferenceBackend
from llem_ray.core.plugins import find_plugin, load_plugin


def make_backend(config: BackendConfig) -> InferenceBackend:
    """The engine that ``config`` names; in a process of ``engine.python`` where that is set, and then not imported here.

    Raises:
        PluginError: The engine is unknown, or not installed here.
    """
    engine = config.engine
    if engine.python is not None:
        return ProcessBackend(config, find_plugin("llem_ray.backends", engine.backend).value, engine.python)
    backend: InferenceBackend = load_plugin("llem_ray.backends", engine.backend)(config)
    return backend
