"""The engines of this environment against the contract. vLLM, in an environment of its own, has tests/vllm."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from backend_contract import BackendContract, Engine, OnlineContract

from llem_ray.backends.process.proxy import ProcessBackend
from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.core.backend import BackendConfig, InferenceBackend
from llem_ray.core.spec import ModelSpec
from llem_ray.testing.backend import FakeBackend


@functools.cache
def bare_interpreter() -> str:
    """An interpreter without a single package."""
    folder = tempfile.mkdtemp(prefix="llem-ray-bare-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    venv.create(folder, with_pip=False, symlinks=True)
    return str(Path(folder, "bin", "python"))


def in_process_of(cls: type[InferenceBackend], interpreter: Callable[[], str]) -> Callable[[BackendConfig], InferenceBackend]:
    target = f"{cls.__module__}:{cls.__qualname__}"
    return lambda config: ProcessBackend(config, target, interpreter())


FAKE = Engine(FakeBackend, ModelSpec(config="llama-tiny"), {"prefill_ms": 0.2, "decode_ms": 0.1})
TRANSFORMERS = Engine(TransformersBackend, ModelSpec(config="llama-tiny", initializer_range=0.1), {"num_threads": 1})
ENGINES = {
    "fake": FAKE,
    "transformers": TRANSFORMERS,
    "fake in a process": dataclasses.replace(FAKE, factory=in_process_of(FakeBackend, lambda: sys.executable)),
    "fake in a bare interpreter": dataclasses.replace(FAKE, factory=in_process_of(FakeBackend, bare_interpreter)),
    "transformers in a process": dataclasses.replace(
        TRANSFORMERS, factory=in_process_of(TransformersBackend, lambda: sys.executable)
    ),
    "transformers, 8 bits": dataclasses.replace(
        TRANSFORMERS, model=dataclasses.replace(TRANSFORMERS.model, quantization="bitsandbytes-8bit")
    ),
    "transformers, 4 bits": dataclasses.replace(
        TRANSFORMERS, model=dataclasses.replace(TRANSFORMERS.model, quantization="bitsandbytes-4bit")
    ),
    "transformers, adapter": dataclasses.replace(
        TRANSFORMERS, args=TRANSFORMERS.args | {"lora": {"rank": 8}, "merge_lora": True}
    ),
    "transformers, static cache": dataclasses.replace(TRANSFORMERS, args=TRANSFORMERS.args | {"cache_implementation": "static"}),
    "transformers, device map": dataclasses.replace(TRANSFORMERS, args=TRANSFORMERS.args | {"device_map": "auto"}),
}


class TestBackend(BackendContract):
    @pytest.fixture(scope="class", params=list(ENGINES))
    @classmethod
    def engine(cls, request: pytest.FixtureRequest) -> Engine:
        return ENGINES[request.param]


ONLINE = ("fake", "fake in a process", "transformers", "transformers, adapter", "transformers in a process")


class TestOnline(OnlineContract):
    @pytest.fixture(scope="class", params=ONLINE)
    @classmethod
    def engine(cls, request: pytest.FixtureRequest) -> Engine:
        return dataclasses.replace(ENGINES[request.param], online=True)
