"""The part of the tensorrt engine that needs no TensorRT-LLM: what it refuses, asks the library for, sets and cleans up."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import datetime, timedelta
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import psutil
import pytest
from pretended_tensorrt import PretendedMachine

from llem_ray.backends.model_source import find_model
from llem_ray.backends.tensorrt_llm import workers
from llem_ray.backends.tensorrt_llm.arguments import (
    cache_arguments,
    check_spec,
    engine_arguments,
    reads_stats,
    sampling_arguments,
)
from llem_ray.backends.tensorrt_llm.backend import TensorrtBackend
from llem_ray.backends.tensorrt_llm.iteration_stats import UnusableStats, steps_of
from llem_ray.backends.tensorrt_llm.machine import ThisMachine, require_gpus, require_python
from llem_ray.backends.tensorrt_llm.ray_workers import RayWorkers, environment_for_workers, local_gpu_ids, require_ray
from llem_ray.backends.tensorrt_llm.settings import WorkerEnvironment
from llem_ray.backends.tensorrt_llm.waiting import within
from llem_ray.core.backend import BackendConfig, Rank, Rendezvous, Request, Reservation
from llem_ray.core.errors import BackendError, ConfigError, HangError, PlacementError, PluginError
from llem_ray.core.plugins import install_command
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec

TINY = ModelSpec(config="llama-tiny")
HELD = Reservation(
    ray_version=metadata.version("ray"),
    python_version=platform.python_version(),
    address="10.0.0.1:6379",
    group="0f",
    gpu_share=0.9,
    gpu_ids=("3", "1"),
    gpu_uuids=("GPU-a", "GPU-b"),
)
HERE = Rendezvous(
    rank=0, world_size=2, local_rank=0, hosts=("a", "b"), master_addr="10.0.0.1", master_port=1, node_addr="10.0.0.1"
)


def config_of(model: ModelSpec = TINY, args: dict[str, Any] | None = None, device: Any = "cuda", **engine: Any) -> BackendConfig:
    spec = EngineSpec(backend="tensorrt", engine_args=args or {}, **engine)
    return BackendConfig(model=model, engine=spec, device=device, host="h", base_dir=".", cache_dir=".")


def on_two_nodes(**engine: Any) -> BackendConfig:
    return replace(config_of(tensor_parallel=2, nodes=2, **engine), rendezvous=replace(HERE, reservation=HELD))


def arguments_of(config: BackendConfig) -> dict[str, Any]:
    return engine_arguments(config, find_model(config.model, config.base_dir), "folder", "bfloat16", 2048)


@pytest.mark.skipif(find_spec("tensorrt_llm") is not None, reason="TensorRT-LLM is installed here")
def test_a_missing_library_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(PluginError, match="the tensorrt engine needs tensorrt_llm") as caught:
        TensorrtBackend(config_of(), PretendedMachine()).check()
    assert install_command("tensorrt-llm") in str(caught.value.hint)


def test_another_python_is_refused_and_told_where_to_go() -> None:
    with pytest.raises(PluginError, match=r"needs Python 3\.12, this is Python 3\.13") as caught:
        TensorrtBackend(config_of(), PretendedMachine(version=(3, 13))).check()
    assert "engine.python" in str(caught.value.hint)
    require_python((3, 12))
    assert ThisMachine().python() == sys.version_info[:2]


@pytest.mark.parametrize(
    ("machine", "needed", "told"),
    [
        (PretendedMachine(count=0), 1, r"needs 1 NVIDIA GPU, 0 can be used here"),
        (PretendedMachine(count=1), 2, r"needs 2 NVIDIA GPUs, 1 can be used here"),
        (PretendedMachine(capability=(7, 5)), 2, r"compute capability 8\.0 or newer .* Pretended GPU has 7\.5"),
    ],
)
def test_too_few_or_too_old_gpus_are_refused(machine: PretendedMachine, needed: int, told: str) -> None:
    with pytest.raises(PluginError, match=told):
        require_gpus(machine.gpus(), needed)


def test_gpus_beside_the_gang_may_be_old() -> None:
    new, old = PretendedMachine(count=1).gpus(), PretendedMachine(capability=(7, 0)).gpus()
    require_gpus((*new, *old), 1)


def test_an_engine_that_is_not_loaded_says_so_and_closes() -> None:
    backend = TensorrtBackend(config_of())
    for call in (backend.identity, lambda: backend.encode(["a"])):
        with pytest.raises(BackendError, match="not loaded"):
            call()
    with pytest.raises(BackendError, match="not loaded"):
        list(backend.run([Request(request_id="r", prompt_token_ids=(5,), max_new_tokens=1)], SamplingSpec()))
    backend.reset()
    backend.close()
    backend.close()


@pytest.mark.parametrize(
    ("config", "field", "told"),
    [
        (config_of(device="cpu"), "engine.device", "NVIDIA GPUs only"),
        (config_of(data_parallel=2), "engine.data_parallel", "replica"),
        (config_of(nodes=2), "engine.nodes", "submit it to a Ray cluster"),
        (replace(config_of(), rendezvous=HERE), "engine.nodes", "one node"),
        (on_two_nodes(gpus=4), "engine.gpus", "has one GPU"),
        (on_two_nodes(args={"backend": "tensorrt"}), "engine.engine_args.backend", "PyTorch backend"),
        (on_two_nodes(args={"gpus_per_node": 1}), "engine.engine_args.gpus_per_node", "engine.nodes"),
        (config_of(replace(TINY, quantization="fp8")), "model.quantization", "ModelOpt"),
        (config_of(replace(TINY, initializer_range=0.1)), "model.initializer_range", "model.id"),
        (config_of(args={"load_format": "auto"}), "engine.engine_args.load_format", "dummy"),
        (config_of(args={"enable_lora": True}), "engine.engine_args.enable_lora", "no adapter would be used"),
        (config_of(args={"dtype": "half"}), "engine.engine_args.dtype", "model.dtype"),
        (config_of(args={"tensor_parallel_size": 2}), "engine.engine_args.tensor_parallel_size", "engine.tensor_parallel"),
        (config_of(args={"orchestrator_type": "ray"}), "engine.engine_args.orchestrator_type", "engine.nodes"),
        (config_of(args={"backend": "pytorsh"}), "engine.engine_args.backend", "did you mean 'pytorch'"),
        (config_of(args={"step_timeout_s": 0}), "engine.engine_args.step_timeout_s", "more than 0"),
    ],
)
def test_what_cannot_be_is_refused_without_the_library(config: BackendConfig, field: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_spec(config)
    assert caught.value.field == field
    assert told in str(caught.value)


def test_block_reuse_and_memory_are_always_stated() -> None:
    assert arguments_of(config_of())["kv_cache_config"] == {"enable_block_reuse": False, "free_gpu_memory_fraction": 0.9}
    assert cache_arguments({"max_tokens": 4096}) == {"enable_block_reuse": False, "max_tokens": 4096}
    assert cache_arguments({"enable_block_reuse": True, "free_gpu_memory_fraction": 0.5}) == {
        "enable_block_reuse": True,
        "free_gpu_memory_fraction": 0.5,
    }
    with pytest.raises(ConfigError, match="kv_cache_config"):
        arguments_of(config_of(args={"kv_cache_config": 0.9}))


def test_the_user_s_arguments_win_over_our_defaults() -> None:
    ours = arguments_of(config_of(tensor_parallel=2))
    assert (ours["load_format"], ours["max_seq_len"], ours["tensor_parallel_size"], ours["stream_interval"]) == (
        "dummy",
        2048,
        2,
        1,
    )
    theirs = arguments_of(config_of(args={"max_seq_len": 512, "cuda_graph_config": None, "step_timeout_s": 9}))
    assert (theirs["max_seq_len"], theirs["cuda_graph_config"]) == (512, None)
    assert "step_timeout_s" not in theirs


def test_the_engine_path_gets_only_what_it_takes() -> None:
    args = arguments_of(config_of(args={"backend": "tensorrt", "max_seq_len": 512, "iteration_stats": True}))
    assert args["max_input_len"] == 512
    assert not {"backend", "stream_interval", "enable_iter_perf_stats", "max_stats_len"} & set(args)


def test_statistics_are_read_where_a_wait_is_outside_of_the_batches() -> None:
    assert not reads_stats(config_of())
    assert reads_stats(replace(config_of(), online=True))
    assert reads_stats(config_of(args={"iteration_stats": True}))
    assert "enable_iter_perf_stats" not in arguments_of(config_of())
    assert arguments_of(config_of(args={"iteration_stats": True}))["enable_iter_perf_stats"] is True


def test_sampling_says_only_what_was_asked_for() -> None:
    request = Request(request_id="r", prompt_token_ids=(5,), max_new_tokens=7)
    greedy = sampling_arguments(request, SamplingSpec(), 3, (2, 4))
    assert greedy == {"max_tokens": 7, "ignore_eos": True, "end_id": -1, "detokenize": False}
    free = sampling_arguments(replace(request, ignore_eos=False), SamplingSpec(), 3, (2, 4))
    assert (free["end_id"], free["stop_token_ids"], free["include_stop_str_in_output"]) == (2, [4], True)
    drawn = [sampling_arguments(request, SamplingSpec(temperature=0.5, top_k=4, seed=1), row, ()) for row in (0, 1)]
    assert (drawn[0]["temperature"], drawn[0]["top_p"], drawn[0]["top_k"]) == (0.5, 1.0, 4)
    assert drawn[0]["seed"] != drawn[1]["seed"]


def test_a_launcher_s_variables_are_out_of_the_way_while_the_engine_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "TLLM_DISABLE_MPI", "RAY_LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    kept = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_MCA_btl": "^openib", "PMIX_MCA_gds": "hash"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    environment = WorkerEnvironment()
    environment.apply()
    assert set(before) - set(os.environ) == {
        "SLURM_PROCID",
        "PMI_RANK",
        "PMIX_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "TLLM_DISABLE_MPI",
        "RAY_LOCAL_WORLD_SIZE",
    }
    environment.take_back()
    assert dict(os.environ) == before


def test_workers_are_known_by_their_rank_and_ended_with_what_they_started() -> None:
    before = workers.descendants()
    nap = "import time; time.sleep(99)"
    script = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {nap!r}]); {nap}"
    started = [
        subprocess.Popen([sys.executable, "-S", "-c", script], env={**os.environ, "OMPI_COMM_WORLD_RANK": str(rank)})
        for rank in (1, 0)
    ]
    try:
        deadline_s = time.monotonic() + 20
        while len(found := workers.descendants() - before) < 4 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        ranks = workers.ranked(process.pid for process in started)
        assert ranks == {0: started[1].pid, 1: started[0].pid}
        workers.end(ranks.values())
        for process in started:
            process.wait()
        assert not any(workers.is_alive(pid) for pid in found)
    finally:
        for pid in workers.descendants() - before:
            psutil.Process(pid).kill()


def test_a_call_that_does_not_return_is_left_alone_after_its_deadline() -> None:
    assert within(9, "a sum", lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        within(9, "a quotient", lambda: 1 // 0)
    with pytest.raises(HangError, match=r"not answered within 0\.01 s: a nap"):
        within(0.01, "a nap", lambda: time.sleep(0.3))


WALL = datetime(2026, 3, 1, 12, 0, 10)
NOW_NS = 500_000_000_000


def row(at_ms: float, latency_ms: float, context: int = 0, generating: int = 0, prompt: int = 0) -> dict[str, Any]:
    """An iteration that began ``at_ms`` after the run, which began 10 s before ``WALL``."""
    stamp = (WALL - timedelta(seconds=10) + timedelta(milliseconds=at_ms)).strftime("%m-%d-%Y %H:%M:%S.%f")
    counts = {"numContextRequests": context, "numGenRequests": generating, "numCtxTokens": prompt}
    return {"timestamp": stamp, "iterLatencyMS": latency_ms, "inflightBatchingStats": counts}


def steps(rows: list[dict[str, Any]], *, overlapped: bool = False, last_ms: float = 100, **tokens: int) -> list[tuple[Any, ...]]:
    begin_ns = NOW_NS - 10_000_000_000
    found = steps_of(
        rows,
        begin_ns=begin_ns,
        end_ns=begin_ns + round(last_ms * 1e6),
        wall=WALL,
        now_ns=NOW_NS,
        overlapped=overlapped,
        prompt_tokens=tokens["prompt"],
        output_tokens=tokens["output"],
        prompts_may_be_cached=bool(tokens.get("cached")),
    )
    return [
        ((s.begin_ns - begin_ns) / 1e6, (s.end_ns - begin_ns) / 1e6, s.kind, s.prefill_tokens, s.decode_tokens) for s in found
    ]


def test_iterations_become_steps_at_our_times() -> None:
    rows = [row(1, 9, context=2, prompt=30), row(10, 4, context=1, generating=2, prompt=5), row(14, 3, generating=3)]
    assert steps(rows[::-1], prompt=35, output=8) == [
        (1, 10, "prefill", 30, 2),
        (10, 14, "mixed", 5, 3),
        (14, 17, "decode", 0, 3),
    ]


def test_overlapped_iterations_follow_each_other_and_waiting_is_no_latency() -> None:
    rows = [row(50, 5000, context=1, prompt=8), row(51, 11, generating=1), row(60, 9, generating=1)]
    assert steps(rows, overlapped=True, last_ms=68, prompt=8, output=3) == [
        (50, 60, "prefill", 8, 1),
        (60, 62, "decode", 0, 1),
        (62, 68, "decode", 0, 1),
    ]


def test_iterations_of_an_earlier_run_and_empty_ones_are_left_out() -> None:
    rows = [row(-500, 3, generating=1), row(2, 3, context=1, prompt=8), row(5, 3)]
    assert [step[3:] for step in steps(rows, prompt=8, output=1)] == [(8, 1)]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([row(2, 3, context=1, prompt=8)], "count 8 prompt and 1 output tokens, the requests 8 and 2"),
        ([row(2, 3, context=2, prompt=7)], "count 7 prompt"),
        ([{**row(2, 3, context=2, prompt=8), "timestamp": ""}], "no usable times"),
        ([{"timestamp": row(2, 3)["timestamp"], "iterLatencyMS": 3.0}], "no numContextRequests"),
    ],
)
def test_statistics_that_do_not_account_for_the_run_are_none(rows: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(UnusableStats, match=told):
        steps(rows, prompt=8, output=2)


def test_reused_blocks_may_leave_prompt_tokens_out() -> None:
    assert [step[3:] for step in steps([row(2, 3, context=2, prompt=7)], prompt=8, output=2, cached=1)] == [(7, 2)]


def test_several_nodes_are_run_by_ray_and_say_how_they_reduce() -> None:
    config = on_two_nodes()
    check_spec(config)
    given = arguments_of(config)
    assert (given["orchestrator_type"], given["allreduce_strategy"], given["gpus_per_node"]) == ("ray", "NCCL", 1)
    assert arguments_of(on_two_nodes(args={"allreduce_strategy": "AUTO"}))["allreduce_strategy"] == "AUTO"
    assert not {"orchestrator_type", "allreduce_strategy", "gpus_per_node"} & set(arguments_of(config_of(tensor_parallel=2)))
    assert not reads_stats(replace(config, online=True))
    assert TensorrtBackend.worker_layout(config.engine) == "ray"
    assert TensorrtBackend.worker_layout(config_of(tensor_parallel=2).engine) == "host"


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (replace(HELD, ray_version="2.9.1"), r"has Ray \S+ and Python \S+, the cluster has Ray 2\.9\.1 and Python"),
        (replace(HELD, python_version="3.8.1"), r"the cluster has Ray \S+ and Python 3\.8\.1"),
    ],
)
def test_another_ray_or_python_than_the_cluster_s_is_refused(held: Reservation, told: str) -> None:
    require_ray(HELD)
    with pytest.raises(PluginError, match=told):
        require_ray(held)


def test_an_interpreter_without_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(PluginError, match="has no Ray and Python"):
        require_ray(HELD)


def test_this_host_s_gpus_are_those_of_its_ranks_by_number() -> None:
    held = replace(HELD, gpu_ids=("3", "1", "3", "1"))
    meeting = replace(HERE, world_size=4, hosts=("a", "a", "b", "b"), reservation=held)
    assert local_gpu_ids(meeting) == ("3", "1")
    with pytest.raises(PluginError, match="Ray calls them GPU-a"):
        local_gpu_ids(replace(meeting, reservation=replace(held, gpu_ids=("GPU-a", "1", "2", "3"))))


class Crew:
    """A library whose workers answer as they are told."""

    def __init__(self, uuids: list[str]) -> None:
        self.answers = {"report_device_id": uuids, "llem_ray_pid": [71, 72][: len(uuids)]}

    def _collective_rpc(self, method: str) -> list[Any]:
        return list(self.answers[method])


@pytest.mark.parametrize(
    ("uuids", "told"),
    [
        (["GPU-a", "GPU-c"], "worker 1 on b runs on GPU-c, its bundle has GPU-b"),
        (["GPU-b", "GPU-a"], "worker 0 on a runs on GPU-b, its bundle has GPU-a"),
        (["GPU-a", "GPU-a"], "has workers on GPU-a, GPU-a, the gang has 2 GPUs"),
        (["GPU-a"], "has workers on GPU-a, the gang has 2 GPUs"),
    ],
)
def test_workers_on_other_gpus_than_placed_are_refused(uuids: list[str], told: str) -> None:
    with pytest.raises(PlacementError, match=told):
        RayWorkers(Crew(uuids), on_two_nodes())


def test_workers_are_known_by_host_process_and_gpu() -> None:
    assert RayWorkers(Crew(["a", "GPU-b"]), on_two_nodes()).ranks == (
        Rank(rank=0, host="a", pid=71, gpu_uuid="GPU-a"),
        Rank(rank=1, host="b", pid=72, gpu_uuid="GPU-b"),
    )


def test_workers_on_other_hosts_get_nothing_that_speaks_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_RAYLET_PID", "RAY_JOB_ID", "HOSTNAME", "LLEM_RAY_HOST_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    before = dict(os.environ)
    with environment_for_workers():
        assert set(before) - set(os.environ) >= {"CUDA_VISIBLE_DEVICES", "RAY_RAYLET_PID", "RAY_JOB_ID", "HOSTNAME"}
        assert not [name for name in os.environ if name.startswith("LLEM_RAY_")]
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert "secret" not in os.environ.values()
    assert dict(os.environ) == before


def test_the_orchestrator_s_variables_are_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("TRTLLM_RAY_BUNDLE_INDICES", "0,1")
    before = dict(os.environ)
    environment = WorkerEnvironment()
    environment.apply_for_ray(("3", "1"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,1"
    assert (os.environ["CUDA_DEVICE_ORDER"], os.environ["TLLM_DISABLE_MPI"]) == ("PCI_BUS_ID", "1")
    assert "TRTLLM_RAY_BUNDLE_INDICES" not in os.environ
    os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"  # as the library does
    environment.take_back()
    assert dict(os.environ) == before


def test_a_follower_keeps_its_place_until_it_is_closed() -> None:
    backend = TensorrtBackend(replace(on_two_nodes(), rendezvous=replace(HERE, rank=1, reservation=HELD)))
    backend.load()
    assert backend.identity() == ()
    thread = threading.Thread(target=backend.follow, daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    backend.close()
    thread.join(10)
    assert not thread.is_alive()
