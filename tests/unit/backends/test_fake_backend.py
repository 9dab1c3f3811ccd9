from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from gang import place

from llem_ray.core.backend import BackendConfig, Request, RequestRecord, StepEvent
from llem_ray.core.errors import ConfigError, DeviceMemoryError, GenerationError, LlemRayError, LoadError, NumericsError
from llem_ray.core.plugins import load_plugin
from llem_ray.core.ports import reserve_port
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec
from llem_ray.testing.backend import FakeBackend
from llem_ray.testing.clock import VirtualClock

REQUESTS = tuple(Request(request_id=str(i), prompt_token_ids=(5, 6 + i), max_new_tokens=6) for i in range(4))


def fake(folder: Path, tensor_parallel: int = 1, **args: Any) -> FakeBackend:
    engine = EngineSpec(backend="fake", tensor_parallel=tensor_parallel, engine_args=args)
    config = BackendConfig(
        model=ModelSpec(config="any"), engine=engine, device="cuda", host="h", base_dir=str(folder), cache_dir=str(folder)
    )
    return FakeBackend(config, VirtualClock())


def serve(backend: FakeBackend, requests: tuple[Request, ...] = REQUESTS) -> list[StepEvent | RequestRecord]:
    return list(backend.run(requests, SamplingSpec()))


def test_is_registered_as_an_engine() -> None:
    assert load_plugin("llem_ray.backends", "fake") is FakeBackend


def test_steps_take_the_configured_time(tmp_path: Path) -> None:
    backend = fake(tmp_path, prefill_ms=20, decode_ms=3, load_ms=500)
    assert backend.load().construct_s == pytest.approx(0.5)
    steps = [event for event in serve(backend) if isinstance(event, StepEvent)]
    assert [(step.end_ns - step.begin_ns) / 1e6 for step in steps] == [20, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(("kind", "error"), [("out_of_memory", DeviceMemoryError), ("nan", NumericsError)])
def test_fails_at_the_named_run_only(tmp_path: Path, kind: str, error: type[LlemRayError]) -> None:
    backend = fake(tmp_path, fail={"kind": kind, "at_run": 2})
    backend.load()
    serve(backend)
    seen = []
    with pytest.raises(error):
        seen.extend(backend.run(REQUESTS, SamplingSpec()))
    serve(backend)


def test_fails_for_large_batches_only(tmp_path: Path) -> None:
    backend = fake(tmp_path, fail={"kind": "out_of_memory", "batch_above": 2})
    backend.load()
    serve(backend, REQUESTS[:2])
    with pytest.raises(DeviceMemoryError):
        serve(backend)


def test_fails_once_across_loads(tmp_path: Path) -> None:
    args = {"fail": {"kind": "load", "once": "struck"}}
    with pytest.raises(LoadError):
        fake(tmp_path, **args).load()
    fake(tmp_path, **args).load()


def test_short_answers_hold_fewer_tokens(tmp_path: Path) -> None:
    backend = fake(tmp_path, fail={"kind": "short"})
    backend.load()
    records = [event for event in serve(backend) if isinstance(event, RequestRecord)]
    assert [(record.output_tokens, record.finish_reason) for record in records] == [(3, "stop")] * 4


def test_death_ends_the_process(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from llem_ray.core.backend import BackendConfig, Request
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec
from llem_ray.testing.backend import FakeBackend
engine = EngineSpec(backend="fake", engine_args={{"fail": {{"kind": "die"}}}})
backend = FakeBackend(BackendConfig(model=ModelSpec(config="x"), engine=engine, device="cpu", host="h",
                                    base_dir={str(tmp_path)!r}, cache_dir={str(tmp_path)!r}))
backend.load()
list(backend.run([Request(request_id="0", prompt_token_ids=(5,), max_new_tokens=2)], SamplingSpec()))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 17


def test_ranks_carry_the_given_uuids(tmp_path: Path) -> None:
    ranks = fake(tmp_path, tensor_parallel=2, gpu_uuids=["GPU-a", "GPU-b"]).identity()
    assert [(rank.rank, rank.gpu_uuid, rank.pid) for rank in ranks] == [(0, "GPU-a", os.getpid()), (1, "GPU-b", os.getpid())]


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({"prefill_ms": -1}, "_ms"),
        ({"vocab_size": 3}, "vocab_size"),
        ({"context_tokens": 0}, "context_tokens"),
        ({"gpu_uuids": ["a", "b"]}, "gpu_uuids"),
        ({"fail": {"kind": "oom"}}, "fail.kind"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, args: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fake(tmp_path, **args).check()
    assert str(caught.value.field).endswith(field)


def gang_of(size: int) -> list[FakeBackend]:
    port = reserve_port()
    places = [place(rank, size, port) for rank in range(size)]
    engine = EngineSpec(backend="fake", tensor_parallel=size)
    made = [
        FakeBackend(
            BackendConfig(
                model=ModelSpec(config="x"), engine=engine, device="cpu", host="h", base_dir=".", cache_dir=".", rendezvous=there
            )
        )
        for there in places
    ]
    for backend in made:
        backend.load()
    return made


@pytest.mark.parametrize("who", [0, 1], ids=["the leading rank", "the rank itself"])
def test_a_rank_follows_until_it_or_the_leading_rank_closes(who: int) -> None:
    made = gang_of(2)
    following = threading.Thread(target=made[1].follow, daemon=True)
    following.start()
    time.sleep(0.3)
    assert following.is_alive()
    made[who].close()
    following.join(10)
    assert not following.is_alive()
    made[1 - who].close()


def test_a_rank_that_cannot_reach_the_leading_one_says_so() -> None:
    made = gang_of(2)
    made[0].close()
    made[1]._closed.clear()
    with pytest.raises(GenerationError, match=r"rank 0 at 127\.0\.0\.1 hung up"):
        made[1].follow()


def test_the_leading_rank_needs_its_port() -> None:
    made = gang_of(2)
    with pytest.raises(LoadError, match="cannot listen at port"):
        FakeBackend(made[0]._config).load()
    made[0].close()
