"""The part of the vllm engine that needs no vLLM: what it refuses, asks vLLM for, sets and cleans up."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import uuid
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from llem_ray.backends.model_source import find_model
from llem_ray.backends.vllm.arguments import check_spec, engine_arguments, runs_eagerly
from llem_ray.backends.vllm.backend import VllmBackend
from llem_ray.backends.vllm.leftovers import end_processes, is_alive, remove_segments, shared_segments
from llem_ray.backends.vllm.settings import EnvironmentDefaults
from llem_ray.core.backend import BackendConfig, Request
from llem_ray.core.errors import BackendError, ConfigError, PluginError
from llem_ray.core.plugins import install_command
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec

TINY = ModelSpec(config="llama-tiny")


def config_of(model: ModelSpec = TINY, args: dict[str, Any] | None = None, device: Any = "cpu", **engine: Any) -> BackendConfig:
    spec = EngineSpec(backend="vllm", engine_args=args or {}, **engine)
    return BackendConfig(model=model, engine=spec, device=device, host="h", base_dir=".", cache_dir=".")


def arguments_of(config: BackendConfig) -> dict[str, Any]:
    return engine_arguments(config, find_model(config.model, config.base_dir), "folder", "float32")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed here")
def test_a_missing_vllm_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(PluginError, match="the vllm engine needs vllm") as caught:
        VllmBackend(config_of()).check()
    assert install_command("vllm") in str(caught.value.hint)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed here")
@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "1.0"])
def test_another_version_is_refused_before_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    (tmp_path / "vllm.py").write_text("raise SystemExit('imported')")
    (tmp_path / f"vllm-{version}.dist-info").mkdir()
    (tmp_path / f"vllm-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=rf"needs vLLM 0\.32, {version} is installed here"):
        VllmBackend(config_of()).check()


def test_an_engine_that_is_not_loaded_says_so_and_closes() -> None:
    backend = VllmBackend(config_of())
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
        (config_of(args={"dtype": "half"}), "engine.engine_args.dtype", "model.dtype"),
        (config_of(args={"tensor_parallel_size": 2}), "engine.engine_args.tensor_parallel_size", "engine.tensor_parallel"),
        (config_of(args={"data_parallel_rank": 1}), "engine.engine_args.data_parallel_rank", "engine.data_parallel"),
        (config_of(args={"prefill_context_parallel_size": 2}), "engine.engine_args.prefill_context_parallel_size", "GPUs"),
        (config_of(args={"device_ids": [1]}), "engine.engine_args.device_ids", "placed"),
        (config_of(args={"load_format": "auto"}), "engine.engine_args.load_format", "dummy"),
        (config_of(args={"lora": {"rank": 0}}), "engine.engine_args.lora.rank", "1 and more"),
        (config_of(data_parallel=2), "engine.data_parallel", "replica"),
        (config_of(replace(TINY, initializer_range=0.1)), "model.initializer_range", "model.id"),
    ],
)
def test_what_cannot_be_is_refused_without_vllm(config: BackendConfig, field: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_spec(config)
    assert caught.value.field == field
    assert told in str(caught.value)


def test_several_workers_never_leave_the_executor_to_vllm() -> None:
    assert "distributed_executor_backend" not in arguments_of(config_of())
    for engine in ({"tensor_parallel": 2}, {"pipeline_parallel": 2}):
        assert arguments_of(config_of(**engine))["distributed_executor_backend"] == "mp"


def test_the_user_s_arguments_win_over_our_defaults() -> None:
    ours = arguments_of(config_of())
    assert (ours["enable_prefix_caching"], ours["load_format"], ours["enforce_eager"]) == (False, "dummy", True)
    theirs = arguments_of(config_of(args={"enable_prefix_caching": True, "enforce_eager": False}))
    assert (theirs["enable_prefix_caching"], theirs["enforce_eager"]) == (True, False)
    assert "enforce_eager" not in arguments_of(config_of(device="cuda"))


def test_what_an_adapter_or_speculation_needs_is_asked_for() -> None:
    config = config_of(args={"lora": {"rank": 20}, "speculative_config": {"method": "ngram"}})
    ours = engine_arguments(config, find_model(TINY, "."), "folder", "float32", lora_rank=20)
    assert (ours["enable_lora"], ours["max_lora_rank"], ours["per_request_spec_decode_metrics"]) == (True, 32, "summary")
    assert "lora" not in ours
    assert not {"enable_lora", "max_lora_rank", "per_request_spec_decode_metrics"} & set(arguments_of(config_of()))
    for short in ({"spec_method": "ngram"}, {"spec_model": "a/draft"}, {"spec_tokens": 2}):
        assert arguments_of(config_of(args=short))["per_request_spec_decode_metrics"] == "summary"


@pytest.mark.parametrize(
    ("args", "device", "eager"),
    [({}, "cpu", True), ({}, "cuda", False), ({"enforce_eager": True}, "cuda", True), ({"enforce_eager": False}, "cpu", False)],
)
def test_only_the_cpu_is_eager_by_default(args: dict[str, Any], device: str, eager: bool) -> None:
    assert runs_eagerly(config_of(args=args, device=device)) is eager


def test_variables_of_the_user_stay_and_ours_go_away(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    before = dict(os.environ)
    defaults = EnvironmentDefaults("cpu", workers=2, eager=True)
    defaults.apply()
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert int(os.environ["OMP_NUM_THREADS"]) >= 1
    defaults.take_back()
    assert dict(os.environ) == before


def test_a_gpu_gets_no_setting_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS"}
    for name in names | {"VLLM_LOGGING_STREAM"}:
        monkeypatch.delenv(name, raising=False)
    defaults = EnvironmentDefaults("cuda", workers=4, eager=True)
    defaults.apply()
    try:
        assert not names & set(os.environ)
        assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"
    finally:
        defaults.take_back()


def test_only_mapped_segments_of_vllm_are_ours() -> None:
    mine, other = (Path(f"/dev/shm/vllm_dist_{uuid.uuid4().hex}-tp:0-[0-1]-cpushm_0") for _ in range(2))
    try:
        for path in (mine, other):
            path.write_bytes(b"x" * mmap.PAGESIZE)
        with mine.open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE):
            segments = shared_segments([os.getpid(), 2**22 + 1])
        assert segments == {mine}
        remove_segments(segments)
        remove_segments(segments)
        assert not mine.exists()
        assert other.exists()
    finally:
        mine.unlink(missing_ok=True)
        other.unlink(missing_ok=True)


def test_workers_that_do_not_end_are_killed() -> None:
    slow = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    quick = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, quick.pid, os.WEXITED | os.WNOWAIT)  # it has ended and is not reaped
    processes = [psutil.Process(slow.pid), psutil.Process(quick.pid)]
    end_processes(processes, 0.2)
    assert not any(map(is_alive, processes))
    assert slow.wait() == -signal.SIGKILL
    assert quick.wait() == 0
    end_processes(processes, 0.2)
