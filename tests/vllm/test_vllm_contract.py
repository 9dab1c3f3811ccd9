"""vLLM on the CPU against the contract of every engine: in process, and with two workers."""

from __future__ import annotations

import pytest
from backend_contract import BackendContract, Engine

from llem_ray.backends.vllm.backend import VllmBackend
from llem_ray.core.spec import ModelSpec

MODEL = ModelSpec(config="llama-tiny")
ARGS = {"max_num_seqs": 8, "max_model_len": 256}


class TestInProcess(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return Engine(VllmBackend, MODEL, ARGS)


class TestTwoWorkers(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return Engine(VllmBackend, MODEL, ARGS, tensor_parallel=2)
