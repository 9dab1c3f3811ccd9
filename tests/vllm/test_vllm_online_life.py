"""vLLM's own process behind AsyncLLM: killed, stopped, unable to load. Each is one typed error, and nothing stays."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm_models import SMALL, children, config_of, requests_of, serve, tokens_of

from llem_ray.backends.vllm.backend import VllmBackend
from llem_ray.core.backend import LoadSchedule
from llem_ray.core.errors import EngineDied, HangError, LoadError
from llem_ray.core.spec import ModelSpec, SamplingSpec

WAIT_S = 60.0
ONE_AT_A_TIME = LoadSchedule(max_in_flight=1)


def test_silence_death_and_close(checkpoint: ModelSpec, adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    args = {**SMALL, "lora": {"path": str(adapter.folder)}}
    backend = VllmBackend(config_of(tmp_path, checkpoint, args, online=True))
    backend.load()
    assert tokens_of(serve(backend, requests_of(), ONE_AT_A_TIME)[1]) == adapter.tokens
    (rank,) = backend.identity()
    engine: Any = backend._engine
    engine._engine._step_timeout_s = 0.5
    monkeypatch.setattr("llem_ray.backends.vllm.online.RPC_S", 0.5)
    os.kill(rank.pid, signal.SIGSTOP)
    with pytest.raises(HangError, match=r"requests in flight and was silent"):
        serve(backend, requests_of(), ONE_AT_A_TIME)
    os.kill(rank.pid, signal.SIGCONT)
    engine._engine._step_timeout_s = WAIT_S
    assert tokens_of(serve(backend, requests_of(), ONE_AT_A_TIME)[1]) == adapter.tokens
    run = backend.run(requests_of(), SamplingSpec(), ONE_AT_A_TIME)
    next(run)
    os.kill(rank.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match="vLLM's engine process ended"):
        list(run)
    with pytest.raises(EngineDied):
        serve(backend, requests_of(), ONE_AT_A_TIME)
    backend.close()
    assert children() == before


def test_a_process_that_is_killed_while_it_loads(tmp_path: Path) -> None:
    before = children()
    backend = VllmBackend(config_of(tmp_path, ModelSpec(config="llama-tiny"), online=True))
    backend.check()

    def kill() -> None:
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            for process in psutil.Process().children():
                if str(process.pid) not in known and "spawn_main" in " ".join(process.cmdline()):
                    process.kill()
                    return
            time.sleep(0.05)

    known = {name.partition(" ")[0] for name in before}
    killer = threading.Thread(target=kill)
    killer.start()
    # vLLM may look at its process before the kernel tells how it ended, and then names no signal.
    with pytest.raises(
        (EngineDied, LoadError), match=r"killed by signal 9 while it loaded 'llama-tiny'|Failed core proc\(s\): \{\}"
    ):
        backend.load()
    killer.join()
    backend.close()
    assert children() == before


def test_what_its_process_cannot_load_is_a_load_error(tmp_path: Path, checkpoint: ModelSpec) -> None:
    before = children()
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(str(checkpoint.id)).iterdir():
        if file.is_file():
            whole = file.read_bytes()
            (broken / file.name).write_bytes(whole[: len(whole) // 2] if file.suffix == ".safetensors" else whole)
    backend = VllmBackend(config_of(tmp_path, ModelSpec(id="broken"), online=True))
    with pytest.raises(LoadError, match="Engine core initialization failed") as caught:
        backend.load()
    assert "standard error" in str(caught.value.hint)
    backend.close()
    assert children() == before
