"""The tensorrt engine against the contract of every engine, on a stand-in for the library: it never meets a GPU here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pretended_tensorrt
from backend_contract import BackendContract, Engine, OnlineContract
from pretended_tensorrt import BackendOfChild, PretendedBackend, fake_tensorrt

from llem_ray.backends.process.proxy import ProcessBackend
from llem_ray.core.backend import BackendConfig
from llem_ray.core.spec import ModelSpec

ARGS = {"max_batch_size": 8, "max_seq_len": 256, "iteration_stats": True, "stats_wait_s": 0.1, "step_timeout_s": 20}
IN_PROCESS = Engine(PretendedBackend, ModelSpec(config="llama-tiny"), ARGS, device="cuda")


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[Any]:
    with fake_tensorrt() as behaviour:
        yield behaviour


class TestInProcess(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return IN_PROCESS


class TestTwoWorkers(OnlineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return replace(IN_PROCESS, tensor_parallel=2, online=True)
