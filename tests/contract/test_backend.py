"""The engines of this environment against the contract. vLLM, in an environment of its own, has tests/vllm."""

from __future__ import annotations

import pytest
from backend_contract import BackendContract, Engine

from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.core.spec import ModelSpec
from llem_ray.testing.backend import FakeBackend

ENGINES = {
    "fake": Engine(FakeBackend, ModelSpec(config="llama-tiny"), {"prefill_ms": 0.2, "decode_ms": 0.1}),
    "transformers": Engine(TransformersBackend, ModelSpec(config="llama-tiny", initializer_range=0.1), {"num_threads": 1}),
}


class TestBackend(BackendContract):
    @pytest.fixture(scope="class", params=list(ENGINES))
    @classmethod
    def engine(cls, request: pytest.FixtureRequest) -> Engine:
        return ENGINES[request.param]
