"""How the hosts of a vLLM gang meet, and what they hear of each other: without vLLM, in threads of one process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

import psutil
import pytest
from gang import place

from llem_ray.backends.model_source import ModelSource
from llem_ray.backends.process.wire import unpack_each
from llem_ray.backends.vllm.arguments import check_spec, engine_arguments, local_workers
from llem_ray.backends.vllm.gang import SETTLE_S, Gang
from llem_ray.backends.vllm.settings import EnvironmentDefaults
from llem_ray.core.backend import BackendConfig, Rank
from llem_ray.core.errors import ConfigError, DeviceMemoryError, EngineDied, GenerationError, HangError, LoadError
from llem_ray.core.ports import reserve_port
from llem_ray.core.spec import EngineSpec, ModelSpec

T = TypeVar("T")
HOSTS = ("a", "b", "c")
WORKERS = [{"rank": rank, "pid": 100 + rank, "gpu_uuid": f"GPU-{rank}", "weight_bytes": 1} for rank in (2, 0, 1, 3, 5, 4)]


def config_of(rank: int, port: int, hosts: tuple[str, ...] = HOSTS, **engine: Any) -> BackendConfig:
    spec: dict[str, Any] = {"backend": "vllm", "tensor_parallel": 6, "engine_args": {"meet_timeout_s": 20}}
    return BackendConfig(
        model=ModelSpec(config="llama-tiny"),
        engine=EngineSpec(**{**spec, **engine}),
        device="cpu",
        host=hosts[rank],
        base_dir=".",
        cache_dir=".",
        rendezvous=place(rank, len(hosts), port, hosts),
    )


def start(work: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised by whoever asks
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@pytest.fixture
def gangs() -> Iterator[list[Gang]]:
    port = reserve_port()
    meeting = [start(lambda rank=rank: Gang.meet(config_of(rank, port), "0.32")) for rank in range(len(HOSTS))]
    met = [future.result(30) for future in meeting]
    yield met
    for gang in met:
        gang.close()


def test_all_learn_of_the_same_port_and_of_their_own_workers(gangs: list[Gang]) -> None:
    assert len({gang.port for gang in gangs}) == 1
    gangs[0].tell_loaded(WORKERS)
    for rank in (1, 2):
        told = unpack_each(Rank, gangs[rank].hear("loaded", 10, "loading"))
        assert told == gangs[rank].ranks_of(WORKERS)
        assert [(one.rank, one.host, one.pid, one.gpu_uuid) for one in told] == [
            (number, HOSTS[rank], 100 + number, f"GPU-{number}") for number in (2 * rank, 2 * rank + 1)
        ]
    assert [one.rank for one in gangs[0].ranks_of(WORKERS)] == [0, 1]


def test_a_meeting_that_is_not_complete_names_who_is_missing() -> None:
    port, args = reserve_port(), {"meet_timeout_s": 2.0}
    leader = start(lambda: Gang.meet(config_of(0, port, engine_args=args), "0.32"))
    other = start(lambda: Gang.meet(config_of(1, port, engine_args=args), "0.32"))
    with pytest.raises(LoadError, match=r"2 of 3 processes met at 127\.0\.0\.1:\d+ within 2 s; missing: rank 2 \(c\)"):
        leader.result(30)
    with pytest.raises(LoadError, match=r"rank 0 \(a\)"):
        other.result(30)


def test_nobody_there_is_a_load_error_that_names_where() -> None:
    port = reserve_port()
    with pytest.raises(LoadError, match=rf"rank 1 did not reach rank 0 \(a\) at 127\.0\.0\.1:{port} within 0\.3 s"):
        Gang.meet(config_of(1, port, engine_args={"meet_timeout_s": 0.3}), "0.32")


def test_another_version_or_model_is_refused() -> None:
    port, pair = reserve_port(), ("a", "b")
    leader = start(lambda: Gang.meet(config_of(0, port, pair), "0.32.0"))
    other = start(lambda: Gang.meet(config_of(1, port, pair), "0.32.1"))
    with pytest.raises(LoadError, match="rank 1 was given another model, engine or gang"):
        leader.result(30)
    with pytest.raises(LoadError, match="did not welcome rank 1"):
        other.result(30)


def test_the_end_of_one_is_the_failure_of_all(gangs: list[Gang]) -> None:
    waiting = [start(lambda gang=gang: gang.hear("close", 20, "a wait for orders")) for gang in gangs[:2]]
    gangs[2].close()
    with pytest.raises(EngineDied, match=r"rank 2 \(c\) is gone"):
        waiting[0].result(20)
    with pytest.raises(EngineDied, match=r"rank 0 \(a\): rank 2 \(c\) is gone"):
        waiting[1].result(20)


def test_the_leader_s_end_is_heard(gangs: list[Gang]) -> None:
    waiting = start(lambda: gangs[1].hear("close", None, "a wait for orders"))
    gangs[0].close()
    with pytest.raises(EngineDied, match=r"rank 0 \(a\) is gone"):
        waiting.result(20)


def test_an_error_reaches_the_others_as_what_it_is(gangs: list[Gang]) -> None:
    failure = gangs[1].give_up(
        DeviceMemoryError("16 GB are not enough", "take less"), DeviceMemoryError("16 GB are not enough", "take less")
    )
    assert isinstance(failure, DeviceMemoryError)
    with pytest.raises(DeviceMemoryError, match="rank 1 \\(b\\): 16 GB are not enough") as caught:
        gangs[0].hear("closed", 20, "loading")
    assert caught.value.hint == "take less"
    lost = gangs[0].give_up(RuntimeError("EngineCore failed"), LoadError("vLLM failed"))
    assert isinstance(lost, DeviceMemoryError)


def test_what_vllm_raises_is_explained_by_what_is_heard_a_moment_later(gangs: list[Gang]) -> None:
    threading.Timer(0.3, gangs[1].close).start()
    lost = gangs[0].explain(RuntimeError("Connection closed by peer"))
    assert isinstance(lost, EngineDied)
    assert "rank 1 (b)" in lost.message
    assert isinstance(gangs[0].give_up(RuntimeError("x"), LoadError("y")), LoadError)


def test_an_error_of_our_own_is_not_explained(gangs: list[Gang]) -> None:
    begin_s = time.monotonic()
    assert gangs[0].explain(GenerationError("a prompt is too long")) is None
    assert time.monotonic() - begin_s < SETTLE_S


def test_a_worker_s_end_is_told_and_what_was_started_is_killed(gangs: list[Gang]) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        with subprocess.Popen([sys.executable, "-c", "pass"]) as worker:
            descriptor = os.pidfd_open(worker.pid)
            gangs[1].watch_process(descriptor, "worker 2 (pid 7)")
            with pytest.raises(EngineDied, match=r"rank 1 \(b\): worker 2 \(pid 7\) ended"):
                gangs[0].hear("closed", 20, "work")
        assert other.wait(20) < 0
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as late:
        assert late.wait(20) < 0
    os.close(descriptor)


def test_what_was_there_before_the_meeting_is_left_alone() -> None:
    port, pair = reserve_port(), ("a", "b")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as before:
        met = [start(lambda rank=rank: Gang.meet(config_of(rank, port, pair), "0.32")) for rank in range(2)]
        met[1].result(30).close()
        with pytest.raises(EngineDied, match="is gone"):
            met[0].result(30).hear("closed", 20, "work")
        assert psutil.Process(before.pid).status() != psutil.STATUS_ZOMBIE
        met[0].result(30).close()
        before.kill()


def test_an_end_in_good_order_is_no_failure(gangs: list[Gang]) -> None:
    def follow(gang: Gang) -> None:
        gang.hear("close", 20, "a wait for orders")
        gang.begin_end()
        gang.tell_closed()
        gang.close()

    following = [start(lambda gang=gang: follow(gang)) for gang in gangs[1:]]
    gangs[0].begin_end()
    gangs[0].await_end()
    assert gangs[0].failure is None
    for future in following:
        future.result(20)


def test_silence_has_a_deadline(gangs: list[Gang]) -> None:
    with pytest.raises(HangError, match=r"during loading within 0\.2 s"):
        gangs[1].hear("loaded", 0.2, "loading")


def test_what_vllm_cannot_spread_is_refused() -> None:
    for config, field, found in (
        (config_of(0, 1, tensor_parallel=4), "engine.nodes", "3"),
        (config_of(0, 1, tensor_parallel=1), "engine.nodes", "3"),
        (config_of(0, 1, tensor_parallel=1, pipeline_parallel=3), "engine.pipeline_parallel", "3"),
        (config_of(0, 1, engine_args={"nnodes": 2}), "engine.engine_args.nnodes", "nnodes"),
        (config_of(0, 1, engine_args={"meet_timeout_s": 0}), "engine.engine_args.meet_timeout_s", "0"),
        (config_of(0, 1, engine_args={"meet_timeout_s": "long"}), "engine.engine_args.meet_timeout_s", "'long'"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_spec(config)
        assert (caught.value.field, caught.value.found) == (field, found)
    check_spec(config_of(0, 1))
    check_spec(replace(config_of(0, 1, tensor_parallel=1, pipeline_parallel=3), device="cuda"))


def test_vllm_is_told_where_this_host_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    config = config_of(1, 29_000)
    source = ModelSource(kind="folder", location="/model", random=False, tokenizer=None, tokenizer_optional=False)
    values = engine_arguments(config, source, "/model", "float32")
    assert (values["nnodes"], values["node_rank"], values["master_addr"]) == (3, 1, "127.0.0.1")
    assert values["distributed_executor_backend"] == "mp"
    assert "meet_timeout_s" not in values
    assert (values["distributed_timeout_seconds"], values["cpu_distributed_timeout_seconds"]) == (600, 600)
    assert local_workers(config) == 2
    assert local_workers(config_of(0, 1, ("a", "b", "a"))) == 4
    defaults = EnvironmentDefaults("cpu", workers=2, eager=True, place=config.rendezvous)
    defaults.apply()
    named = {name: os.environ.get(name) for name in ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    defaults.take_back()
    assert named == {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0"}
    assert "VLLM_HOST_IP" not in os.environ
