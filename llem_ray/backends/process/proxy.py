"""An engine in a process of its own, behind the seam that every engine has."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from llem_ray.backends.process.engine_process import Deadlines, EngineProcess
from llem_ray.backends.process.wire import ProtocolError, pack, pack_flat, unpack, unpack_each, unpack_events
from llem_ray.core.backend import (
    BackendConfig,
    ChatMessage,
    LoadReport,
    LoadSchedule,
    ModelOutlook,
    Rank,
    Request,
    RequestRecord,
    StepEvent,
)
from llem_ray.core.errors import ConfigError, EngineDied, GenerationError, HangError, LlemRayError, LoadError
from llem_ray.core.plugins import EXTRAS, install_command
from llem_ray.core.spec import SamplingSpec

_LOGS_KEPT: Final = 50
_PIP: Final = "pip install "
_log_numbers: Final = itertools.count(1)


class ProcessBackend:
    """Serves an engine from a child process of another interpreter or command.

    The child gets this package by path and nothing else of this environment; times are those of this host's monotonic clock.
    It is started by ``check`` or ``load`` and ends with ``close``, with an error that leaves it unusable, or with this process.

    Args:
        config: Model, engine and device, as for any engine.
        target: The engine's factory as ``module:attribute``; it is imported by the child only.
        command: Path of an interpreter, relative to ``config.base_dir``, or a command line that ends in one.
        log: File that takes the engine's output; default: one of its own in ``config.cache_dir``.
        deadlines: Longest waits.
    """

    def __init__(
        self,
        config: BackendConfig,
        target: str,
        command: str,
        log: Path | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._config = config
        self._target = target
        self._command = command
        self._log = log
        self._deadlines = deadlines or Deadlines()
        self._process: EngineProcess | None = None
        self._versions: Mapping[str, str] = {}
        self._loaded = False
        self._encodes = False
        self._end: str | None = None

    def check(self) -> None:
        """Start the process and let the engine check its arguments there.

        Raises:
            ConfigError: The interpreter is not there, or the engine refused an argument.
            PluginError: The engine cannot run there; the hint names the interpreter.
            EngineDied: The process ended.
            HangError: It did not answer.
        """
        try:
            self._ask("check", None, self._deadlines.check_s, process=self._opened())
        except BaseException:
            self.close()
            raise

    def outlook(self) -> ModelOutlook | None:
        """What the engine tells before it is loaded; None where that is nothing.

        Raises:
            LoadError: It cannot read the model's config or tokenizer.
        """
        answer = self._ask("outlook", None, self._deadlines.check_s, process=self._opened())
        try:
            told = None if answer is None else unpack(ModelOutlook, answer)
        except ProtocolError as error:
            raise self._broken(error) from error
        self._encodes = told is not None
        return told

    def load(self) -> LoadReport:
        """Load the model in the process. The report's notes name interpreter, its version and the log."""
        process = self._opened()
        self._loaded = False
        try:
            report = self._unpacked(LoadReport, self._ask("load", None, self._deadlines.load_s, process=process))
        except (LlemRayError, MemoryError):
            raise
        except Exception as error:
            raise LoadError(f"{self._config.engine.backend} failed to load: {error}") from error
        process.observe()
        self._loaded = True
        notes = {"interpreter": self._command, "python": process.python_version, "engine_log": str(process.log)}
        notes |= {f"version_{name}": version for name, version in self._versions.items()}
        return replace(report, notes={**notes, **report.notes}, process_start_s=process.start_s)

    def identity(self) -> tuple[Rank, ...]:
        """The gang's workers; process ids are those of the engine."""
        answer = self._ask("identity", None, self._deadlines.call_s)
        try:
            return unpack_each(Rank, answer)
        except ProtocolError as error:
            raise self._broken(error) from error

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return self._ids("encode", list(texts))

    def encode_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        """Token ids of each chat by the model's own template."""
        return self._ids("encode_chats", [[list(message) for message in chat] for chat in chats])

    def _ids(self, call: str, texts: list[Any]) -> list[list[int]]:
        process = self._process if self._encodes else None
        answer = self._ask(call, texts, self._deadlines.call_s, LoadError, process)
        if (
            not isinstance(answer, list)
            or len(answer) != len(texts)
            or not all(isinstance(ids, list) and set(map(type, ids)) <= {int} for ids in answer)
        ):
            raise self._broken(ProtocolError("not lists of token ids"))
        return answer

    def run(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule | None = None
    ) -> Generator[StepEvent | RequestRecord]:
        """Serve the requests as one batch, or by the schedule; steps and records arrive some 0.1 s of them at a time.

        Raises:
            EngineDied: The process ended, or sent garbage. The hint is the end of its log.
            HangError: Nothing was heard for ``Deadlines.silence_s``.
        """
        process = self._serving(GenerationError)
        body = [[pack_flat(request) for request in requests], pack_flat(sampling), schedule and pack(schedule)]
        try:
            with contextlib.closing(process.stream("run", body, self._deadlines.silence_s, "generation")) as messages:
                for kind, content in messages:
                    if kind != "events":
                        raise ProtocolError(f"a message of kind {kind!r:.40} during generation")
                    yield from unpack_events(content)
        except ProtocolError as error:
            raise self._broken(error) from error
        except (EngineDied, HangError) as error:
            self._forget(error)
            raise

    def reset(self) -> None:
        """Forget cached prefixes; nothing to do when the process is gone."""
        if self._process is None or not self._loaded:
            return
        self._ask("reset", None, self._deadlines.call_s)
        if self._process is not None:
            self._process.observe()

    def follow(self) -> None:
        """See ``FollowerBackend.follow``. No deadline: it ends with rank 0, or when another thread calls ``close``."""
        process = self._serving(GenerationError)
        try:
            process.follow()
        except (EngineDied, HangError) as error:
            if self._process is process:
                self._forget(error)
                raise
            # closed meanwhile: there is nobody left to tell

    def close(self) -> None:
        """Unload, end the process and all it started, and remove what they left in shared memory. Bounded in time."""
        process, self._process = self._process, None
        self._loaded, self._encodes, self._end = False, False, None
        if process is not None:
            process.close()

    def _opened(self) -> EngineProcess:
        """The process with the engine opened in it, started where there is none."""
        if self._process is not None:
            return self._process
        self._end = None
        command = find_command(self._command, self._config.base_dir)
        process = EngineProcess(command, self._log or self._new_log(), self._deadlines)
        self._process = process
        try:
            opened = self._ask("open", [self._target, pack(self._config)], self._deadlines.check_s, process=process)
        except BaseException:
            self.close()
            raise
        versions = opened.get("versions") if isinstance(opened, dict) else None
        if not isinstance(versions, dict):
            raise self._broken(ProtocolError("an unexpected answer to open"))
        self._versions = {str(name): str(version) for name, version in versions.items()}
        return process

    def _serving(self, error: type[LlemRayError]) -> EngineProcess:
        if self._process is None or not self._loaded:
            if self._end is not None:
                raise EngineDied(f"the engine's process is gone: {self._end}")
            raise error(f"the {self._config.engine.backend} engine is not loaded")
        return self._process

    def _ask(
        self,
        kind: str,
        body: Any,
        timeout_s: float,
        unloaded: type[LlemRayError] = GenerationError,
        process: EngineProcess | None = None,
    ) -> Any:
        process = process or self._serving(unloaded)
        try:
            return process.ask(kind, body, timeout_s, kind)
        except (EngineDied, HangError) as error:
            self._forget(error)
            raise
        except LlemRayError as error:
            raise self._for_that_interpreter(error) from error

    def _forget(self, error: LlemRayError) -> None:
        """The process is unusable: make sure that it is gone, and remember why."""
        process, self._process = self._process, None
        self._loaded, self._encodes, self._end = False, False, error.message
        if process is not None:
            process.kill()

    def _broken(self, problem: ProtocolError) -> EngineDied:
        assert self._process is not None
        error = self._process.reject(str(problem))
        self._forget(error)
        return error

    def _unpacked(self, cls: type[LoadReport], answer: Any) -> LoadReport:
        try:
            return unpack(cls, answer)
        except ProtocolError as error:
            raise self._broken(error) from error

    def _for_that_interpreter(self, error: LlemRayError) -> LlemRayError:
        """A pip command must name the interpreter it is meant for."""
        extra = EXTRAS.get(self._config.engine.backend)
        hint = error.hint
        if hint is None and extra is not None and "cannot be imported" in error.message:
            hint = install_command(extra)
        if hint is None or not hint.startswith(_PIP):
            return error
        message = f"{error.message} (in {self._command})"
        named = type(error)(message, f"{self._command} -m {hint}", *error.args[2:])
        for note in getattr(error, "__notes__", ()):
            named.add_note(note)
        return named

    def _new_log(self) -> Path:
        folder = Path(self._config.cache_dir) / "engine-logs"
        with contextlib.suppress(OSError):
            for old in sorted(folder.glob("*.log"), key=lambda path: path.name)[:-_LOGS_KEPT]:
                old.unlink(missing_ok=True)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        return folder / f"{stamp}-{self._config.engine.backend}-{os.getpid()}-{next(_log_numbers)}.log"


def find_command(command: str, base_dir: str) -> tuple[str, ...]:
    """Program and arguments of ``engine.python``.

    Args:
        command: Path of an interpreter (it may hold spaces), or a command line.
        base_dir: Folder that a relative path starts from.

    Raises:
        ConfigError: There is no such file, it may not be executed, or the command line has an open quote.
    """
    whole = Path(base_dir, os.path.expanduser(command))  # noqa: PTH111 - a name without a slash must stay one
    if whole.is_file():
        words = [command]
    else:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ConfigError(f"not a command line: {error}", field="engine.python", found=command) from error
    if not words:
        raise ConfigError("must not be empty", field="engine.python", found=repr(command), allowed="an interpreter or a command")
    program = os.path.expanduser(words[0])  # noqa: PTH111 - as above
    if os.sep in program or whole.is_file():
        path = Path(base_dir, program).absolute()
        problem = "no such interpreter" if not path.is_file() else None if os.access(path, os.X_OK) else "may not be executed"
        found = str(path)
    else:
        located = shutil.which(program)
        path, problem, found = Path(located or program), None if located else "no such command on PATH", program
    if problem:
        raise ConfigError(problem, field="engine.python", found=found, allowed="path of an executable, or a command")
    return (str(path), *words[1:])
