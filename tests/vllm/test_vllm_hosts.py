"""A gang on several hosts: real processes on this one, which meet at 127.0.0.1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from backend_contract import BackendContract, Engine, Loaded, OnlineContract
from gang import GangBackend
from vllm_models import children

from llem_ray.backends.vllm.leftovers import shared_segments
from llem_ray.core.backend import BackendConfig
from llem_ray.core.spec import ModelSpec

TARGET = "llem_ray.backends.vllm.backend:VllmBackend"
TINY = ModelSpec(config="llama-tiny")
ARGS = {"max_num_seqs": 8, "max_model_len": 256}


def two_hosts(config: BackendConfig) -> GangBackend:
    return GangBackend(config, target=TARGET, processes=2)


class TestTwoHosts(BackendContract, OnlineContract):
    """Loaded once, for batches and for requests that come one by one."""

    test_close_may_come_at_any_point_and_twice = None

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return Engine(two_hosts, TINY, ARGS, tensor_parallel=2, online=True)

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, engine: Engine, make_config: Callable[..., BackendConfig]) -> Iterator[Loaded]:
        before, config = children(), make_config()
        backend = engine.factory(config)
        backend.check()
        yield Loaded(backend, backend.load(), config)
        ranks = backend.identity()
        segments = shared_segments((rank.pid for rank in ranks), rings=True)
        assert segments
        backend.close()
        backend.close()
        assert children() == before
        assert not any(path.exists() for path in segments)
        assert not any(psutil.pid_exists(rank.pid) for rank in ranks)

    def test_each_process_tells_of_its_own_host_s_workers(self, loaded: Loaded) -> None:
        gang: Any = loaded.backend
        (mine,), (other,) = gang.leader.identity(), gang.followers[0].ranks
        assert (mine.rank, other.rank) == (0, 1)
        follower = gang.followers[0].backend._process.pid
        assert psutil.Process(other.pid).ppid() == follower
        assert follower not in {parent.pid for parent in psutil.Process(mine.pid).parents()}
