"""What a gang of ranks refuses, and its parts without a second process."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llem_ray.backends.builtin_models import BUILTIN_MODELS
from llem_ray.backends.gang.layout import Layout, deal
from llem_ray.backends.gang.links import Circle, Link, gather
from llem_ray.backends.interfaces import interface_of
from llem_ray.backends.process.wire import Channel, error_body
from llem_ray.backends.transformers.arguments import TransformersArgs, check_shape
from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.backends.transformers.clocks import PeerClock, measure_clock
from llem_ray.backends.transformers.pipeline import require_pipeline
from llem_ray.backends.transformers.process_group import HangUpWatch
from llem_ray.backends.transformers.random_checkpoint import random_checkpoint
from llem_ray.backends.transformers.replica import Replica, require_plan
from llem_ray.core.backend import BackendConfig, Rendezvous
from llem_ray.core.errors import ConfigError, DeviceMemoryError, EngineDied, GenerationError, HangError, LoadError, NumericsError
from llem_ray.core.spec import EngineSpec, ModelSpec

TINY = ModelSpec(config="llama-tiny", initializer_range=0.1)
PLACE = Rendezvous(
    rank=0, world_size=2, local_rank=0, hosts=("a", "b"), master_addr="127.0.0.1", master_port=1, node_addr="127.0.0.1"
)


def backend_of(folder: Path, place: Rendezvous | None, model: ModelSpec = TINY, **engine: Any) -> TransformersBackend:
    return TransformersBackend(
        BackendConfig(
            model=model,
            engine=EngineSpec(**engine),
            device="cpu",
            host="a",
            base_dir=str(folder),
            cache_dir=str(folder),
            rendezvous=place,
        )
    )


@pytest.mark.parametrize("name", ["tensor_parallel", "pipeline_parallel", "data_parallel"])
def test_several_ranks_need_several_processes(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="one process for each rank") as caught:
        backend_of(tmp_path, None, **{name: 2}).check()
    assert (caught.value.field, caught.value.found, caught.value.allowed) == (f"engine.{name}", "2", "1")
    assert caught.value.exit_code == 2


def test_processes_must_be_as_many_as_ranks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 processes for 4 ranks"):
        backend_of(tmp_path, PLACE, tensor_parallel=4).check()


@pytest.mark.parametrize("name", ["meet_timeout_s", "step_timeout_s"])
def test_deadlines_are_positive(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="more than 0") as caught:
        backend_of(tmp_path, PLACE, tensor_parallel=2, engine_args={name: 0}).check()
    assert caught.value.field == f"engine.engine_args.{name}"


def test_heads_that_do_not_divide_are_refused_before_loading(tmp_path: Path) -> None:
    backend_of(tmp_path, PLACE, tensor_parallel=2).check()
    four = Rendezvous(**{name: getattr(PLACE, name) for name in PLACE.__slots__} | {"world_size": 4, "hosts": ("a",) * 4})
    with pytest.raises(ConfigError, match=r"num_key_value_heads \(2\) must be divisible") as caught:
        backend_of(tmp_path, four, tensor_parallel=4).check()
    assert (caught.value.found, caught.value.allowed) == ("4", "1, 2")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"tensor_parallel": 3}, r"num_attention_heads \(8\)"),
        ({"tensor_parallel": 8}, r"num_key_value_heads \(4\)"),
        ({"tensor_parallel": 4}, r"vocab_size \(1002\)"),
        ({"pipeline_parallel": 6}, "has 5 layers"),
    ],
)
def test_shapes_that_cannot_be_split(engine: dict[str, int], message: str) -> None:
    config = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1002, "num_hidden_layers": 5}
    for found in (config, {"text_config": config}):
        with pytest.raises(ConfigError, match=message):
            check_shape(EngineSpec(**engine), found)
    check_shape(EngineSpec(tensor_parallel=2, pipeline_parallel=5), config)
    check_shape(EngineSpec(tensor_parallel=7), {})


def test_models_without_a_plan_are_not_shared_silently() -> None:
    gpt2 = AutoConfig.for_model("gpt2")
    with pytest.raises(ConfigError, match="no plan") as caught:
        require_plan(Layout(tensor=2, pipeline=1, data=1, rank=0), gpt2)
    assert "gpt2" in str(caught.value.found)
    with pytest.raises(ConfigError, match="cannot be spread") as caught:
        require_plan(Layout(tensor=1, pipeline=2, data=1, rank=0), gpt2)
    assert "llama" in str(caught.value.allowed)


def test_models_that_transformers_splits_wrongly_are_refused() -> None:
    with pytest.raises(ConfigError, match="gpt_neox"):
        require_pipeline("gpt_neox", 2)


def test_layout_of_two_replicas_of_two_shards_and_two_stages() -> None:
    ranks = [Layout.of(EngineSpec(tensor_parallel=2, pipeline_parallel=2, data_parallel=2), rank) for rank in range(8)]
    assert [rank.led for rank in ranks] == [(1, 2, 3, 4), (), (), (), (5, 6, 7), (), (), ()]
    assert [rank.leader for rank in ranks] == [0, 0, 0, 0, 4, 4, 4, 4]
    assert ranks[0].text == "tensor 2 x pipeline 2 x data 2"


def test_a_batch_is_dealt_out_like_cards() -> None:
    assert deal("abcde", 2) == [["a", "c", "e"], ["b", "d"]]
    assert deal("a", 3) == [["a"], [], []]


@pytest.fixture
def pair() -> Iterator[tuple[Link, Channel]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    link, channel = Link(3, "far", ours), Channel(theirs)
    yield link, channel
    link.close()
    channel.close()


def test_clock_of_another_host_is_read_and_converted(pair: tuple[Link, Channel]) -> None:
    link, channel = pair
    shift_ns = 10**15

    def answer() -> None:
        while True:
            call, kind, _ = channel.receive()
            if kind == "end":
                return
            channel.send(call, "pong", shift_ns + time.monotonic_ns())

    thread = threading.Thread(target=answer)
    thread.start()
    clock = measure_clock(link, 1, 30.0, same_host=False)
    same = measure_clock(link, 2, 30.0, same_host=True)
    link.send(3, "end")
    thread.join()
    assert abs(clock.offset_ns - shift_ns) <= clock.half_width_ns + 1000
    assert clock.half_width_ns > 0
    assert same.offset_ns == 0
    assert PeerClock(offset_ns=7, half_width_ns=1).ours(107) == 100


def test_answers_to_earlier_calls_are_dropped(pair: tuple[Link, Channel]) -> None:
    link, channel = pair
    channel.send(1, "late")
    channel.send(2, "done", 5)
    assert gather([link], 2, 30.0, "a test") == {3: ("done", 5)}


def test_silence_and_hang_up_are_told_apart(pair: tuple[Link, Channel]) -> None:
    link, channel = pair
    with pytest.raises(HangError, match=r"a test within 0\.01 s from rank 3 \(far\)"):
        gather([link], 1, 0.01, "a test")
    channel.close()
    with pytest.raises(EngineDied, match=r"rank 3 \(far\) is gone during a test"):
        gather([link], 1, 30.0, "a test")


def test_hang_up_is_noticed_without_reading(pair: tuple[Link, Channel]) -> None:
    link, channel = pair
    noticed = threading.Event()
    watch = HangUpWatch([link], noticed.set)
    channel.send(1, "step")
    assert not noticed.wait(0.05)
    channel.close()
    assert noticed.wait(30)
    watch.close()


@pytest.mark.parametrize(
    ("ours", "theirs", "survives"),
    [
        (DeviceMemoryError("no room here"), DeviceMemoryError("no room there"), True),
        (DeviceMemoryError("no room here"), None, True),
        (NumericsError("NaN"), None, True),
        (None, DeviceMemoryError("no room there"), False),
        (DeviceMemoryError("no room here"), GenerationError("a bug there"), False),
    ],
)
def test_a_gang_survives_what_all_its_ranks_survive(
    tmp_path: Path, pair: tuple[Link, Channel], ours: Exception | None, theirs: Exception | None, survives: bool
) -> None:
    link, channel = pair
    config = backend_of(tmp_path, PLACE, tensor_parallel=2)._config
    replica = Replica(config, TransformersArgs(step_timeout_s=30.0), torch.device("cpu"))
    replica.circle = Circle(leader=None, members=(link,))
    channel.send(1, "ended", None if theirs is None else error_body(theirs))

    def serve() -> None:
        with replica.batch():
            replica.begin([[5, 6]], 3)
            if ours is not None:
                raise ours

    with pytest.raises(type(ours) if ours is not None and survives else EngineDied) as caught:
        serve()
    assert [channel.receive(30.0)[1] for _ in range(2)] == ["batch", "stop"]
    if survives:
        replica.require_usable()
    else:
        assert "rank 3 failed in the middle of a batch" in str(caught.value)
        with pytest.raises(EngineDied, match="there"):
            replica.require_usable()
    replica.close()


def test_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.1") is None


def test_random_checkpoint_holds_the_weights_of_one_process(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **BUILTIN_MODELS["llama-tiny"].config)
    model = ModelSpec(config="llama-tiny", seed=4)
    folder = random_checkpoint(model, config, torch.float32, 4_002_304, tmp_path)
    torch.manual_seed(4)
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.state_dict().items())
    inode = folder.stat().st_ino
    assert random_checkpoint(model, config, torch.float32, 4_002_304, tmp_path).stat().st_ino == inode
    assert random_checkpoint(ModelSpec(config="llama-tiny", seed=5), config, torch.float32, 0, tmp_path) != folder
    assert random_checkpoint(model, config, torch.bfloat16, 0, tmp_path) != folder
    assert len([path for path in (tmp_path / "random-checkpoints").iterdir() if path.is_dir()]) == 3


def test_random_checkpoint_without_room_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **BUILTIN_MODELS["llama-tiny"].config)
    with pytest.raises(LoadError, match="B left"):
        random_checkpoint(TINY, config, torch.float32, 10**18, tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(LoadError, match="cannot be written") as caught:
        random_checkpoint(TINY, config, torch.float32, 1, blocked)
    assert "LLEM_RAY_CACHE" in str(caught.value.hint)


def test_a_rank_that_is_not_loaded_does_not_follow(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="not loaded"):
        backend_of(tmp_path, PLACE, tensor_parallel=2).follow()


def test_one_process_leads_itself(tmp_path: Path) -> None:
    backend = backend_of(tmp_path, None, engine_args={"num_threads": 1})
    backend.load()
    assert [rank.pid for rank in backend.identity()] == [os.getpid()]
    with pytest.raises(GenerationError, match="cannot follow"):
        backend.follow()
    backend.close()
