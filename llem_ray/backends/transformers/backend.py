"""The transformers engine behind the seam. Light: torch is imported by ``load``, so ``check`` answers at once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from llem_ray.backends.lora import parse_lora, require_lora_fits
from llem_ray.backends.model_source import find_model, known_config
from llem_ray.backends.transformers.arguments import TransformersArgs, check_arguments, check_shape, require_plain
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
    WorkerLayout,
)
from llem_ray.core.errors import GenerationError, LoadError, PluginError
from llem_ray.core.plugins import install_command
from llem_ray.core.spec import SamplingSpec

if TYPE_CHECKING:
    from llem_ray.backends.outlook import Outlook
    from llem_ray.backends.transformers.engine import Engine
    from llem_ray.backends.transformers.follower import Follower
    from llem_ray.backends.transformers.gang import Gang

REQUIRED_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate")


class TransformersBackend:
    """Hugging Face transformers with our own decode loop, or its continuous batching: on one device, or one rank of a gang.

    Args:
        config: Model, engine and device.
    """

    worker_layout: ClassVar[WorkerLayout] = "rank"
    serves_online: ClassVar[bool] = True

    def __init__(self, config: BackendConfig) -> None:
        self._config = config
        self._engine: Engine | Gang | Follower | None = None
        self._outlook: Outlook | None = None
        self._import_s = 0.0

    def check(self) -> None:
        """Refuse bad arguments, missing files and missing packages, without importing torch."""
        missing = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
        if missing:
            raise PluginError(
                f"the transformers engine needs {', '.join(missing)}, not installed here", install_command("transformers")
            )
        args = check_arguments(self._config)
        _require_extras(args, self._config)
        source = find_model(self._config.model, self._config.base_dir)
        known = known_config(source)
        check_shape(self._config.engine, known)
        require_plain(self._config.model, known.get("quantization_config"))
        if lora := parse_lora(self._config.engine.engine_args, self._config.base_dir):
            require_lora_fits(lora, known)

    def outlook(self) -> ModelOutlook:
        """Import torch and transformers, read config and tokenizer."""
        source = find_model(self._config.model, self._config.base_dir)
        module = self._import("outlook", "llem_ray.backends")
        outlook: Outlook = module.Outlook(self._config, source)
        self._outlook = outlook
        return outlook.told

    def load(self) -> LoadReport:
        """Import torch and transformers, load model and tokenizer, run one short batch."""
        args = check_arguments(self._config)
        source = find_model(self._config.model, self._config.base_dir)
        self.close()
        alone = self._config.rendezvous is None or self._config.rendezvous.world_size == 1
        engine = self._import("engine" if alone else "gang_loading", "llem_ray.backends.transformers")
        report: LoadReport
        load = engine.load_engine if alone else engine.load_gang
        self._engine, report = load(self._config, source, args, self._import_s)
        self._outlook, self._import_s = None, 0.0
        return report

    def identity(self) -> tuple[Rank, ...]:
        """The one worker that this process is, with the UUID of its GPU once loaded; one for each GPU with a device map."""
        uuids: list[str | None] = [None]
        if self._engine is not None and self._config.device == "cuda":
            spread = check_arguments(self._config).device_map is not None
            uuids = import_module("llem_ray.backends.transformers.engine").gpu_uuids(self._config, spread=spread)
        first = 0 if self._config.rendezvous is None else self._config.rendezvous.rank
        return tuple(
            Rank(rank=first + number, host=self._config.host, pid=os.getpid(), gpu_uuid=uuid) for number, uuid in enumerate(uuids)
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        if self._engine is None and self._outlook is not None:
            return self._outlook.encode(texts)
        if self._engine is None:
            raise LoadError("the model is not loaded")
        return self._leading().encode(texts)

    def encode_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        """Token ids of each chat by the model's own template."""
        if self._engine is None and self._outlook is not None:
            return self._outlook.encode_chats(chats)
        if self._engine is None:
            raise LoadError("the model is not loaded")
        return self._leading().encode_chats(chats)

    def run(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule | None = None
    ) -> Iterator[StepEvent | RequestRecord]:
        """Serve the requests as one padded batch, or one by one by continuous batching."""
        if self._engine is None:
            raise GenerationError("the model is not loaded")
        engine = self._leading()
        if schedule is None:
            return engine.run(requests, sampling)
        serve = getattr(engine, "serve", None)
        if serve is None:
            raise GenerationError("requests that come one by one are served by one process")
        events: Iterator[StepEvent | RequestRecord] = serve(requests, sampling, schedule)
        return events

    def reset(self) -> None:
        """Free what the last batch left behind; nothing is cached across batches."""
        if self._engine is not None:
            self._leading().release_memory()

    def follow(self) -> None:
        """Serve rank 0 until it closes, or until another thread calls ``close`` here."""
        engine = self._engine
        if engine is None:
            raise GenerationError("the model is not loaded")
        follow = getattr(engine, "follow_orders", None)
        if follow is None:
            raise GenerationError("rank 0 leads: it cannot follow")
        follow()

    def close(self) -> None:
        """Drop the model and free the device."""
        engine, self._engine, self._outlook = self._engine, None, None
        if engine is not None:
            engine.close()

    def _import(self, module: str, package: str) -> Any:
        begin_s = time.monotonic()
        try:
            return import_module(f"{package}.{module}")
        except ImportError as error:
            raise LoadError(f"the transformers engine cannot be imported: {error}", install_command("transformers")) from error
        finally:
            self._import_s += time.monotonic() - begin_s

    def _leading(self) -> Engine | Gang:
        engine = self._engine
        if engine is None or hasattr(engine, "follow_orders"):
            raise GenerationError("this rank follows rank 0, which alone may be asked")
        return engine


def _require_extras(args: TransformersArgs, config: BackendConfig) -> None:
    needed = {"peft": args.lora is not None, "bitsandbytes": config.model.quantization is not None}
    for name, is_needed in needed.items():
        if is_needed and find_spec(name) is None:
            raise PluginError(f"this needs {name}, not installed here", install_command("transformers", name))
