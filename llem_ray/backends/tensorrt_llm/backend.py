"""TensorRT-LLM behind the seam. Light: the library is imported by ``check``, once the host is known to suit it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Final

from llem_ray.backends.model_source import find_model
from llem_ray.backends.tensorrt_llm.arguments import check_spec, spans_nodes
from llem_ray.backends.tensorrt_llm.machine import Machine, ThisMachine, require_gpus, require_python
from llem_ray.backends.tensorrt_llm.ray_workers import local_gpu_ids, require_ray
from llem_ray.backends.tensorrt_llm.settings import WorkerEnvironment
from llem_ray.core.backend import (
    BackendConfig,
    ChatMessage,
    LoadReport,
    LoadSchedule,
    ModelOutlook,
    Rank,
    Request,
    RequestRecord,
    Reservation,
    StepEvent,
    WorkerLayout,
)
from llem_ray.core.errors import GenerationError, LoadError, PluginError
from llem_ray.core.plugins import install_command
from llem_ray.core.spec import EngineSpec, SamplingSpec

if TYPE_CHECKING:
    from llem_ray.backends.outlook import Outlook
    from llem_ray.backends.tensorrt_llm.engine import Engine
    from llem_ray.backends.tensorrt_llm.preparing import Prepared

REQUIRED_PACKAGES: Final = ("tensorrt_llm", "torch", "transformers")
SUPPORTED: Final = re.compile(r"1\.2(\.|rc|$)")
"""Argument names, statistics and the way of streaming differ in other versions."""
INSTALL: Final = f"{install_command('tensorrt-llm')}, in an environment of its own with Python 3.12 and CUDA 13.1"


class TensorrtBackend:
    """TensorRT-LLM with its workers in processes of their own; batches and requests sent one by one.

    Args:
        config: Model, engine and device.
        machine: What this host offers; tests pass one that pretends.
    """

    serves_online: ClassVar[bool] = True

    def __init__(self, config: BackendConfig, machine: Machine | None = None) -> None:
        self._config = config
        self._machine = machine or ThisMachine()
        self._environment = WorkerEnvironment()
        self._prepared: Prepared | None = None
        self._engine: Engine | None = None
        self._import_s = 0.0
        self._outlook: Outlook | None = None
        self._ended = threading.Event()

    @staticmethod
    def worker_layout(engine: EngineSpec) -> WorkerLayout:
        """Several nodes: a process for each GPU keeps its place there, and the library's own workers are started by Ray."""
        return "ray" if spans_nodes(engine) else "host"

    def check(self) -> None:
        """Refuse a host, a model and arguments that do not suit. Imports the library, which validates; loads no weights."""
        if self._follows:
            self._check_follower()
        else:
            self._prepared = self._prepare()

    def outlook(self) -> ModelOutlook | None:
        """Read the tokenizer; all else is known from ``check``."""
        if self._follows:
            return None
        prepared = self._prepared = self._prepared or self._prepare()
        make: type[Outlook] = import_module("llem_ray.backends.outlook").Outlook
        context = prepared.arguments.get("max_seq_len")
        self._outlook = make(self._config, prepared.source, prepared.model_config, context)
        return self._outlook.told

    def load(self) -> LoadReport:
        """Build the engine, start its workers and run one short request."""
        if self._follows:
            return self._load_follower()
        prepared, self._prepared = self._prepared or self._prepare(), None
        if self._environment.shows_foreign_gpus:
            raise PluginError("no GPU was leased for the tensorrt engine", "leave out engine.gpus, or set it to 1 or more")
        self._close_engine()
        engine = import_module("llem_ray.backends.tensorrt_llm.engine")
        report: LoadReport
        self._engine, report = engine.load_engine(self._config, prepared, self._import_s)
        return report

    def identity(self) -> tuple[Rank, ...]:
        """One rank for each worker; on one node, on the GPUs in the order in which CUDA counts them."""
        if self._follows:
            return ()
        if self._engine is None:
            raise LoadError("the model is not loaded")
        return self._engine.ranks

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, by the tokenizer that the other engines use."""
        if self._engine is None and self._outlook is not None:
            return self._outlook.encode(texts)
        if self._engine is None:
            raise LoadError("the model is not loaded")
        return self._engine.encode(texts)

    def encode_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        """Token ids of each chat by the model's own template."""
        if self._engine is None and self._outlook is not None:
            return self._outlook.encode_chats(chats)
        if self._engine is None:
            raise LoadError("the model is not loaded")
        return self._engine.encode_chats(chats)

    def run(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule | None = None
    ) -> Iterator[StepEvent | RequestRecord]:
        """Stream the answers of all requests: sent at once, or each at its time."""
        if self._engine is None:
            raise GenerationError("the model is not loaded")
        return self._engine.run(requests, sampling, schedule)

    def reset(self) -> None:
        """Let no later request find prefixes of earlier ones, also where `enable_block_reuse` is on."""
        if self._engine is not None:
            self._engine.reset()

    def follow(self) -> None:
        """Keep the place of a worker, which rank 0 drives, until ``close``."""
        self._ended.wait()

    def close(self) -> None:
        """End the workers and free the devices, within 12 s."""
        self._ended.set()
        self._close_engine()
        self._prepared = None
        self._environment.take_back()

    @property
    def _follows(self) -> bool:
        return self._config.rendezvous is not None and self._config.rendezvous.rank > 0

    @property
    def _reservation(self) -> Reservation | None:
        return None if self._config.rendezvous is None else self._config.rendezvous.reservation

    def _check_follower(self) -> None:
        """Refuse a host where no worker could run. Imports nothing of the library."""
        check_spec(self._config)
        require_python(self._machine.python())
        _require_packages()
        if self._reservation is not None:
            require_ray(self._reservation)
        find_model(self._config.model, self._config.base_dir)

    def _load_follower(self) -> LoadReport:
        """Nothing is loaded into this process: the worker is one of its own."""
        return LoadReport(
            import_s=0.0,
            construct_s=0.0,
            compile_s=None,
            warm_s=None,
            context_tokens=0,
            vocab_size=0,
            parameters=None,
            weight_bytes=None,
            dtype=self._config.model.dtype,
            device=self._config.device,
            model_commit=None,
            random_weights=False,
        )

    def _close_engine(self) -> None:
        engine, self._engine, self._outlook = self._engine, None, None
        if engine is not None:
            engine.close()

    def _prepare(self) -> Prepared:
        check_spec(self._config)
        require_python(self._machine.python())
        _require_packages()
        source = find_model(self._config.model, self._config.base_dir)
        needed = self._config.engine.world_size // (self._config.engine.nodes or 1)
        reservation = self._reservation
        if reservation is None:
            self._environment.apply()
        else:
            require_ray(reservation)
            assert self._config.rendezvous is not None
            self._environment.apply_for_ray(local_gpu_ids(self._config.rendezvous) if reservation.group else ())
        gpus = self._machine.gpus()
        if self._environment.shows_foreign_gpus:  # which of the node's the gang will get is not known yet
            gpus = tuple(sorted(gpus, key=lambda gpu: gpu.capability, reverse=True))
        require_gpus(gpus, needed)
        begin_s = time.monotonic()
        try:
            import_module("llem_ray.backends.tensorrt_llm.engine")
            preparing = import_module("llem_ray.backends.tensorrt_llm.preparing")
        except (ImportError, OSError, RuntimeError) as error:  # libraries of CUDA, TensorRT or MPI that are not there
            raise PluginError(f"the tensorrt engine cannot be imported: {error}", INSTALL) from error
        self._import_s = time.monotonic() - begin_s
        prepared: Prepared = preparing.prepare(self._config, source, gpus)
        return prepared


def _require_packages() -> None:
    missing = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
    if missing:
        raise PluginError(f"the tensorrt engine needs {', '.join(missing)}, not installed here", INSTALL)
    version = installed_version()
    if version is None or not SUPPORTED.match(version):
        raise PluginError(
            f"the tensorrt engine needs TensorRT-LLM 1.2, {version or 'an unknown version'} is installed here", INSTALL
        )


def installed_version() -> str | None:
    """Version of the TensorRT-LLM that is installed."""
    try:
        return metadata.version("tensorrt-llm")
    except metadata.PackageNotFoundError:
        return None
