"""Where an engine runs: in this process, or in one of its own."""

from __future__ import annotations

from typing import cast

from llem_ray.backends.process.proxy import ProcessBackend
from llem_ray.core.backend import BackendConfig, InferenceBackend, WorkerLayout
from llem_ray.core.errors import PluginError
from llem_ray.core.plugins import find_plugin, load_plugin
from llem_ray.core.spec import EngineSpec


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


def serves_online(engine: EngineSpec) -> bool | None:
    """Whether the engine takes requests one by one; None where its module cannot be imported here, so nobody knows yet.

    Raises:
        PluginError: The engine is unknown.
    """
    find_plugin("llem_ray.backends", engine.backend)
    try:
        factory = load_plugin("llem_ray.backends", engine.backend)
    except PluginError:
        return None
    return bool(getattr(factory, "serves_online", False))


def worker_layout(engine: EngineSpec) -> WorkerLayout:
    """How many processes serve a gang of this engine: one on each host, unless its factory says otherwise.

    The factory's module is imported, which imports no inference library. Where that fails, as for an engine of another
    interpreter, the answer is ``host``.

    Raises:
        PluginError: The engine is unknown.
    """
    find_plugin("llem_ray.backends", engine.backend)
    try:
        factory = load_plugin("llem_ray.backends", engine.backend)
    except PluginError:
        return "host"
    layout = getattr(factory, "worker_layout", "host")
    return cast("WorkerLayout", layout(engine) if callable(layout) else layout)
