"""An inference engine without a model: known tokens, known step times, failures on demand. Engine name: `fake`."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NoReturn

from llem_ray.backends.batch_checks import require_valid
from llem_ray.backends.engine_args import parse_engine_args
from llem_ray.backends.load_generator import LoadGenerator
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
from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.errors import ConfigError, DeviceMemoryError, GenerationError, LoadError, NumericsError
from llem_ray.core.spec import SamplingSpec
from llem_ray.core.units import NS_PER_MS

FailKind = Literal["out_of_memory", "nan", "generation", "die", "hang", "load", "short"]

CONNECT_S = 10.0
LOOK_S = 0.2

SPECIAL_TOKENS = 3
"""Ids below this are special: 0 padding, 1 begin, 2 end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeFailure:
    """One fault to inject. Conditions that are left out always hold; all must hold for the fault to strike."""

    kind: FailKind
    """`die` ends the process at once, `hang` blocks, `load` fails while loading, `short` returns half the tokens."""
    at_run: int | None = None
    """Only in this call of ``run``, counted from 1 since the backend was loaded (warm-up batches count)."""
    batch_above: int | None = None
    """Only for batches of more requests than this."""
    once: str | None = None
    """Only while this file does not exist; it is created when the fault strikes. A retry in a new process then succeeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeArgs:
    """What `engine.engine_args` may hold for the fake engine."""

    prefill_ms: float = 1.0
    """Duration of a prefill step."""
    decode_ms: float = 1.0
    """Duration of a decode step."""
    load_ms: float = 0.0
    """Duration of ``load``."""
    every_ms: float = 0.0
    """Batches begin at multiples of this on the host's monotonic clock only, so that a fake GPU's power can follow the phases."""
    busy: bool = False
    """Burn the CPU for the duration of a step instead of sleeping."""
    max_sequences: int = 8
    """Requests that run together when they are sent one by one."""
    context_tokens: int = 4096
    """Longest prompt plus output."""
    vocab_size: int = 1000
    """Number of token ids, the three special ones included."""
    parameters: int = 1_000_000
    """What the load report says."""
    gpu_uuids: tuple[str, ...] | None = None
    """UUIDs the ranks report, one each; default: None on every rank."""
    fail: FakeFailure | None = None
    """A fault to inject."""


class FakeBackend:
    """Answers with tokens that depend on the prompt, its position and the seed alone, at configured step times.

    It has no model, no torch and no GPU, and reports real times of ``clock``. World sizes above one yield that many ranks,
    all in this process.

    Args:
        config: As for any engine.
        clock: Tests of batches pass a virtual one.
    """

    serves_online: ClassVar[bool] = True

    def __init__(self, config: BackendConfig, clock: Clock | None = None) -> None:
        self._config = config
        self._clock = clock or SystemClock()
        self._args: FakeArgs | None = None
        self._loaded = False
        self._runs = 0
        self._closed = threading.Event()
        self._meeting: socket.socket | None = None
        """Rank 0 listens here; the others are connected to it for as long as it lives."""

    def check(self) -> None:
        """Validate ``engine_args``."""
        args = parse_engine_args(FakeArgs, self._config.engine.engine_args)
        _refuse(
            args.prefill_ms < 0 or args.decode_ms < 0 or args.load_ms < 0 or args.every_ms < 0, "*_ms", "durations of 0 and more"
        )
        _refuse(args.vocab_size <= SPECIAL_TOKENS, "vocab_size", f"more than {SPECIAL_TOKENS}")
        _refuse(args.max_sequences < 1, "max_sequences", "1 and more")
        _refuse(args.context_tokens < 1, "context_tokens", "1 and more")
        world_size = self._config.engine.world_size
        _refuse(args.gpu_uuids is not None and len(args.gpu_uuids) != world_size, "gpu_uuids", f"{world_size}, one a rank")
        self._args = args

    def outlook(self) -> ModelOutlook:
        """All of it stands in ``engine_args``."""
        args = self._checked()
        special = tuple(range(SPECIAL_TOKENS))
        return ModelOutlook(context_tokens=args.context_tokens, vocab_size=args.vocab_size, special_token_ids=special)

    def load(self) -> LoadReport:
        """Wait ``load_ms`` and report a model of the configured size."""
        args = self._checked()
        begin_ns = self._clock.monotonic_ns()
        self._spend(args.load_ms)
        if args.fail is not None and args.fail.kind == "load" and self._strikes(args.fail, 0):
            raise LoadError("the fake engine was told to fail while loading")
        self._meet()
        self._loaded = True
        self._runs = 0
        return LoadReport(
            import_s=0.0,
            construct_s=(self._clock.monotonic_ns() - begin_ns) / 1e9,
            compile_s=None,
            warm_s=None,
            context_tokens=args.context_tokens,
            vocab_size=args.vocab_size,
            parameters=args.parameters,
            weight_bytes=4 * args.parameters,
            dtype="float32",
            device=self._config.device,
            model_commit=None,
            random_weights=True,
            special_token_ids=tuple(range(SPECIAL_TOKENS)),
            notes={"engine": "fake"},
        )

    def identity(self) -> tuple[Rank, ...]:
        """One rank for each worker of the gang that this process stands for: an equal share of them."""
        uuids, place = self._checked().gpu_uuids, self._config.rendezvous
        mine = range(self._config.engine.world_size)
        if place is not None:
            share = len(mine) // place.world_size
            mine = mine[place.rank * share : (place.rank + 1) * share]
        return tuple(
            Rank(rank=rank, host=self._config.host, pid=os.getpid(), gpu_uuid=uuids[rank] if uuids else None) for rank in mine
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """A begin token, then one id for each word."""
        ordinary = self._checked().vocab_size - SPECIAL_TOKENS
        return [[1, *(SPECIAL_TOKENS + zlib.crc32(word.encode()) % ordinary for word in text.split())] for text in texts]

    def encode_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        """As ``encode``, of ``<role> words`` for each message and ``<assistant>`` at the end."""
        return self.encode([" ".join([*(f"<{role}> {text}" for role, text in chat), "<assistant>"]) for chat in chats])

    def run(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule | None = None
    ) -> Iterator[StepEvent | RequestRecord]:
        """Serve the requests as one padded batch, or one by one with ``max_sequences`` running together."""
        args = self._checked()
        if not self._loaded:
            raise GenerationError("the fake engine is not loaded")
        require_valid(requests, vocab_size=args.vocab_size, context_tokens=args.context_tokens)
        self._runs += 1
        return self._batch(requests, sampling) if schedule is None else self._online(requests, sampling, schedule)

    def _batch(self, requests: Sequence[Request], sampling: SamplingSpec) -> Iterator[StepEvent | RequestRecord]:
        args = self._checked()
        self._await_turn(args.every_ms)
        sent_ns = self._clock.monotonic_ns()
        fault = args.fail if args.fail is not None and self._strikes(args.fail, len(requests)) else None
        lengths = [r.max_new_tokens if fault is None else (r.max_new_tokens + 1) // 2 for r in requests]
        padded = max(len(r.prompt_token_ids) for r in requests)
        times: list[list[int]] = [[] for _ in requests]
        for step in range(max(lengths)):
            begin_ns = self._clock.monotonic_ns()
            self._spend(args.decode_ms if step else args.prefill_ms)
            end_ns = self._clock.monotonic_ns()
            active = [row for row, length in enumerate(lengths) if step < length]
            for row in active:
                times[row].append(end_ns)
            yield StepEvent(
                begin_ns=begin_ns,
                end_ns=end_ns,
                kind="decode" if step else "prefill",
                prefill_tokens=0 if step else sum(len(r.prompt_token_ids) for r in requests),
                decode_tokens=len(active),
                computed_tokens=len(requests) * (1 if step else padded),
            )
        if fault is not None and fault.kind != "short":
            _fail(fault.kind)
        for request, length, token_times in zip(requests, lengths, times, strict=True):
            yield RequestRecord(
                request_id=request.request_id,
                prompt_tokens=len(request.prompt_token_ids),
                padded_tokens=padded,
                output_token_ids=self._tokens(request, length, sampling),
                finish_reason="length" if fault is None else "stop",
                scheduled_ns=sent_ns,
                queued_ns=sent_ns,
                sent_ns=sent_ns,
                token_times_ns=tuple(token_times),
            )

    def _online(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule
    ) -> Iterator[StepEvent | RequestRecord]:
        """Continuous batching: new prompts join between two decode steps, in a step that prefills and decodes."""
        args = self._checked()
        fault = args.fail if args.fail is not None and self._strikes(args.fail, len(requests)) else None
        arrivals: queue.SimpleQueue[Request] = queue.SimpleQueue()
        generator = LoadGenerator(requests, schedule, arrivals.put, self._clock)
        running: dict[str, tuple[Request, int, list[int]]] = {}
        answered = 0
        generator.start()
        try:
            while answered < len(requests):
                new: list[Request] = []
                while len(running) + len(new) < args.max_sequences:
                    try:
                        new.append(arrivals.get(timeout=None if running or new else LOOK_S, block=not (running or new)))
                    except queue.Empty:
                        break
                generator.check()
                if not running and not new:
                    continue
                begin_ns, decoding = self._clock.monotonic_ns(), len(running)
                self._spend(args.prefill_ms if new else args.decode_ms)
                end_ns = self._clock.monotonic_ns()
                for request in new:
                    length = request.max_new_tokens if fault is None else (request.max_new_tokens + 1) // 2
                    running[request.request_id] = (request, length, [])
                for _, _, times in running.values():
                    times.append(end_ns)
                prefill_tokens = sum(len(request.prompt_token_ids) for request in new)
                yield StepEvent(
                    begin_ns=begin_ns,
                    end_ns=end_ns,
                    kind="decode" if not new else "mixed" if decoding else "prefill",
                    prefill_tokens=prefill_tokens,
                    decode_tokens=len(running),
                    computed_tokens=prefill_tokens + decoding,
                )
                for request, length, times in [row for row in running.values() if len(row[2]) == row[1]]:
                    del running[request.request_id]
                    tokens = self._tokens(request, length, sampling)
                    sent = generator.done(request.request_id, tokens, times[-1])
                    answered += 1
                    yield RequestRecord(
                        request_id=request.request_id,
                        prompt_tokens=len(request.prompt_token_ids),
                        padded_tokens=len(request.prompt_token_ids),
                        output_token_ids=tokens,
                        finish_reason="length" if fault is None else "stop",
                        scheduled_ns=sent.scheduled_ns,
                        queued_ns=sent.queued_ns,
                        sent_ns=sent.sent_ns,
                        token_times_ns=tuple(times),
                    )
                if fault is not None and fault.kind != "short" and 2 * answered >= len(requests):
                    _fail(fault.kind)
        finally:
            generator.stop()

    def reset(self) -> None:
        """Nothing is cached."""

    def follow(self) -> None:
        """Wait until ``close``, of this process or of rank 0: that needs no help to pretend."""
        place = self._config.rendezvous
        if place is None:
            raise GenerationError("there is nobody to follow")
        try:
            with socket.create_connection((place.master_addr, place.master_port), timeout=CONNECT_S) as line:
                line.settimeout(LOOK_S)
                while not self._closed.is_set():
                    with contextlib.suppress(TimeoutError):
                        if not line.recv(1):
                            return
        except OSError as error:
            if not self._closed.is_set():
                raise GenerationError(f"rank 0 at {place.master_addr} hung up: {error}") from error

    def close(self) -> None:
        """Forget the model; the ranks that follow end too."""
        self._loaded = False
        self._closed.set()
        meeting, self._meeting = self._meeting, None
        if meeting is not None:
            meeting.close()

    def _meet(self) -> None:
        place = self._config.rendezvous
        if place is None or place.world_size == 1 or place.rank or self._meeting is not None:
            return
        try:
            meeting = self._meeting = socket.create_server(("", place.master_port), backlog=place.world_size)
        except OSError as error:
            raise LoadError(f"the fake engine cannot listen at port {place.master_port}: {error}") from error
        meeting.settimeout(LOOK_S)
        threading.Thread(target=_hold, args=(meeting,), name="fake-rendezvous", daemon=True).start()

    def _checked(self) -> FakeArgs:
        if self._args is None:
            self.check()
        assert self._args is not None
        return self._args

    def _tokens(self, request: Request, length: int, sampling: SamplingSpec) -> tuple[int, ...]:
        ordinary = self._checked().vocab_size - SPECIAL_TOKENS
        seed = sampling.seed if sampling.temperature > 0 else 0
        start = zlib.crc32(repr((request.prompt_token_ids, seed)).encode())
        return tuple(SPECIAL_TOKENS + (start + 7919 * index) % ordinary for index in range(length))

    def _strikes(self, fault: FakeFailure, batch_size: int) -> bool:
        if (fault.kind == "load") != (not self._loaded):
            return False
        if fault.at_run is not None and fault.at_run != self._runs:
            return False
        if fault.batch_above is not None and batch_size <= fault.batch_above:
            return False
        if fault.once is not None:
            try:
                (Path(self._config.base_dir) / fault.once).touch(exist_ok=False)
            except FileExistsError:
                return False
        return True

    def _await_turn(self, every_ms: float) -> None:
        every_ns = round(every_ms * NS_PER_MS)
        if every_ns:
            self._clock.sleep_until_ns(-(-self._clock.monotonic_ns() // every_ns) * every_ns)

    def _spend(self, duration_ms: float) -> None:
        until_ns = self._clock.monotonic_ns() + round(duration_ms * NS_PER_MS)
        if self._checked().busy:
            while self._clock.monotonic_ns() < until_ns:
                pass
        else:
            self._clock.sleep_until_ns(until_ns)


def _hold(meeting: socket.socket) -> None:
    """Keep every rank that connects, until the meeting is closed."""
    lines: list[socket.socket] = []
    while meeting.fileno() >= 0:
        try:
            lines.append(meeting.accept()[0])
        except TimeoutError:
            continue
        except OSError:
            break
    for line in lines:
        line.close()


def _refuse(wrong: bool, name: str, allowed: str) -> None:
    if wrong:
        raise ConfigError("wrong value", field=f"engine.engine_args.{name}", allowed=allowed)


def _fail(kind: FailKind) -> NoReturn:
    if kind == "die":
        os._exit(17)
    if kind == "hang":
        while True:
            threading.Event().wait()
    if kind == "out_of_memory":
        raise DeviceMemoryError("the fake engine was told to run out of memory")
    if kind == "nan":
        raise NumericsError("the fake engine was told to produce NaN logits")
    raise GenerationError("the fake engine was told to fail")
