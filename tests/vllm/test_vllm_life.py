"""Engines that come and go: one at a time in a process, and nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm_models import NEW_TOKENS, PROMPTS, SMALL, children, config_of, flops_of, requests_of, serve

from llem_ray.backends.vllm.backend import VllmBackend
from llem_ray.backends.vllm.leftovers import shared_segments
from llem_ray.core.backend import Request
from llem_ray.core.errors import ConfigError, EngineDied, LoadError
from llem_ray.core.spec import ModelSpec, SamplingSpec


def test_prefixes_are_forgotten_between_trials_where_caching_is_asked_for(tmp_path: Path) -> None:
    backend = VllmBackend(config_of(tmp_path, ModelSpec(config="llama-tiny"), {**SMALL, "enable_prefix_caching": True}))
    request = Request(request_id="r", prompt_token_ids=tuple(range(5, 205)), max_new_tokens=2)
    try:
        assert backend.load().notes["prefix_caching"] == "on, reset between trials"
        computed = []
        for _ in range(2):
            computed.append(sum(step.prefill_tokens for step in serve(backend, [request])[0]))
        backend.reset()
        computed.append(sum(step.prefill_tokens for step in serve(backend, [request])[0]))
        assert computed == [200, 200 - 128, 200]
    finally:
        backend.close()


def test_close_ends_the_workers_of_a_gang_and_restores_the_environment(
    checkpoint: ModelSpec, expected: dict[str, Any], tmp_path: Path
) -> None:
    environment, before = dict(os.environ), children()
    backend = VllmBackend(config_of(tmp_path, checkpoint, tensor_parallel=2))
    backend.load()
    ranks = backend.identity()
    assert [rank.rank for rank in ranks] == [0, 1]
    assert len({rank.pid for rank in ranks} | {os.getpid()}) == 3
    assert {psutil.Process(rank.pid).ppid() for rank in ranks} == {os.getpid()}
    steps, records = serve(backend, requests_of())
    assert [record.output_token_ids for record in records] == [record.output_token_ids for record in expected["fixed"]]
    assert sum(step.flops or 0 for step in steps) == sum(
        flops_of(len(prompt), len(prompt)) + sum(flops_of(1, len(prompt) + place) for place in range(1, NEW_TOKENS))
        for prompt in PROMPTS
    )
    segments = shared_segments(rank.pid for rank in ranks)
    backend.close()
    assert children() == before
    assert segments
    assert not any(path.exists() for path in segments)
    assert not any(psutil.pid_exists(rank.pid) and psutil.Process(rank.pid).status() != "zombie" for rank in ranks)
    assert set(environment) >= {name for name in os.environ if name.startswith(("VLLM_CPU", "VLLM_LOGGING", "TORCHDYNAMO"))}


def test_a_scheduler_in_another_process_tells_the_same(
    checkpoint: ModelSpec, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    backend = VllmBackend(config_of(tmp_path, checkpoint))
    backend.load()
    try:
        steps, records = serve(backend, requests_of())
        run = backend.run(requests_of(new_tokens=190), SamplingSpec())
        next(run)
        time.sleep(0.3)  # nobody takes what the scheduler tells meanwhile
        run.close()
        steps_again, again = serve(backend, requests_of())
    finally:
        backend.close()
    assert [record.output_token_ids for record in again] == [record.output_token_ids for record in records]
    assert [record.output_token_ids for record in records] == [record.output_token_ids for record in expected["fixed"]]
    assert sum(step.decode_tokens for step in steps) == NEW_TOKENS * len(PROMPTS)
    assert sum(step.computed_tokens for step in steps_again) == sum(step.computed_tokens for step in steps)
    assert {time_ns for record in records for time_ns in record.token_times_ns} == {
        step.end_ns for step in steps if step.decode_tokens
    }
    assert sum(step.flops or 0 for step in steps) == sum(
        flops_of(len(prompt), len(prompt)) + sum(flops_of(1, len(prompt) + place) for place in range(1, NEW_TOKENS))
        for prompt in PROMPTS
    )


def test_a_worker_that_dies_is_told_apart_and_leaves_nothing(tmp_path: Path) -> None:
    before = children()
    backend = VllmBackend(config_of(tmp_path, ModelSpec(config="llama-tiny"), tensor_parallel=2))
    backend.load()
    run = backend.run(requests_of(new_tokens=190), SamplingSpec())
    next(run)
    os.kill(backend.identity()[1].pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match="worker's process ended"):
        list(run)
    backend.close()
    assert children() == before


@pytest.mark.filterwarnings("ignore:unclosed context:ResourceWarning")  # vLLM leaves its client's to the collector
def test_an_engine_process_that_dies_in_a_step_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # the default on GPUs
    before = children()
    backend = VllmBackend(config_of(tmp_path, ModelSpec(config="llama-tiny"), SMALL))
    backend.load()
    (rank,) = backend.identity()
    core = psutil.Process(rank.pid).ppid()
    assert core != os.getpid()
    run = backend.run(requests_of(), SamplingSpec())
    next(run)
    os.kill(core, signal.SIGSTOP)  # so that the next step waits for a process that is going to die
    killer = threading.Timer(0.5, os.kill, (core, signal.SIGKILL))
    killer.start()
    with pytest.raises(EngineDied, match="vLLM's engine process ended"):
        list(run)
    with pytest.raises(EngineDied):
        serve(backend, requests_of())
    with pytest.raises(EngineDied):
        backend.reset()
    backend.close()
    assert children() == before


def test_a_folder_without_weights_is_refused_and_a_broken_checkpoint_is_a_load_error(
    tmp_path: Path, checkpoint: ModelSpec
) -> None:
    assert checkpoint.id is not None
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((Path(checkpoint.id) / name).read_bytes())
    backend = VllmBackend(config_of(tmp_path, ModelSpec(id="broken")))
    with pytest.raises(ConfigError, match="holds no weights"):
        backend.check()
    whole = (Path(checkpoint.id) / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadError, match="broken"):
        backend.load()
    backend.close()


PROGRAM = """
import sys
from llem_ray.backends.vllm.backend import VllmBackend
assert "vllm" not in sys.modules and "torch" not in sys.modules
from llem_ray.core.backend import BackendConfig, Request
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec
spec = EngineSpec(backend="vllm", device="cpu", engine_args={"max_model_len": 128, "max_num_seqs": 2})
backend = VllmBackend(BackendConfig(
    model=ModelSpec(config="llama-tiny"), engine=spec, device="cpu", host="h", base_dir=".", cache_dir=sys.argv[1]
))
backend.check()
backend.load()
list(backend.run([Request(request_id="r", prompt_token_ids=(5, 6), max_new_tokens=3)], SamplingSpec()))
backend.close()
"""


def test_nothing_is_written_to_standard_output(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
