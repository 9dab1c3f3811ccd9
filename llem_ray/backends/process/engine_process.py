"""The parent's side of one engine process: start, handshake, calls with deadlines, and an end that leaves nothing behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import llem_ray
from llem_ray.backends.process.leftovers import MARK, SegmentLog, find_processes, kill_processes
from llem_ray.backends.process.wire import (
    PROTOCOL_VERSION,
    Channel,
    ErrorReport,
    PeerGone,
    ProtocolError,
    restore_error,
    unpack,
)
from llem_ray.core.errors import ConfigError, EngineDied, HangError, PluginError

_NOT_INHERITED: Final = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONEXECUTABLE", "VIRTUAL_ENV")
"""They speak of our interpreter, not of the engine's."""
_LOG_TAIL_BYTES: Final = 1500
_SOCKET_PATH_BYTES: Final = 100
_CREDENTIALS: Final = struct.Struct("3i")


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadlines:
    """Longest waits for an engine process, in s. They are the last resort: a run's own deadlines are shorter."""

    start_s: float = 120.0
    """Until the interpreter runs and says hello."""
    check_s: float = 600.0
    """Importing the engine's plug-in, and checking arguments."""
    load_s: float = 6 * 3600.0
    """Loading the model."""
    call_s: float = 600.0
    """Any other call, and taking a message."""
    silence_s: float = 6 * 3600.0
    """Between two messages of a run; steps that take longer than 0.1 s have one each."""
    close_s: float = 12.0
    """Unloading the model and ending by itself."""
    terminate_s: float = 4.0
    """Ending after SIGTERM."""
    kill_s: float = 4.0
    """Disappearing after SIGKILL."""


class RemoteError(Exception):
    """An exception of the engine's process that is none of ours; its traceback is in the notes."""


class EngineProcess:
    """A child process that serves one engine.

    It has its own session and process group, the environment of this process less what speaks of this interpreter, and its
    output in ``log``. It ends with this process, however this process ends.

    Args:
        command: Program and arguments that start a Python interpreter.
        log: File that takes stdout and stderr; its folder is made.
        deadlines: Longest waits.

    Raises:
        ConfigError: The command cannot be executed.
        PluginError: It does not speak our protocol, or is another release of llem-ray.
        EngineDied: It ended before it said hello.
        HangError: It never did.
    """

    def __init__(self, command: Sequence[str], log: Path, deadlines: Deadlines) -> None:
        self.log = log
        self._deadlines = deadlines
        self._calls = itertools.count(1)
        self._segments = SegmentLog()
        self._folder = _make_folder()
        self._mark = f"{MARK}={secrets.token_hex(8)}"
        self._channel: Channel | None = None
        self._connections: list[socket.socket] = []
        self._doing = "start"
        self._following = threading.Lock()
        began_s = time.monotonic()
        try:
            self._process, self._pidfd, self._waiter = self._start(command)
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise ConfigError(
                f"the engine's interpreter cannot be executed: {error.strerror}", field="engine.python", found=command[0]
            ) from error
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self._finalizer = weakref.finalize(
            self, _abandon, self._process.pid, self._mark, self._folder, self._pidfd, self._connections
        )
        try:
            self._channel = self._accept()
            self.python_version = self._greet()
            self.start_s = time.monotonic() - began_s
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Process id of the command, and id of its process group."""
        return self._process.pid

    def ask(self, kind: str, body: Any, timeout_s: float | None, doing: str) -> Any:
        """Call and wait for the answer.

        Args:
            kind: Which call.
            body: Its arguments.
            timeout_s: Deadline, or None.
            doing: What it is, for messages ("load").

        Raises:
            LlemRayError: What the engine raised.
            RemoteError: The engine raised something else.
            EngineDied: It ended, or sent garbage.
            HangError: It did not answer in time.
        """
        for _, answer in self.stream(kind, body, timeout_s, doing):
            raise self.reject(f"an unexpected message during {doing}: {answer!r:.80}")
        return self._answer

    def follow(self) -> None:
        """Have the engine follow rank 0 until that closes, or until another thread calls ``close``. Raises as ``ask``."""
        with self._following:
            self.ask("follow", None, None, "follow")

    def stream(self, kind: str, body: Any, silence_s: float | None, doing: str) -> Generator[tuple[str, Any]]:
        """Call and yield what arrives until the answer; a caller that stops early gives the call up. Raises as ``ask``."""
        call = next(self._calls)
        self._doing, self._answer = doing, None
        self._send(call, kind, body)
        open_ended = True
        try:
            while True:
                number, what, content = self._receive(silence_s)
                if number != call:
                    if number > call:
                        raise self.reject(f"an answer to a call that was never made ({number})")
                    continue  # of a call that was given up
                if what == "done":
                    open_ended, self._answer = False, content
                    return
                if what == "error":
                    open_ended = False
                    raise self._restored(content)
                yield what, content
        finally:
            if open_ended and self._channel is not None:
                with contextlib.suppress(EngineDied, HangError):  # the next call says so
                    self._send(call, "cancel", None)

    def observe(self) -> None:
        """Note the shared-memory segments that the engine has now."""
        self._segments.observe(find_processes(self.pid, self._mark))

    def close(self) -> tuple[str, ...]:
        """Ask it to unload and end, then SIGTERM, then SIGKILL to all that is left; returns removed segments. Never raises."""
        if not self._finalizer.alive:
            return ()
        if self._channel is not None:
            deadline_s = time.monotonic() + self._deadlines.close_s
            if not self._end_following():
                return self.kill()
            self.observe()
            with contextlib.suppress(Exception):
                self.ask("close", None, self._deadlines.close_s, "close")
            if self._channel is not None:
                self._exited(max(0.0, deadline_s - time.monotonic()))
        if not self._exited(0.0):
            kill_processes(self.pid, self._mark, signal.SIGTERM, self._deadlines.terminate_s)
        return self.kill()

    def _end_following(self) -> bool:
        """Have ``follow``, in another thread, come back; False where it does not."""
        if self._following.locked() and self._channel is not None:
            with contextlib.suppress(EngineDied, HangError):
                self._send(0, "cancel", None)
        ended = self._following.acquire(timeout=self._deadlines.close_s)
        if ended:
            self._following.release()
        return ended

    def kill(self) -> tuple[str, ...]:
        """End it and all it started at once; returns removed segments."""
        if self._finalizer.detach() is None:
            return ()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._segments.observe({self.pid} | find_processes(self.pid, self._mark))
        kill_processes(self.pid, self._mark, signal.SIGKILL, self._deadlines.kill_s)
        if self._exited(self._deadlines.kill_s):
            self._waiter.join()
        os.close(self._pidfd)
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            if self.log.stat().st_size == 0:
                self.log.unlink()
        return self._segments.remove_leftovers()

    def _start(self, command: Sequence[str]) -> tuple[subprocess.Popen[bytes], int, threading.Thread]:
        """Start it from a thread that lives as long as it does: the kernel's death signal goes by the thread that forked."""
        (self._folder / "llem_ray").symlink_to(Path(llem_ray.__file__).parent)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = self._folder / "socket"
        try:
            self._listener.bind(str(path))
            self._listener.listen(1)
            self.log.parent.mkdir(parents=True, exist_ok=True)
            inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
            name, _, value = self._mark.partition("=")
            own = {"PYTHONPATH": str(self._folder), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", name: value}
            arguments = ["-m", "llem_ray.backends.process.child", "--socket", str(path), "--parent", str(os.getpid())]
            started: Future[tuple[subprocess.Popen[bytes], int]] = Future()
            with self.log.open("ab") as log:
                waiter = threading.Thread(
                    target=_live,
                    args=([*command, *arguments], inherited | own, log, started),
                    name="llem-ray-engine",
                    daemon=True,
                )
                waiter.start()
                return *started.result(), waiter
        except BaseException:
            self._listener.close()
            raise

    def _accept(self) -> Channel:
        arrival = select.poll()
        arrival.register(self._listener, select.POLLIN)
        arrival.register(self._pidfd, select.POLLIN)
        with self._listener:
            ready = dict(arrival.poll(1000 * self._deadlines.start_s))
            if not ready:
                raise self._hang(self._deadlines.start_s)
            if self._listener.fileno() not in ready:
                raise self._died()
            connection, _ = self._listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] not in (os.getuid(), 0):
            connection.close()
            raise PluginError("another user answered on the engine's socket")
        self._connections.append(connection)
        return Channel(connection, self._pidfd)

    def _greet(self) -> str:
        number, kind, body = self._receive(self._deadlines.start_s)
        if (number, kind) != (0, "hello") or not isinstance(body, Mapping):
            raise self.reject(f"no hello, but {kind!r}")
        for field, told, ours in (
            ("protocol", body.get("protocol"), PROTOCOL_VERSION),
            ("llem_ray", body.get("llem_ray"), llem_ray.__version__),
        ):
            if told != ours:
                raise PluginError(
                    f"the engine's process has {field} {told}, this process has {ours}",
                    "engine.python must be an interpreter, or a command that passes PYTHONPATH on to one",
                )
        return str(body.get("python"))

    def _send(self, call: int, kind: str, body: Any) -> None:
        channel = self._channel  # ``kill`` of another thread takes it away
        if channel is None:
            raise self._died()
        try:
            channel.send(call, kind, body, self._deadlines.call_s)
        except PeerGone:
            pass  # what it said before it ended is read first
        except TimeoutError as error:
            raise self._hang(self._deadlines.call_s) from error

    def _receive(self, timeout_s: float | None) -> tuple[int, str, Any]:
        channel = self._channel
        if channel is None:
            raise self._died()
        try:
            return channel.receive(timeout_s)
        except PeerGone as error:
            raise self._died() from error
        except TimeoutError as error:
            raise self._hang(timeout_s or 0.0) from error
        except ProtocolError as error:
            raise self.reject(str(error)) from error

    def _restored(self, content: Any) -> Exception:
        try:
            report = unpack(ErrorReport, content)
            error: Exception | None = restore_error(report)
        except ProtocolError as problem:
            return self.reject(str(problem))
        if error is None:
            error = RemoteError(": ".join(str(item) for item in report.args))
        error.add_note(f"In the engine's process:\n{report.traceback}")
        if self._doing == "load" and (words := self._last_words()) is not None:
            error.add_note(words)  # engines start processes of their own, which write down there why they failed
        return error

    def reject(self, what: str) -> EngineDied:
        """End the process, which sent something it may not; returns the error to raise."""
        self.kill()
        return EngineDied(f"the engine's process was ended during {self._doing}: {what}", self._last_words())

    def _hang(self, waited_s: float) -> HangError:
        self.kill()
        return HangError(f"the engine's process did not answer during {self._doing} within {waited_s:g} s", self._last_words())

    def _died(self) -> EngineDied:
        self._exited(self._deadlines.kill_s)  # it closed its socket: it is ending
        self.kill()
        code = self._process.returncode
        how = "was ended" if code is None else f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
        return EngineDied(f"the engine's process {how} during {self._doing}", self._last_words())

    def _exited(self, timeout_s: float) -> bool:
        if self._process.returncode is not None:
            return True
        ending = select.poll()
        ending.register(self._pidfd, select.POLLIN)
        return bool(ending.poll(1000 * timeout_s))

    def _last_words(self) -> str | None:
        tail = read_tail(self.log)
        return f"the end of {self.log}:\n{tail}" if tail else None


def read_tail(path: Path) -> str:
    """The end of a log file, whole lines; empty where there is none."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LOG_TAIL_BYTES))
        text = file.read().decode(errors="replace")
        return (text if size <= _LOG_TAIL_BYTES else text.partition("\n")[2] or text).strip()
    return ""


def _live(
    command: list[str], environment: dict[str, str], log: Any, started: Future[tuple[subprocess.Popen[bytes], int]]
) -> None:
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        pidfd = os.pidfd_open(process.pid)  # before anybody reaps it
    except BaseException as error:  # noqa: BLE001 - whoever waits for the start gets it
        started.set_exception(error)
        return
    started.set_result((process, pidfd))
    process.wait()


def _make_folder() -> Path:
    """A private folder with a path short enough for a Unix socket."""
    folder = tempfile.mkdtemp(prefix="llem-ray-engine-")
    if len(os.fsencode(folder)) > _SOCKET_PATH_BYTES:
        Path(folder).rmdir()
        folder = tempfile.mkdtemp(prefix="llem-ray-engine-", dir="/tmp")
    return Path(folder)


def _abandon(group: int, mark: str, folder: Path, pidfd: int, connections: list[socket.socket]) -> None:
    """What is left to do when nobody closed the engine: at the end of the interpreter, or when it was forgotten."""
    kill_processes(group, mark, signal.SIGKILL, 2.0)
    shutil.rmtree(folder, ignore_errors=True)
    for connection in connections:
        connection.close()
    with contextlib.suppress(OSError):
        os.close(pidfd)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
