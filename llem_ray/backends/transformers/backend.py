"""The transformers engine behind the seam. Light: torch is imported by ``load``, so ``check`` answers at once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from llem_ray.backends.model_source import find_model
from llem_ray.backends.transformers.arguments import check_arguments
from llem_ray.core.backend import BackendConfig, LoadReport, Rank, Request, RequestRecord, StepEvent
from llem_ray.core.errors import GenerationError, LoadError, PluginError
from llem_ray.core.spec import SamplingSpec

if TYPE_CHECKING:
    from llem_ray.backends.transformers.engine import Engine

REQUIRED_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate")


class TransformersBackend:
    """Hugging Face transformers on one device, with our own decode loop.

    Args:
        config: Model, engine and device.
    """

    def __init__(self, config: BackendConfig) -> None:
        self._config = config
        self._engine: Engine | None = None

    def check(self) -> None:
        """Refuse bad arguments, missing files and missing packages, without importing torch."""
        missing = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
        if missing:
            raise PluginError(
                f"the transformers engine needs {', '.join(missing)}, not installed here", "pip install 'llem-ray[transformers]'"
            )
        check_arguments(self._config)
        find_model(self._config.model, self._config.base_dir)

    def load(self) -> LoadReport:
        """Import torch and transformers, load model and tokenizer, run one short batch."""
        args = check_arguments(self._config)
        source = find_model(self._config.model, self._config.base_dir)
        self.close()
        begin_s = time.monotonic()
        try:
            engine = import_module("llem_ray.backends.transformers.engine")
        except ImportError as error:
            raise LoadError(
                f"the transformers engine cannot be imported: {error}", "pip install 'llem-ray[transformers]'"
            ) from error
        report: LoadReport
        self._engine, report = engine.load_engine(self._config, source, args, time.monotonic() - begin_s)
        return report

    def identity(self) -> tuple[Rank, ...]:
        """The one worker: this process, with the UUID of its GPU once loaded."""
        uuid = None
        if self._engine is not None and self._config.device == "cuda":
            uuid = import_module("llem_ray.backends.transformers.engine").gpu_uuid()
        return (Rank(rank=0, host=self._config.host, pid=os.getpid(), gpu_uuid=uuid),)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        if self._engine is None:
            raise LoadError("the model is not loaded")
        return self._engine.encode(texts)

    def run(self, requests: Sequence[Request], sampling: SamplingSpec) -> Iterator[StepEvent | RequestRecord]:
        """Serve the requests as one padded batch."""
        if self._engine is None:
            raise GenerationError("the model is not loaded")
        return self._engine.run(requests, sampling)

    def reset(self) -> None:
        """Free what the last batch left behind; nothing is cached across batches."""
        if self._engine is not None:
            self._engine.release_memory()

    def close(self) -> None:
        """Drop the model and free the device."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
