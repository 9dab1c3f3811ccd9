"""The transformers engine over several real processes: gloo on the CPU."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from backend_contract import BackendContract, Engine
from gang import TARGET, FollowingRank, GangBackend, place, tokens_of
from transformers import AutoConfig, AutoModelForCausalLM

from llem_ray.backends.builtin_models import BUILTIN_MODELS
from llem_ray.backends.process.proxy import ProcessBackend
from llem_ray.backends.tokenizer import train_tokenizer
from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.core.backend import BackendConfig, Request, RequestRecord, StepEvent
from llem_ray.core.errors import EngineDied, GenerationError, LoadError, NumericsError
from llem_ray.core.ports import reserve_port
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec

TINY = ModelSpec(config="llama-tiny", initializer_range=0.1)
ARGS = {"num_threads": 1}
NAMES = ("model", "engine", "device", "host", "base_dir", "cache_dir")
ENGINES = {
    "tensor": Engine(GangBackend, TINY, ARGS, tensor_parallel=2),
    "pipeline": Engine(GangBackend, TINY, ARGS, pipeline_parallel=2),
    "data": Engine(GangBackend, TINY, ARGS, data_parallel=2),
}
REQUESTS = [
    Request(request_id=f"r{row}", prompt_token_ids=tuple(range(10 + row, 15 + 3 * row)), max_new_tokens=64) for row in range(1, 6)
]


class TestParallelBackend(BackendContract):
    @pytest.fixture(scope="class", params=list(ENGINES))
    @classmethod
    def engine(cls, request: pytest.FixtureRequest) -> Engine:
        return ENGINES[request.param]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gang")


def config_of(folder: Path, model: ModelSpec = TINY, tp: int = 1, pp: int = 1, dp: int = 1, **args: Any) -> BackendConfig:
    engine = EngineSpec(tensor_parallel=tp, pipeline_parallel=pp, data_parallel=dp, engine_args=ARGS | args)
    return BackendConfig(
        model=model, engine=engine, device="cpu", host="host-1", base_dir=str(folder), cache_dir=str(folder / "cache")
    )


@pytest.fixture
def gangs() -> Iterator[Any]:
    made: list[GangBackend] = []

    def make(config: BackendConfig, **options: Any) -> GangBackend:
        made.append(GangBackend(config, **options))
        made[-1].load()
        return made[-1]

    yield make
    for gang in made:
        gang.close()


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    """What one process answers."""
    backend = TransformersBackend(config_of(folder))
    backend.load()
    tokens = tokens_of(backend, REQUESTS)
    backend.close()
    assert all(len(set(row)) > 30 for row in tokens)  # not one token repeated
    return tokens


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2), (2, 2, 1)])
def test_greedy_tokens_equal_those_of_one_process(
    folder: Path, alone: list[tuple[int, ...]], gangs: Any, tp: int, pp: int, dp: int
) -> None:
    gang = gangs(config_of(folder, tp=tp, pp=pp, dp=dp))
    assert tokens_of(gang, REQUESTS) == alone
    assert len({rank.pid for rank in gang.identity()}) == tp * pp * dp


def test_sampled_tokens_are_those_of_one_process(folder: Path, gangs: Any) -> None:
    sampling = SamplingSpec(temperature=0.8, top_k=20, seed=3)
    backend = TransformersBackend(config_of(folder))
    backend.load()
    expected = tokens_of(backend, REQUESTS, sampling)
    backend.close()
    assert tokens_of(gangs(config_of(folder, tp=2)), REQUESTS, sampling) == expected


def test_batch_smaller_than_the_replicas_leaves_some_idle(folder: Path, alone: list[tuple[int, ...]], gangs: Any) -> None:
    assert tokens_of(gangs(config_of(folder, dp=2)), REQUESTS[:1]) == alone[:1]


def test_replicas_on_other_hosts_report_times_of_this_ones_clock(folder: Path, gangs: Any) -> None:
    gang = gangs(config_of(folder, dp=2), hosts=("host-1", "host-2"))
    begin_ns = time.monotonic_ns()
    records = [event for event in gang.run(REQUESTS, SamplingSpec()) if isinstance(event, RequestRecord)]
    assert [record.request_id for record in records] == [request.request_id for request in REQUESTS]
    assert all(begin_ns <= t <= time.monotonic_ns() for record in records for t in record.token_times_ns)


def test_report_speaks_of_the_whole_model(folder: Path) -> None:
    gang = GangBackend(config_of(folder, tp=2))
    report = gang.load()
    gang.close()
    assert report.parameters == 1_000_576
    assert report.weight_bytes is not None
    assert report.weight_bytes > 4 * 1_000_576  # norms are on both ranks
    assert (report.notes["parallelism"], report.notes["collectives"]) == ("tensor 2", "gloo")
    assert float(report.notes["control_step_us"]) > 0


def test_death_of_a_follower_in_a_batch_is_told_by_name(folder: Path, gangs: Any) -> None:
    gang = gangs(config_of(folder, tp=2))
    run = gang.run([Request(request_id="r", prompt_token_ids=(5, 6), max_new_tokens=1500)], SamplingSpec())
    assert isinstance(next(run), StepEvent)
    os.kill(gang.followers[0].ranks[0].pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match="rank 1"):
        list(run)
    with pytest.raises(EngineDied, match="rank 1"):
        tokens_of(gang, REQUESTS)


def test_death_of_a_replica_in_a_batch_is_told_by_name(folder: Path, gangs: Any) -> None:
    gang = gangs(config_of(folder, dp=2))
    requests = [Request(request_id=str(row), prompt_token_ids=(5, 6), max_new_tokens=1500) for row in range(2)]
    run = gang.run(requests, SamplingSpec())
    assert isinstance(next(run), StepEvent)
    os.kill(gang.followers[0].ranks[0].pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match="rank 1"):
        list(run)


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"tp": 2, "dp": 2}], ids=str)
def test_followers_end_when_rank_0_is_killed(folder: Path, sizes: dict[str, int]) -> None:
    config, port = config_of(folder, **sizes), reserve_port()
    world = config.engine.world_size

    def placed(rank: int) -> BackendConfig:
        return BackendConfig(**{name: getattr(config, name) for name in NAMES}, rendezvous=place(rank, world, port))

    followers = [FollowingRank(placed(rank)) for rank in range(1, world)]
    leader = ProcessBackend(placed(0), TARGET, sys.executable)
    leader.load()
    assert all(follower.ranks for follower in followers)
    os.kill(leader.identity()[0].pid, signal.SIGKILL)
    for follower in followers:
        assert follower.end()
        assert isinstance(follower.error, GenerationError)
        follower.close()
    leader.close()


def test_abandoned_batch_leaves_every_rank_usable(folder: Path, alone: list[tuple[int, ...]], gangs: Any) -> None:
    gang = gangs(config_of(folder, tp=2, dp=2))
    for _ in range(3):
        run = gang.run(REQUESTS, SamplingSpec())
        assert isinstance(next(run), StepEvent)
        run.close()
    assert tokens_of(gang, REQUESTS) == alone
    gang.reset()
    assert tokens_of(gang, REQUESTS) == alone


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"dp": 2}], ids=str)
def test_nan_fails_the_batch_and_not_the_gang(folder: Path, tmp_path: Path, gangs: Any, sizes: dict[str, int]) -> None:
    config = AutoConfig.for_model("llama", **BUILTIN_MODELS["llama-tiny"].config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")  # tied: every logit row has it
    model.save_pretrained(tmp_path)
    train_tokenizer(2048, tmp_path / "cache").save_pretrained(tmp_path)
    gang = gangs(config_of(folder, ModelSpec(id=str(tmp_path)), **sizes))
    for _ in range(2):
        with pytest.raises(NumericsError):
            tokens_of(gang, REQUESTS)


def test_failure_of_one_rank_alone_is_the_end_of_the_gang(folder: Path, gangs: Any) -> None:
    gang = gangs(config_of(folder, tp=2))
    gang.leader._engine._engine._model.model.layers[2].register_forward_hook(lambda *_: torch.empty(10**15))
    with pytest.raises(EngineDied, match="rank 1"):
        tokens_of(gang, REQUESTS)


def test_close_leaves_no_process_and_a_gang_loads_again(folder: Path, alone: list[tuple[int, ...]]) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    gang = GangBackend(config_of(folder, tp=2))
    for _ in range(2):
        gang.load()
        assert tokens_of(gang, REQUESTS) == alone
        followers = list(gang.followers)
        gang.leader.close()
        assert all(follower.end() and follower.error is None for follower in followers)
        gang.close()
        assert not torch.distributed.is_initialized()
        assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_follower_can_be_closed_while_it_waits(folder: Path, gangs: Any) -> None:
    gang = gangs(config_of(folder, tp=2))
    assert gang.followers[0].ranks
    gang.followers[0].close()
    with pytest.raises(EngineDied, match="rank 1"):
        tokens_of(gang, REQUESTS)


def test_missing_rank_is_named(folder: Path) -> None:
    config = config_of(folder, tp=2, meet_timeout_s=0.5)
    backend = GangBackend(config, hosts=("host-1", "host-far")).leader
    with pytest.raises(LoadError, match=r"1 of 2 processes met at 127\.0\.0\.1:\d+ within 0\.5 s; missing: rank 1 \(host-far\)"):
        backend.load()


def test_absent_rank_0_is_named(folder: Path) -> None:
    config = config_of(folder, tp=2, meet_timeout_s=0.5)
    port = reserve_port()
    backend = TransformersBackend(BackendConfig(**{name: getattr(config, name) for name in NAMES}, rendezvous=place(1, 2, port)))
    with pytest.raises(LoadError, match=rf"rank 0 \(host-1\) at 127\.0\.0\.1:{port} within 0\.5 s"):
        backend.load()


def test_rank_of_another_gang_is_refused(folder: Path) -> None:
    port, config = reserve_port(), config_of(folder, tp=2)
    other = config_of(folder, ModelSpec(config="llama-tiny"), tp=2)
    stranger = FollowingRank(BackendConfig(**{name: getattr(other, name) for name in NAMES}, rendezvous=place(1, 2, port)))
    backend = TransformersBackend(BackendConfig(**{name: getattr(config, name) for name in NAMES}, rendezvous=place(0, 2, port)))
    with pytest.raises(LoadError, match="rank 1 was given another model, engine or gang"):
        backend.load()
    assert stranger.end()
    assert isinstance(stranger.error, LoadError)
    stranger.close()


def test_rank_that_cannot_load_is_named_to_rank_0(folder: Path) -> None:
    config = config_of(folder, tp=2)
    port = reserve_port()
    gang = GangBackend(config)
    broken = BackendConfig(
        **({name: getattr(config, name) for name in NAMES} | {"cache_dir": "/proc/nowhere"}), rendezvous=place(1, 2, port)
    )
    follower = FollowingRank(broken, folder / "broken.log")
    backend = TransformersBackend(gang._placed(0, port))
    with pytest.raises(LoadError, match=r"rank 1 \(host-1\): .*cannot be written"):
        backend.load()
    assert follower.end()
    follower.close()
