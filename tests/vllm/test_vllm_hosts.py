"""A gang on several hosts: real processes on this one, which meet at 127.0.0.1."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from backend_contract import BackendContract, Engine, Loaded, OnlineContract, load
from gang import FollowingRank, GangBackend, place
from vllm_models import SMALL, children, config_of, requests_of

from llem_ray.backends.process.proxy import ProcessBackend
from llem_ray.backends.vllm.backend import VllmBackend, installed_version
from llem_ray.backends.vllm.gang import Gang
from llem_ray.backends.vllm.leftovers import shared_segments
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import EngineDied, GenerationError, LoadError
from llem_ray.core.ports import reserve_port
from llem_ray.core.spec import ModelSpec, SamplingSpec

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
        before = children()
        one = load(engine, make_config())
        backend = one.backend
        yield one
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


def gone(pid: int, within_s: float = 30.0) -> bool:
    deadline_s = time.monotonic() + within_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def test_a_host_that_dies_while_it_generates_ends_the_others(tmp_path: Path) -> None:
    before = children()
    gang = two_hosts(config_of(tmp_path, TINY, tensor_parallel=2))
    try:
        gang.load()
        ranks = gang.identity()
        segments = shared_segments((rank.pid for rank in ranks), rings=True)
        run = gang.run(requests_of(190), SamplingSpec())
        next(run)
        process = gang.followers[0].backend._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        for requests in (run, gang.run(requests_of(2), SamplingSpec())):
            with pytest.raises(EngineDied, match=r"rank 1 \(host-1\) is gone"):
                list(requests)
    finally:
        gang.close()
    assert all(gone(rank.pid) for rank in ranks)
    assert children() == before
    assert segments
    assert not any(path.exists() for path in segments)


def test_a_host_whose_leader_dies_ends_its_workers(tmp_path: Path) -> None:
    before, port = children(), reserve_port()
    leading, following = (
        replace(config_of(tmp_path, TINY, tensor_parallel=2), rendezvous=place(rank, 2, port)) for rank in (0, 1)
    )
    leader = ProcessBackend(leading, TARGET, sys.executable)
    follower = FollowingRank(following, target=TARGET)
    try:
        leader.load()
        ranks = (*leader.identity(), *follower.ranks)
        assert leader._process is not None
        os.kill(leader._process.pid, signal.SIGKILL)
        assert follower.end(60)
        assert isinstance(follower.error, GenerationError)
        assert "rank 0 (host-1) is gone" in follower.error.message
        assert gone(ranks[1].pid)
    finally:
        leader.close()
        follower.close()
    assert all(gone(rank.pid) for rank in ranks)
    assert children() == before


def test_a_host_that_never_comes_is_named(tmp_path: Path) -> None:
    config = config_of(tmp_path, TINY, {**SMALL, "meet_timeout_s": 0.5}, tensor_parallel=2)
    backend = VllmBackend(replace(config, rendezvous=place(0, 2, reserve_port(), ("host-1", "host-2"))))
    backend.check()
    with pytest.raises(LoadError, match=r"1 of 2 processes met at .* within 0\.5 s; missing: rank 1 \(host-2\)"):
        backend.load()
    backend.close()


def test_a_host_that_cannot_load_says_why_to_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is in the middle of its own load then, and would wait for this one for minutes."""

    def fail(*_: object) -> None:
        raise LoadError("no tokenizer")

    before, port = children(), reserve_port()
    config = config_of(tmp_path, TINY, tensor_parallel=2)
    follower = FollowingRank(replace(config, rendezvous=place(1, 2, port)), target=TARGET)
    backend = VllmBackend(replace(config, rendezvous=place(0, 2, port)))
    try:
        backend.check()
        monkeypatch.setattr("llem_ray.backends.vllm.engine.find_tokenizer", fail)
        with pytest.raises(LoadError, match="no tokenizer"):
            backend.load()
        assert follower.end(120)
        assert isinstance(follower.error, LoadError)
        assert "rank 0 (host-1): no tokenizer" in follower.error.message
    finally:
        backend.close()
        follower.close()
    assert children() == before


def test_a_host_that_goes_while_this_one_loads_is_named(tmp_path: Path) -> None:
    """vLLM itself would wait for its workers for ten minutes."""
    before, port = children(), reserve_port()
    config = config_of(tmp_path, TINY, tensor_parallel=2)
    leading, other = (replace(config, rendezvous=place(rank, 2, port, ("host-1", "host-2"))) for rank in (0, 1))

    def come_and_go() -> None:
        gang = Gang.meet(other, str(installed_version()))
        time.sleep(5.0)
        gang.close()

    threading.Thread(target=come_and_go, daemon=True).start()
    backend = VllmBackend(leading)
    with pytest.raises(LoadError, match=r"the gang did not load: rank 1 \(host-2\) is gone"):
        backend.load()
    backend.close()
    assert children() == before
