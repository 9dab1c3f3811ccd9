"""vLLM on the CPU against the contract of every engine: offline and online, with two workers, in a child interpreter."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from backend_contract import BackendContract, Engine, OnlineContract

from llem_ray.backends.process.proxy import ProcessBackend
from llem_ray.backends.vllm.backend import VllmBackend
from llem_ray.core.backend import BackendConfig
from llem_ray.core.spec import ModelSpec

OFFLINE = Engine(VllmBackend, ModelSpec(config="llama-tiny"), {"max_num_seqs": 8, "max_model_len": 256})
ONLINE = dataclasses.replace(OFFLINE, online=True)


def in_a_child(config: BackendConfig) -> ProcessBackend:
    return ProcessBackend(config, "llem_ray.backends.vllm.backend:VllmBackend", sys.executable)


class TestInProcess(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return OFFLINE


class TestTwoWorkers(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return dataclasses.replace(OFFLINE, tensor_parallel=2)


class TestOnline(OnlineContract, BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return ONLINE


class TestOnlineTwoWorkersInAChild(OnlineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return dataclasses.replace(ONLINE, factory=in_a_child, tensor_parallel=2)
