"""What the two sides of an engine process say to each other: length-prefixed JSON, typed and versioned, never pickle.

A message is ``LLEM``, the length of the payload (4 bytes, big endian) and the payload: a JSON list ``[call, kind, body]``.
``call`` numbers what the parent asks; an answer carries the number of its question, so that answers to a call that was given
up are told apart from those to the next. A dataclass travels as the list of its fields, and is checked against its
annotations on arrival. Both sides run the same release of this package, which the handshake makes sure of.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from operator import attrgetter
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from llem_ray.core import errors
from llem_ray.core.backend import RequestRecord, StepEvent
from llem_ray.core.errors import GenerationError, LlemRayError

T = TypeVar("T")
Message = tuple[int, str, Any]

PROTOCOL_VERSION: Final = 3
MAX_BYTES: Final = 512 * 2**20
"""A longer message is taken for garbage."""
_MAGIC: Final = b"LLEM"
_HEADER: Final = struct.Struct(">4sI")
_CHUNK: Final = 1 << 18
_getters: Final[dict[type, Callable[[Any], tuple[Any, ...]]]] = {}
_converters_of: Final[dict[type, tuple[tuple[str, Callable[[Any], Any]], ...]]] = {}
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))


class ProtocolError(Exception):
    """What came over the socket is not what the other side may send."""


class PeerGone(Exception):
    """The other side closed the socket or ended."""


class Channel:
    """Messages over a connected stream socket.

    Args:
        connection: The socket; it is owned from now on.
        watch: A file descriptor that becomes readable when the other side has ended (a pidfd), or None.
    """

    def __init__(self, connection: socket.socket, watch: int | None = None) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._arrivals = select.poll()
        self._arrivals.register(connection, select.POLLIN)
        if watch is not None:
            self._arrivals.register(watch, select.POLLIN)

    def send(self, call: int, kind: str, body: Any = None, timeout_s: float | None = None) -> None:
        """Send one message.

        Raises:
            PeerGone: Nobody is there.
            TimeoutError: It was not taken within ``timeout_s``.
        """
        payload = _ENCODER.encode((call, kind, body)).encode()
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(_HEADER.pack(_MAGIC, len(payload)) + payload)
        except TimeoutError:
            raise
        except OSError as error:
            raise PeerGone(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message.

        Raises:
            PeerGone: The other side has ended, and nothing whole is left to read.
            TimeoutError: None came within ``timeout_s``.
            ProtocolError: It is not a message.
        """
        message = self._take()
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while message is None:
            self._wait(deadline_s)
            message = self._take()
        return message

    def pending(self) -> bool:
        """Something has arrived, or the other side has ended."""
        return bool(self._buffer) or bool(self._arrivals.poll(0))

    def fileno(self) -> int:
        """The socket, for ``select``; what has arrived already is known to ``pending`` alone."""
        return self._socket.fileno()

    def shut_down(self) -> None:
        """End the connection for both sides; whoever waits in ``receive``, in any thread, is told that the peer is gone."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _wait(self, deadline_s: float | None) -> None:
        left_ms = None if deadline_s is None else max(0.0, 1000 * (deadline_s - time.monotonic()))
        ready = dict(self._arrivals.poll(left_ms))
        if not ready:
            raise TimeoutError("no message")
        if self._socket.fileno() not in ready:
            raise PeerGone("the process ended")
        try:
            chunk = self._socket.recv(_CHUNK)
        except OSError as error:
            raise PeerGone(str(error)) from error
        if not chunk:
            raise PeerGone("the socket was closed")
        self._buffer += chunk

    def _take(self) -> Message | None:
        buffer = self._buffer
        if len(buffer) < _HEADER.size:
            if not _MAGIC.startswith(buffer[: len(_MAGIC)]):
                raise ProtocolError(f"garbage on the socket: {_shown(buffer)}")
            return None
        magic, length = _HEADER.unpack_from(buffer)
        if magic != _MAGIC or length > MAX_BYTES:
            raise ProtocolError(f"garbage on the socket: {_shown(buffer)}")
        end = _HEADER.size + length
        if len(buffer) < end:
            return None
        payload = bytes(buffer[_HEADER.size : end])
        del buffer[:end]
        try:
            call, kind, body = json.loads(payload)
        except (ValueError, TypeError, RecursionError) as error:
            raise ProtocolError(f"garbage on the socket: {_shown(payload)}") from error
        if type(call) is not int or type(kind) is not str:
            raise ProtocolError(f"garbage on the socket: {_shown(payload)}")
        return call, kind, body


def pack(value: Any) -> Any:
    """A dataclass of ``core`` as the list of its fields, nested ones too."""
    return [_packed(item) for item in _getter(type(value))(value)]


def pack_flat(value: Any) -> Any:
    """As ``pack``, for a dataclass whose fields hold numbers, text and tuples of them alone: three times faster."""
    return _getter(type(value))(value)


def pack_events(events: Sequence[StepEvent | RequestRecord]) -> Any:
    """What a run yielded, in order: ``[0, step]`` or ``[1, record]`` each."""
    return [(0 if isinstance(event, StepEvent) else 1, pack_flat(event)) for event in events]


def unpack_events(rows: object) -> Iterator[StepEvent | RequestRecord]:
    """The events that ``pack_events`` made ``rows`` of.

    Raises:
        ProtocolError: They are none.
    """
    for row in _listed_rows(rows):
        if type(row) is not list or len(row) != 2 or row[0] not in (0, 1):
            raise ProtocolError(f"neither a step nor a record: {_shown(row)}")
        yield unpack(RequestRecord, row[1]) if row[0] else unpack(StepEvent, row[1])


def unpack(cls: type[T], row: object) -> T:
    """The dataclass that ``pack`` made ``row`` of.

    Raises:
        ProtocolError: A field is missing, or of another type than annotated.
    """
    converters = _converters(cls)
    if type(row) is not list or len(row) != len(converters):
        raise ProtocolError(f"not a {cls.__name__}: {_shown(row)}")
    try:
        return cls(**{name: convert(item) for (name, convert), item in zip(converters, row, strict=True)})
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"not a {cls.__name__}: {error}") from error


def unpack_each(cls: type[T], rows: object) -> tuple[T, ...]:
    """A list of dataclasses."""
    return tuple(unpack(cls, row) for row in _listed_rows(rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorReport:
    """An exception as it travels."""

    name: str
    """Class in ``core.errors``; the nearest base for a class that is not there, empty for any other exception."""
    args: tuple[str | int | None, ...]
    """Its arguments; for any other exception its type and text."""
    traceback: str


def report_error(error: BaseException, traceback: str) -> ErrorReport:
    """What is sent instead of ``error``."""
    known = next((cls for cls in type(error).__mro__ if vars(errors).get(cls.__name__) is cls), None)
    if known is None or not issubclass(known, LlemRayError):
        return ErrorReport(name="", args=(type(error).__name__, str(error)), traceback=traceback)
    args = tuple(item if item is None or type(item) in (str, int) else str(item) for item in error.args)
    return ErrorReport(name=known.__name__, args=args, traceback=traceback)


def restore_error(report: ErrorReport) -> LlemRayError | None:
    """The error that was reported, or None where it was none of ours.

    Raises:
        ProtocolError: There is no such error.
    """
    if not report.name:
        return None
    cls = vars(errors).get(report.name)
    if not isinstance(cls, type) or not issubclass(cls, LlemRayError):
        raise ProtocolError(f"unknown error class {report.name!r}")
    try:
        return cls(*report.args)  # type: ignore[arg-type]
    except TypeError as error:
        raise ProtocolError(f"wrong arguments of {report.name}: {error}") from error


def error_body(error: BaseException) -> Any:
    """An exception as a message's body, with its traceback."""
    return pack(report_error(error, "".join(traceback.format_exception(error))))


def restored(body: Any) -> LlemRayError:
    """The error that ``error_body`` made; one of a foreign class becomes a GenerationError."""
    report = unpack(ErrorReport, body)
    error = restore_error(report) or GenerationError(f"the engine failed: {': '.join(map(str, report.args))}")
    error.add_note(f"In that process:\n{report.traceback}")
    return error


def _listed_rows(rows: object) -> list[object]:
    if type(rows) is not list:
        raise ProtocolError(f"not a list of rows: {_shown(rows)}")
    return rows


def _packed(item: Any) -> Any:
    if is_dataclass(item) and not isinstance(item, type):
        return pack(item)
    if isinstance(item, Mapping):
        return {str(key): _packed(inner) for key, inner in item.items()}
    if isinstance(item, (list, tuple)):
        return [_packed(inner) for inner in item]
    return item


def _getter(cls: Any) -> Callable[[Any], tuple[Any, ...]]:
    if cls not in _getters:
        _getters[cls] = attrgetter(*(item.name for item in fields(cls)))
    return _getters[cls]


def _converters(cls: Any) -> tuple[tuple[str, Callable[[Any], Any]], ...]:
    if cls not in _converters_of:
        hints = get_type_hints(cls)
        _converters_of[cls] = tuple((item.name, _converter(hints[item.name])) for item in fields(cls))
    return _converters_of[cls]


def _converter(hint: Any) -> Callable[[Any], Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    optional = origin in (Union, types.UnionType)
    inner = next(filter(is_dataclass, arguments if optional else (hint,)), None)
    if inner is not None:
        return lambda row: None if row is None and optional else unpack(inner, row)  # type: ignore[arg-type]
    if origin is Literal:
        return _one_of(frozenset(arguments))
    if optional:
        return _optional(arguments)
    if origin is tuple:
        return _tuple_of(_scalars(arguments[0]))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _of(frozenset({dict}))
    return _of(_scalars(hint))


def _optional(arguments: tuple[Any, ...]) -> Callable[[Any], Any]:
    row = next((argument for argument in arguments if get_origin(argument) is tuple), None)
    if row is None:
        return _of(frozenset().union(*(_scalars(argument) for argument in arguments)))
    convert = _converter(row)
    return lambda value: None if value is None else convert(value)


def _scalars(hint: Any) -> frozenset[type]:
    if get_origin(hint) in (Union, types.UnionType):
        return frozenset().union(*(_scalars(argument) for argument in get_args(hint)))
    if get_origin(hint) is Literal:
        return frozenset(type(value) for value in get_args(hint))
    if hint is float:
        return frozenset({float, int})
    assert hint in (int, str, bool, type(None)), f"the wire does not carry {hint}"
    return frozenset({hint})


def _of(allowed: frozenset[type]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if type(value) not in allowed:
            raise TypeError(f"{_shown(value)} is not {' or '.join(sorted(item.__name__ for item in allowed))}")
        return value

    return convert


def _one_of(allowed: frozenset[Any]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if type(value) not in (str, int) or value not in allowed:
            raise TypeError(f"{_shown(value)} is not one of {', '.join(sorted(map(str, allowed)))}")
        return value

    return convert


def _tuple_of(allowed: frozenset[type]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not set(map(type, _listed(value))) <= allowed:
            raise TypeError(f"{_shown(value)} holds more than {' or '.join(sorted(item.__name__ for item in allowed))}")
        return tuple(value)

    return convert


def _listed(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError(f"{_shown(value)} is not a list")
    return value


def _shown(value: Any) -> str:
    text = repr(bytes(value[:60])) if isinstance(value, (bytes, bytearray)) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
