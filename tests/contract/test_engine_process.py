"""An engine in a process of its own: everything that can go wrong with it is one typed error, and nothing of it stays."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llem_ray.backends.process.engine_process import Deadlines
from llem_ray.backends.process.leftovers import SHARED_MEMORY
from llem_ray.backends.process.proxy import ProcessBackend
from llem_ray.core.backend import BackendConfig, Request, RequestRecord, StepEvent
from llem_ray.core.errors import ConfigError, EngineDied, GenerationError, HangError, LlemRayError, LoadError, PluginError
from llem_ray.core.plugins import install_command
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec

FAKE = "llem_ray.testing.backend:FakeBackend"
REQUEST = Request(request_id="r0", prompt_token_ids=(5, 6), max_new_tokens=3)
WAIT_S = 20.0

ENGINES = '''
import mmap, os, stat, subprocess, sys, time
from pathlib import Path
from llem_ray.core.errors import GenerationError
from llem_ray.testing.backend import FakeBackend

def to_parent(data):
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.write(int(name), data)
        except OSError:
            pass

class DiesAtLoad(FakeBackend):
    def load(self):
        print("the weights are broken")
        os._exit(9)

class DiesAtClose(FakeBackend):
    def close(self):
        os._exit(5)

class HangsAtLoad(FakeBackend):
    def load(self):
        time.sleep(600)

class HangsAtClose(FakeBackend):
    def close(self):
        time.sleep(600)

class RaisesAtLoad(FakeBackend):
    def load(self):
        print("the core of the engine says why")
        raise ZeroDivisionError("of the engine's own")

class WritesGarbage(FakeBackend):
    def encode(self, texts):
        to_parent(b"Hello from a library that found a socket")
        return super().encode(texts)

class WritesMessages(FakeBackend):
    def encode(self, texts):
        data = b"[1,2]"
        to_parent(b"LLEM" + len(data).to_bytes(4, "big") + data)
        return super().encode(texts)

class FollowsBriefly(FakeBackend):
    def follow(self):
        pass

class FailsToFollow(FakeBackend):
    def follow(self):
        raise GenerationError("rank 0 is gone")

class FollowsUntilClosed(FakeBackend):
    def follow(self):
        self._closed.wait()

class FollowsForGood(FakeBackend):
    def follow(self):
        time.sleep(600)

class AnswersWrongly(FakeBackend):
    def encode(self, texts):
        return ["not ids"]

class Chatty(FakeBackend):
    def run(self, requests, sampling, schedule=None):
        for event in super().run(requests, sampling, schedule):
            print("x" * 2_000_000)
            os.write(2, b"y" * 2_000_000)
            yield event

class Sees(FakeBackend):
    def encode(self, texts):
        seen = os.environ.get(texts[0])
        return [[0 if seen is None else 1 + len(seen)], [os.getpgrp()], [os.getsid(0)]]

class LeavesThings(FakeBackend):
    """Starts a child in its group and one that left it, and makes a segment; tells their ids by encode."""
    def load(self):
        sleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
        self.children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
        path = Path("/dev/shm", f"llem-test-{os.getpid()}")
        path.write_bytes(bytes(4096))
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 4096)
        return super().load()
    def encode(self, texts):
        return [[os.getpid()], *([child.pid] for child in self.children)][:len(texts)]
'''

LAUNCHER = """
import runpy, sys
sys.path.insert(0, {folder!r})
sys.argv = ["child", *sys.argv[3:]]
runpy.run_module("llem_ray.backends.process.child", run_name="__main__", alter_sys=True)
"""

SPEAKER = """
import json, os, socket, struct, sys, time
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[sys.argv.index("--socket") + 1])
def say(message):
    payload = json.dumps(message).encode()
    sock.sendall(struct.pack(">4sI", b"LLEM", len(payload)) + payload)
{body}
time.sleep(600)
"""

Make = Callable[..., ProcessBackend]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes a backend; ``target`` without a colon is a class of ENGINES."""
    (tmp_path / "odd_engines.py").write_text(ENGINES)
    (tmp_path / "launcher.py").write_text(LAUNCHER.format(folder=str(tmp_path)))
    made = []

    def build(target: str = FAKE, command: str | None = None, deadlines: Deadlines | None = None, **args: Any) -> ProcessBackend:
        config = BackendConfig(
            model=ModelSpec(config="llama-tiny"),
            engine=EngineSpec(backend="fake", device="cpu", engine_args={"prefill_ms": 0, "decode_ms": 0} | args),
            device="cpu",
            host="host-1",
            base_dir=str(tmp_path),
            cache_dir=str(tmp_path / "cache"),
        )
        target = target if ":" in target else f"odd_engines:{target}"
        backend = ProcessBackend(
            config, target, f"{sys.executable} launcher.py" if command is None else command, tmp_path / "engine.log", deadlines
        )
        made.append(backend)
        return backend

    before = Path.cwd()
    os.chdir(tmp_path)
    yield build
    for backend in made:
        backend.close()
    os.chdir(before)


@pytest.fixture
def bare(tmp_path: Path) -> str:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    return str(tmp_path / "bare" / "bin" / "python")


def find_python(minor: int) -> str | None:
    """A working interpreter of that minor version, on PATH or installed by pyenv."""
    name = f"python3.{minor}"
    paths = [shutil.which(name), *Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/{name}")]
    works = (str(p) for p in paths if p and not subprocess.run([p, "-c", ""], capture_output=True, check=False).returncode)
    return next(works, None)


def gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def eventually(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return condition()


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def outputs(backend: ProcessBackend) -> list[int]:
    return [e.output_tokens for e in backend.run([REQUEST], SamplingSpec()) if isinstance(e, RequestRecord)]


class TestInterpreter:
    @pytest.mark.parametrize("command", ["/opt/none/bin/python", "none/bin/python", "none-such-python", "~/none/python -X dev"])
    def test_a_missing_one_is_named(self, make: Make, command: str) -> None:
        with pytest.raises(ConfigError, match=r"no such (interpreter|command)") as caught:
            make(command=command).check()
        assert caught.value.field == "engine.python"
        assert Path(str(caught.value.found)).name.startswith(Path(command.split(maxsplit=1)[0]).name)

    @pytest.mark.parametrize(
        ("command", "says"), [("", "must not be empty"), ("  ", "must not be empty"), ("a 'b", "command line")]
    )
    def test_what_is_no_command_is_refused(self, make: Make, command: str, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            make(command=command).check()

    def test_one_that_may_not_be_executed_or_is_no_program(self, make: Make, tmp_path: Path) -> None:
        (tmp_path / "program").write_bytes(b"\x7fELF nonsense")
        with pytest.raises(ConfigError, match="may not be executed"):
            make(command="./program").check()
        (tmp_path / "program").chmod(0o755)
        with pytest.raises(ConfigError, match="cannot be executed"):
            make(command="./program").check()

    def test_one_that_is_no_python(self, make: Make) -> None:
        with pytest.raises(EngineDied, match=r"ended with code 0 during start"):
            make(command="true").check()

    def test_a_path_with_spaces_and_a_relative_path_work(self, make: Make, bare: str, tmp_path: Path) -> None:
        shutil.move(tmp_path / "bare", tmp_path / "my python")
        backend = make(command="my python/bin/python")
        backend.check()
        assert backend.load().notes["interpreter"] == "my python/bin/python"

    @pytest.mark.parametrize("minor", [12, 13])
    def test_another_minor_version_works(self, make: Make, minor: int) -> None:
        found = find_python(minor)
        if found is None:
            pytest.skip(f"no Python 3.{minor} here")
        backend = make(command=found)
        assert backend.load().notes["python"].startswith(f"3.{minor}.")
        assert outputs(backend) == [3]

    def test_an_old_one_says_what_is_needed(self, make: Make) -> None:
        found = find_python(10) or find_python(9) or find_python(8)
        if found is None:
            pytest.skip("no Python older than 3.11 here")
        with pytest.raises(EngineDied, match=r"need Python 3\.11 or newer"):
            make(command=found).check()

    def test_an_engine_that_is_missing_there_names_the_pip_of_that_interpreter(self, make: Make, bare: str) -> None:
        backend = make("llem_ray.backends.transformers.backend:TransformersBackend", bare)
        with pytest.raises(PluginError, match="not installed") as caught:
            backend.check()
        assert caught.value.hint == f"{bare} -m {install_command('transformers')}"
        assert bare in caught.value.message

    def test_a_plugin_that_is_missing_there(self, make: Make) -> None:
        with pytest.raises(PluginError, match="cannot be imported: No module named 'nothing'"):
            make("nothing.backend:Backend").check()
        with pytest.raises(PluginError, match="cannot be imported"):
            make("NoSuchClass").check()


class TestHandshake:
    @pytest.mark.parametrize(
        ("body", "error", "says"),
        [
            ('say([0, "hello", {"protocol": 9, "llem_ray": "9", "python": "3"}])', PluginError, "protocol 9, this process has 3"),
            ('say([0, "hello", {"protocol": 3, "llem_ray": "9", "python": "3"}])', PluginError, "llem_ray 9, this process has"),
            ('say([0, "hello", None])', EngineDied, "no hello"),
            ('say([0, "done", {}])', EngineDied, "no hello"),
            ('say({"a": 1})', EngineDied, "garbage on the socket"),
            ('sock.sendall(b"GET / HTTP/1.1")', EngineDied, "garbage on the socket: b'GET"),
            ('sock.sendall(b"LLEM" + bytes([255] * 4))', EngineDied, "garbage on the socket"),
            ('sock.sendall(b"LLEM" + bytes([0, 0, 0, 3]) + b"{{{")', EngineDied, "garbage on the socket"),
            ('sock.sendall(b"LLEM")\nsock.close()\nos._exit(3)', EngineDied, "ended with code 3 during start"),
            ("os.kill(os.getpid(), 9)", EngineDied, "killed by SIGKILL during start"),
            ("", HangError, "did not answer during start within 0.5 s"),
        ],
    )
    def test_who_answers_wrongly_is_refused(
        self, make: Make, tmp_path: Path, body: str, error: type[LlemRayError], says: str
    ) -> None:
        (tmp_path / "speaker.py").write_text(SPEAKER.format(body=body))
        deadlines = Deadlines(start_s=0.5 if error is HangError else WAIT_S)
        backend = make(command=f"{sys.executable} speaker.py", deadlines=deadlines)
        open_before = descriptors()
        with pytest.raises(error, match=says):
            backend.check()
        assert descriptors() == open_before

    def test_who_never_connects_hangs(self, make: Make) -> None:
        with pytest.raises(HangError, match="during start"):
            make(command="sh -c 'sleep 600'", deadlines=Deadlines(start_s=0.3)).check()


class TestFailures:
    def test_death_at_load_tells_the_end_of_the_log(self, make: Make) -> None:
        backend = make("DiesAtLoad")
        backend.check()
        with pytest.raises(EngineDied, match="ended with code 9 during load") as caught:
            backend.load()
        assert "the weights are broken" in str(caught.value.hint)
        assert "engine.log" in str(caught.value.hint)

    def test_death_during_generation(self, make: Make) -> None:
        backend = make(fail={"kind": "die"})
        backend.load()
        with pytest.raises(EngineDied, match="ended with code 17 during generation"):
            outputs(backend)
        with pytest.raises(EngineDied, match="gone"):
            outputs(backend)
        backend.reset()
        backend.close()
        with pytest.raises(GenerationError, match="not loaded"):
            outputs(backend)

    def test_slow_steps_before_a_death_arrive(self, make: Make) -> None:
        backend = make(prefill_ms=0, decode_ms=110, fail={"kind": "die"})
        backend.load()
        stream = backend.run([REQUEST], SamplingSpec())
        assert [type(next(stream)) for _ in range(2)] == [StepEvent, StepEvent]
        with pytest.raises(EngineDied):
            next(stream)

    def test_steps_before_an_error_arrive(self, make: Make) -> None:
        backend = make(fail={"kind": "generation"})
        backend.load()
        stream = backend.run([REQUEST], SamplingSpec())
        assert [type(next(stream)) for _ in range(2)] == [StepEvent, StepEvent]
        with pytest.raises(GenerationError, match="told to fail"):
            next(stream)

    def test_death_at_close_is_quiet(self, make: Make) -> None:
        backend = make("DiesAtClose")
        backend.load()
        (rank,) = backend.identity()
        backend.close()
        assert gone(rank.pid)

    def test_hang_at_load_and_in_generation(self, make: Make) -> None:
        with pytest.raises(HangError, match=r"during load within 0\.3 s"):
            make("HangsAtLoad", deadlines=Deadlines(load_s=0.3)).load()
        backend = make(fail={"kind": "hang"}, deadlines=Deadlines(silence_s=0.3))
        backend.load()
        (rank,) = backend.identity()
        with pytest.raises(HangError, match=r"during generation within 0\.3 s"):
            outputs(backend)
        assert gone(rank.pid)

    def test_hang_at_close_is_bounded(self, make: Make) -> None:
        backend = make("HangsAtClose", deadlines=Deadlines(close_s=0.3, terminate_s=5))
        backend.load()
        (rank,) = backend.identity()
        backend.close()
        assert gone(rank.pid)

    @pytest.mark.parametrize(
        ("engine", "says"),
        [
            ("WritesGarbage", "garbage on the socket"),
            ("WritesMessages", "garbage on the socket"),
            ("AnswersWrongly", "token ids"),
        ],
    )
    def test_garbage_ends_the_engine(self, make: Make, engine: str, says: str) -> None:
        backend = make(engine)
        backend.load()
        (rank,) = backend.identity()
        with pytest.raises(EngineDied, match=says):
            backend.encode(["a"])
        assert gone(rank.pid)

    def test_an_error_of_its_own_carries_its_traceback(self, make: Make) -> None:
        with pytest.raises(LoadError, match="ZeroDivisionError: of the engine's own") as caught:
            make("RaisesAtLoad").load()
        assert caught.value.__cause__ is not None
        assert "odd_engines.py" in caught.value.__cause__.__notes__[0]

    def test_a_load_that_fails_tells_the_end_of_the_log(self, make: Make) -> None:
        """Engines start processes of their own, which write down why there."""
        with pytest.raises(LoadError) as caught:
            make("RaisesAtLoad").load()
        told = "".join(traceback.format_exception(caught.value))
        assert "the core of the engine says why" in told
        assert ".log:" in told

    @pytest.mark.parametrize("kind", ["out_of_memory", "nan", "generation"])
    def test_errors_of_a_trial_leave_it_usable(self, make: Make, kind: str) -> None:
        backend = make(fail={"kind": kind, "at_run": 1})
        backend.load()
        with pytest.raises(LlemRayError, match="was told to") as caught:
            outputs(backend)
        assert type(caught.value).__name__ in ("DeviceMemoryError", "NumericsError", "GenerationError")
        assert outputs(backend) == [3]

    def test_a_talkative_engine_does_not_block(self, make: Make, tmp_path: Path) -> None:
        backend = make("Chatty")
        backend.load()
        assert outputs(backend) == [3]
        backend.close()
        assert (tmp_path / "engine.log").stat().st_size > 8_000_000

    def test_large_requests_and_given_up_ones(self, make: Make) -> None:
        backend = make(context_tokens=10**6)
        backend.load()
        long = [Request(request_id=str(n), prompt_token_ids=tuple(range(3, 900)) * 100, max_new_tokens=2000) for n in range(8)]
        stream = backend.run(long, SamplingSpec())
        next(stream)
        stream.close()
        assert outputs(backend) == [3]


class TestFollow:
    def following(self, backend: ProcessBackend) -> tuple[threading.Thread, list[BaseException], int]:
        backend.load()
        pid, errors = backend.identity()[0].pid, []

        def work() -> None:
            try:
                backend.follow()
            except LlemRayError as error:
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread, errors, pid

    def test_close_of_another_thread_ends_it(self, make: Make) -> None:
        backend = make("FollowsUntilClosed")
        thread, errors, pid = self.following(backend)
        assert backend._process is not None
        assert eventually(backend._process._following.locked)
        backend.close()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert errors == []
        assert eventually(lambda: gone(pid))

    def test_one_that_does_not_come_back_is_killed(self, make: Make) -> None:
        backend = make("FollowsForGood", deadlines=Deadlines(close_s=0.3))
        thread, errors, pid = self.following(backend)
        assert backend._process is not None
        assert eventually(backend._process._following.locked)
        backend.close()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert errors == []
        assert eventually(lambda: gone(pid))

    def test_its_end_leaves_the_engine_usable(self, make: Make) -> None:
        backend = make("FollowsBriefly")
        backend.load()
        for _ in range(2):
            backend.follow()
            assert outputs(backend) == [3]

    def test_its_error_arrives(self, make: Make) -> None:
        backend = make("FailsToFollow")
        backend.load()
        with pytest.raises(GenerationError, match="rank 0 is gone"):
            backend.follow()
        assert outputs(backend) == [3]

    def test_death_is_told(self, make: Make) -> None:
        backend = make("FollowsUntilClosed")
        thread, errors, pid = self.following(backend)
        os.kill(pid, signal.SIGKILL)
        thread.join(WAIT_S)
        assert [type(error) for error in errors] == [EngineDied]
        assert "SIGKILL" in str(errors[0])


class TestLeftovers:
    def test_environment_and_group_are_its_own(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
        monkeypatch.setenv("PYTHONHOME", "/nowhere")
        backend = make("Sees")
        backend.load()
        (rank,) = backend.identity()
        assert backend.encode(["CUDA_VISIBLE_DEVICES", "", ""]) == [[1 + len("1,3")], [rank.pid], [rank.pid]]
        assert backend.encode(["PYTHONHOME", "", ""])[0] == [0]
        assert rank.pid != os.getpgrp()

    @pytest.mark.parametrize("how", ["close", "killed"])
    def test_nothing_stays(self, make: Make, how: str, tmp_path: Path) -> None:
        open_before, threads_before = descriptors(), threading.active_count()
        backend = make("LeavesThings")
        backend.load()
        pids = [pid for (pid,) in backend.encode(["a", "b", "c"])]
        segment = SHARED_MEMORY / f"llem-test-{pids[0]}"
        assert segment.exists()
        if how == "killed":
            os.kill(pids[0], signal.SIGKILL)
            with pytest.raises(EngineDied, match="killed by SIGKILL during encode"):
                backend.encode(["a"])
        else:
            backend.close()
        assert all(map(gone, pids))
        assert not segment.exists()
        assert descriptors() == open_before
        assert threading.active_count() == threads_before

    def test_segments_of_others_and_mapped_ones_stay(self, make: Make) -> None:
        old, new = SHARED_MEMORY / f"llem-test-old-{os.getpid()}", SHARED_MEMORY / f"llem-test-new-{os.getpid()}"
        old.write_bytes(b"old")
        backend = make("LeavesThings")
        backend.load()
        new.write_bytes(b"new")
        ((pid,),) = backend.encode(["a"])
        segment = SHARED_MEMORY / f"llem-test-{pid}"
        try:
            with segment.open("r+b") as file:
                mapped = mmap.mmap(file.fileno(), 4096)
            backend.close()
            assert segment.exists()
            assert (old.read_bytes(), new.read_bytes()) == (b"old", b"new")
            mapped.close()
        finally:
            for path in (old, new, segment):
                path.unlink(missing_ok=True)

    def test_killing_the_parent_ends_everything(self, make: Make, tmp_path: Path) -> None:
        script = f"""
import sys, time
from llem_ray.backends.process.proxy import ProcessBackend
from llem_ray.core.backend import BackendConfig
from llem_ray.core.spec import EngineSpec, ModelSpec
config = BackendConfig(model=ModelSpec(config="x"), engine=EngineSpec(backend="fake"), device="cpu", host="h",
                       base_dir={str(tmp_path)!r}, cache_dir={str(tmp_path)!r})
backend = ProcessBackend(config, "odd_engines:LeavesThings", "{sys.executable} launcher.py")
backend.load()
print(*(pid for (pid,) in backend.encode(["a", "b", "c"])), backend._process._folder, flush=True)
time.sleep(600)
"""
        parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        *pids, path = parent.stdout.readline().split()
        engine, in_group, elsewhere = map(int, pids)
        folder = Path(path)
        assert folder.is_dir()
        parent.kill()
        parent.wait()
        parent.stdout.close()
        segment = SHARED_MEMORY / f"llem-test-{engine}"
        assert eventually(lambda: all(map(gone, (engine, in_group, elsewhere))))
        assert eventually(lambda: not segment.exists() and not folder.exists())

    def test_it_outlives_the_thread_that_started_it(self, make: Make) -> None:
        backend = make()
        thread = threading.Thread(target=backend.load)
        thread.start()
        thread.join()
        time.sleep(0.1)
        assert outputs(backend) == [3]

    def test_a_forgotten_one_ends(self, make: Make, tmp_path: Path) -> None:
        backend = make()
        backend.load()
        (rank,) = backend.identity()
        backend._process = None
        assert eventually(lambda: gone(rank.pid))

    def test_logs_are_kept_within_bounds(self, make: Make, tmp_path: Path) -> None:
        logs = tmp_path / "cache" / "engine-logs"
        logs.mkdir(parents=True)
        for number in range(60):
            (logs / f"2000{number:04d}.log").write_text("old")
        backend = make()
        backend._log = None
        assert Path(backend.load().notes["engine_log"]).parent == logs
        backend.close()
        assert len(list(logs.iterdir())) == 50
