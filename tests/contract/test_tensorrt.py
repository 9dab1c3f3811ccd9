"""The tensorrt engine against the contract of every engine, on a stand-in for the library: it never meets a GPU here."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pretended_tensorrt
import pytest
from backend_contract import BackendContract, Engine, OnlineContract
from pretended_tensorrt import UUIDS, BackendOfChild, PretendedBackend, fake_tensorrt

from llem_ray.backends.process.proxy import ProcessBackend
from llem_ray.backends.tensorrt_llm import workers
from llem_ray.core.backend import BackendConfig, LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.errors import (
    ConfigError,
    DeviceMemoryError,
    EngineDied,
    GenerationError,
    HangError,
    LoadError,
    PluginError,
)
from llem_ray.core.plugins import install_command
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec

MODEL = ModelSpec(config="llama-tiny")
ARGS = {"max_batch_size": 8, "max_seq_len": 256, "iteration_stats": True, "stats_wait_s": 0.1, "step_timeout_s": 20}
IN_PROCESS = Engine(PretendedBackend, MODEL, ARGS, device="cuda")


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


class TestInAProcess(OnlineContract):
    """Of its own, which has the stand-in on its path; times, errors and leftovers cross the socket."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, tmp_path_factory: pytest.TempPathFactory) -> Engine:
        folder = tmp_path_factory.mktemp("child")
        launcher = folder / "launcher.py"
        support = str(Path(pretended_tensorrt.__file__).parent)
        launcher.write_text(
            f"import runpy, sys\nsys.path.insert(0, {support!r})\nsys.argv = ['child', *sys.argv[3:]]\n"
            "runpy.run_module('llem_ray.backends.process.child', run_name='__main__', alter_sys=True)\n"
        )
        target = f"{BackendOfChild.__module__}:{BackendOfChild.__qualname__}"
        return replace(
            IN_PROCESS, factory=lambda config: ProcessBackend(config, target, f"{sys.executable} {launcher}"), online=True
        )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the tokenizer is trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(library: Any, cache: Path, tmp_path: Path) -> Iterator[Any]:
    """Makes backends on the stand-in; keyword arguments are those of the engine spec."""
    made: list[PretendedBackend] = []

    def build(args: dict[str, Any] | None = None, *, online: bool = False, model: ModelSpec = MODEL, **engine: Any) -> Any:
        config = BackendConfig(
            model=model,
            engine=EngineSpec(backend="tensorrt", engine_args={"max_seq_len": 256} | (args or {}), **engine),
            device="cuda",
            host="h",
            base_dir=str(tmp_path),
            cache_dir=str(cache),
            online=online,
        )
        made.append(PretendedBackend(config))
        return made[-1]

    library.reset()
    yield build
    library.reset()
    for backend in made:
        backend.close()


def request(new_tokens: int = 4, ignore_eos: bool = True, name: str = "r0") -> Request:
    return Request(request_id=name, prompt_token_ids=(5, 6, 7), max_new_tokens=new_tokens, ignore_eos=ignore_eos)


def run(backend: Any, *requests: Request, schedule: LoadSchedule | None = None) -> list[RequestRecord]:
    events = list(backend.run(requests or [request()], SamplingSpec(), schedule))
    return [event for event in events if isinstance(event, RequestRecord)]


def test_a_batch_has_no_steps_unless_they_are_asked_for(make: Any, library: Any) -> None:
    backend = make()
    assert backend.load().notes["steps"].startswith("none")
    assert all(isinstance(event, RequestRecord) for event in backend.run([request()], SamplingSpec()))
    assert "enable_iter_perf_stats" not in library.calls[0][1]


def test_the_engine_path_runs_the_same_way(make: Any) -> None:
    backend = make({"backend": "tensorrt", "iteration_stats": True, "stats_wait_s": 0.1})
    report = backend.load()
    assert report.notes["tensorrt_llm_backend"] == "tensorrt"
    events = list(backend.run([request(new_tokens=5)], SamplingSpec()))
    assert sum(event.decode_tokens for event in events if isinstance(event, StepEvent)) == 5
    assert run(backend)[0].output_tokens == 4


def test_every_worker_is_told_with_its_process_and_gpu_and_is_gone_after_close(make: Any) -> None:
    before = workers.descendants()
    backend = make(tensor_parallel=2)
    backend.load()
    ranks = backend.identity()
    assert [rank.gpu_uuid for rank in ranks] == list(UUIDS)
    assert {rank.pid for rank in ranks} == workers.descendants() - before
    backend.close()
    assert not any(workers.is_alive(rank.pid) for rank in ranks)


def test_a_check_before_gpus_are_leased_looks_at_the_node_s_but_loads_on_none(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    backend = make()
    backend.check()
    backend.close()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    with pytest.raises(PluginError, match="no GPU was leased"):
        backend.load()
    backend.close()
    larger = make(tensor_parallel=4)
    with pytest.raises(PluginError, match="needs 4 NVIDIA GPUs, 2 can be used here"):
        larger.check()
    larger.close()


def test_one_worker_may_be_in_this_process(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLLM_WORKER_USE_SINGLE_PROCESS", "1")
    backend = make()
    assert backend.load().notes["workers"] == "in the engine's process"
    assert backend.identity()[0].pid == os.getpid()


def test_a_worker_that_dies_ends_the_engine(make: Any, library: Any) -> None:
    backend = make()
    backend.load()
    library.hang_at_token = 2
    (rank,) = backend.identity()
    events = backend.run([request()], SamplingSpec())
    killer = threading.Timer(0.1, os.kill, (rank.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(EngineDied, match="worker 0 of 1 ended"):
        next(events)
    with pytest.raises(EngineDied, match="can serve no more"):
        run(backend)
    with pytest.raises(GenerationError, match="can serve no more"):
        backend.reset()


def test_silence_has_a_deadline(make: Any, library: Any) -> None:
    backend = make({"step_timeout_s": 1})
    backend.load()
    library.hang_at_token = 2
    with pytest.raises(HangError, match="no token for 1 s"):
        run(backend)
    with pytest.raises(EngineDied, match="can serve no more"):
        run(backend)


def test_a_load_that_hangs_has_one_too_and_leaves_no_worker(make: Any, library: Any) -> None:
    before = workers.descendants()
    library.hang_at_token = 1
    with pytest.raises(HangError, match="the first request"):
        make({"step_timeout_s": 0.1}).load()
    assert workers.descendants() == before


def test_a_shutdown_that_hangs_is_cut_short(make: Any, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make()
    backend.load()
    (rank,) = backend.identity()
    monkeypatch.setattr(sys.modules["llem_ray.backends.tensorrt_llm.engine"], "SHUTDOWN_S", 0.1)
    library.shutdown_hangs = True
    backend.close()
    assert not workers.is_alive(rank.pid)


def test_a_short_answer_is_an_error_that_counts_tokens(make: Any, library: Any) -> None:
    backend = make()
    backend.load()
    library.stop_at_token = 2
    with pytest.raises(GenerationError, match=r"r0 ended with 2 of 4 tokens \(finish reason 'stop'\)"):
        run(backend)
    (record,) = run(backend, request(ignore_eos=False))
    assert (record.output_tokens, record.finish_reason) == (2, "stop")
    library.stop_at_token, library.last_reason = None, "timeout"
    with pytest.raises(GenerationError, match="finish reason 'timeout'"):
        run(backend, request(ignore_eos=False))


def test_an_end_token_ends_an_answer_unless_it_is_ignored(make: Any, library: Any) -> None:
    backend = make()
    backend.load()
    (fixed,) = run(backend)
    backend._engine._end_token_ids = (2, fixed.output_token_ids[1])
    (free,) = run(backend, request(ignore_eos=False))
    assert (free.output_token_ids, free.finish_reason) == (fixed.output_token_ids[:2], "stop")
    assert run(backend)[0].output_token_ids == fixed.output_token_ids


@pytest.mark.parametrize("where", ["submit_error", "stream_error"])
@pytest.mark.parametrize(
    ("raised", "kind"),
    [(RuntimeError("CUDA error: out of memory"), DeviceMemoryError), (RuntimeError("CUDA error: 700"), GenerationError)],
)
def test_errors_of_a_run_are_typed_and_the_next_one_works(
    make: Any, library: Any, where: str, raised: Exception, kind: Any
) -> None:
    backend = make()
    backend.load()
    setattr(library, where, raised)
    with pytest.raises(kind, match=str(raised)):
        run(backend)
    setattr(library, where, None)
    assert run(backend)[0].output_tokens == 4


def test_errors_of_a_load_are_typed(make: Any, library: Any) -> None:
    cause = RuntimeError("Executor creation failed due to insufficient GPU memory.")
    library.load_error = RuntimeError("Executor worker returned error")
    library.load_error.__cause__ = cause
    with pytest.raises(DeviceMemoryError, match="does not fit"):
        make().load()
    library.load_error = RuntimeError("Executor worker died during initialization")
    with pytest.raises(LoadError, match="died during initialization") as caught:
        make().load()
    assert "standard error" in str(caught.value.hint)


def test_answers_are_kept_where_the_statistics_are_unusable(make: Any, library: Any, caplog: pytest.LogCaptureFixture) -> None:
    backend = make({"iteration_stats": True, "stats_wait_s": 0.1})
    backend.load()
    library.stats_timestamps = False
    events = list(backend.run([request()], SamplingSpec()))
    assert [event.output_tokens for event in events] == [4]
    assert "no steps are recorded for a run of 1 requests" in caplog.text


def test_a_run_given_up_in_its_middle_is_aborted(make: Any, library: Any) -> None:
    backend = make(online=True)
    backend.load()
    library.hang_at_token = 5  # an aborted request ends in spite of it
    events = backend.run([request(200, name="long"), request(2, name="short")], SamplingSpec(), LoadSchedule())
    assert next(events).request_id == "short"
    events.close()
    library.hang_at_token = None
    assert not backend._engine._llm._running
    assert run(backend)[0].output_tokens == 4


def test_two_requests_of_one_name_are_refused(make: Any) -> None:
    backend = make()
    backend.load()
    with pytest.raises(GenerationError, match="same id"):
        run(backend, request(), request())


def test_reused_blocks_are_told_apart_by_salt_after_a_reset(make: Any, library: Any) -> None:
    backend = make({"kv_cache_config": {"enable_block_reuse": True}})
    assert backend.load().notes["prefix_caching"] == "on, reset between trials"
    run(backend)
    backend.reset()
    run(backend)
    salts = [call["cache_salt"] for name, call in library.calls if name == "generate_async"]
    assert len(set(salts[-2:])) == 2
    plain = make()
    plain.load()
    run(plain)
    assert library.calls[-1][1]["cache_salt"] is None


def test_token_times_are_of_each_step_although_the_stream_yields_one_object(make: Any) -> None:
    backend = make()
    backend.load()
    (record,) = run(backend, request(30))
    assert len(set(record.token_times_ns)) == 30
    assert len(record.output_token_ids) == 30


@pytest.mark.parametrize(
    ("args", "field", "told"),
    [
        ({"max_batch_sizes": 4}, "engine.engine_args.max_batch_sizes", "did you mean 'max_batch_size'"),
        ({"max_batch_size": "many"}, "engine.engine_args", "max_batch_size Input should be a valid int"),
        ({"kv_cache_config": {"max_token": 4}}, "engine.engine_args.kv_cache_config.max_token", "did you mean 'max_tokens'"),
        ({"quant_config": {}}, "engine.engine_args.quant_config", "unknown engine argument"),
        ({"backend": "tensorrt", "cuda_graph_config": None}, "engine.engine_args.cuda_graph_config", "TrtLlmArgs"),
    ],
)
def test_the_library_judges_its_arguments_before_anything_loads(
    make: Any, library: Any, args: dict[str, Any], field: str, told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(args).check()
    assert caught.value.field == field
    assert told in str(caught.value)
    assert library.calls == []


def test_a_prompt_beyond_a_chunk_is_refused_in_the_library_s_words(make: Any) -> None:
    backend = make({"max_num_tokens": 8})
    backend.load()
    long = replace(request(), prompt_token_ids=tuple(range(5, 14)))
    with pytest.raises(GenerationError, match=r"prompt length \(9\) should not exceed max_num_tokens \(8\)"):
        run(backend, long)
    assert run(backend)[0].output_tokens == 4


def test_another_version_of_the_library_is_refused(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tensorrt_llm-1.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: 1.1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"needs TensorRT-LLM 1\.2, 1\.1\.0 is installed"):
        make().check()


def test_a_library_that_cannot_be_imported_is_one_error_with_the_command(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make()
    (tmp_path / "tensorrt_llm").mkdir()
    (tmp_path / "tensorrt_llm" / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    ours = ("llem_ray.backends.tensorrt_llm.engine", "llem_ray.backends.tensorrt_llm.preparing")
    for name in [name for name in sys.modules if name in ours or name.partition(".")[0] == "tensorrt_llm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(PluginError, match=r"cannot be imported: libcuda\.so\.1") as caught:
        backend.check()
    assert install_command("tensorrt-llm") in str(caught.value.hint)


def test_rotary_settings_that_transformers_4_overlooks_are_refused(library: Any) -> None:
    require_rotary = importlib.import_module("llem_ray.backends.tensorrt_llm.preparing").require_rotary
    require_rotary(SimpleNamespace(rope_parameters={"rope_theta": 5e5}))
    require_rotary(SimpleNamespace(rope_theta=5e5, rope_parameters={"rope_theta": 5e5}))
    with pytest.raises(ConfigError, match="overlooks"):
        require_rotary(SimpleNamespace(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}))
    with pytest.raises(ConfigError, match="overlooks"):
        require_rotary(SimpleNamespace(rope_theta=5e5, rope_scaling=None, rope_parameters={"rope_type": "llama3"}))
