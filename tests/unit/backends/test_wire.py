"""What travels between an engine's process and ours arrives as it was sent, or is refused."""

from __future__ import annotations

import inspect
import json
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llem_ray.backends.process.wire import (
    Channel,
    ErrorReport,
    PeerGone,
    ProtocolError,
    pack,
    pack_events,
    pack_flat,
    report_error,
    restore_error,
    unpack,
    unpack_each,
    unpack_events,
)
from llem_ray.core import errors
from llem_ray.core.backend import BackendConfig, LoadReport, Rank, Request, RequestRecord, StepEvent
from llem_ray.core.errors import ConfigError, GenerationError, LlemRayError
from llem_ray.core.flops import FlopModel
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec

STEP = StepEvent(begin_ns=1, end_ns=2, kind="decode", prefill_tokens=0, decode_tokens=3, computed_tokens=4, flops=1.5)
RECORD = RequestRecord(
    request_id="r",
    prompt_tokens=1,
    padded_tokens=2,
    output_token_ids=(3, 4),
    finish_reason="length",
    scheduled_ns=5,
    queued_ns=6,
    sent_ns=7,
    token_times_ns=(8, 9),
)
REPORT = LoadReport(
    import_s=1.0,
    construct_s=2.0,
    compile_s=None,
    warm_s=0,
    context_tokens=1,
    vocab_size=2,
    parameters=None,
    weight_bytes=3,
    dtype="float32",
    device="cpu",
    model_commit=None,
    random_weights=True,
    special_token_ids=(0, 1),
    notes={"a": "b"},
    flop_model=FlopModel(per_token=1.5, per_output=2, window_tokens=None),
)
CONFIG = BackendConfig(
    model=ModelSpec(id="naïve/模型", initializer_range=0.1),
    engine=EngineSpec(python="/opt/x y/python", engine_args={"nested": {"list": [1, None, "x", 1.5, True]}}),
    device="cuda",
    host="h",
    base_dir=".",
    cache_dir="c",
)
VALUES = [STEP, RECORD, REPORT, CONFIG, Rank(rank=0, host="h", pid=1, gpu_uuid=None), SamplingSpec(top_k=3, temperature=1)]


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    left, right = map(Channel, socket.socketpair())
    yield left, right
    left.close()
    right.close()


def over_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_dataclass_arrives_as_it_was_sent(value: Any) -> None:
    arrived = unpack(type(value), over_json(pack(value)))
    assert arrived == value
    assert [type(getattr(arrived, f.name)) for f in fields(value)] == [type(getattr(value, f.name)) for f in fields(value)]


@given(st.lists(st.integers(0, 2**31)), st.text(), st.integers(1, 10**6), st.booleans())
def test_requests_arrive_as_they_were_sent(ids: list[int], name: str, count: int, ignore_eos: bool) -> None:
    request = Request(request_id=name, prompt_token_ids=tuple(ids), max_new_tokens=count, ignore_eos=ignore_eos)
    assert unpack_each(Request, over_json([pack_flat(request)])) == (request,)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_every_wrong_field_is_refused(value: Any) -> None:
    row = over_json(pack(value))
    for index in range(len(row)):
        with pytest.raises(ProtocolError, match="not a "):
            unpack(type(value), [*row[:index], {1: object()} if not isinstance(row[index], dict) else 7, *row[index + 1 :]])
    for wrong in (row[:-1], [*row, 1], None, "text", 5, {"a": 1}):
        with pytest.raises(ProtocolError, match="not a"):
            unpack(type(value), wrong)


@pytest.mark.parametrize(
    ("index", "wrong"), [(0, 1.5), (0, "1"), (0, True), (0, None), (2, "neither"), (2, 1), (2, []), (6, "fast"), (6, True)]
)
def test_a_step_of_wrong_types_is_refused(index: int, wrong: object) -> None:
    row = [*pack(STEP)]
    row[index] = wrong
    with pytest.raises(ProtocolError):
        unpack(StepEvent, row)


def test_token_ids_must_be_integers() -> None:
    row = [*pack(RECORD)]
    for wrong in ([1, 2.5], ["1"], [True], 5, None, "12"):
        with pytest.raises(ProtocolError):
            unpack(RequestRecord, [*row[:3], wrong, *row[4:]])
    with pytest.raises(ProtocolError, match="not a list"):
        unpack_each(RequestRecord, {})


CLASSES = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, LlemRayError)]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_arrives_as_it_was_raised(cls: type[LlemRayError]) -> None:
    sent = report_error(cls("what", "do this"), "Traceback ...")
    arrived = restore_error(unpack(ErrorReport, over_json(pack(sent))))
    assert type(arrived) is cls
    assert str(arrived) == str(cls("what", "do this"))


def test_fields_of_an_error_arrive_too() -> None:
    error = ConfigError("wrong", None, field="engine.x", found="1", allowed="2", line=7)
    arrived = restore_error(unpack(ErrorReport, over_json(pack(report_error(error, "")))))
    assert arrived is not None
    assert arrived.args == error.args


def test_errors_of_others() -> None:
    class TheirError(GenerationError):
        pass

    assert type(restore_error(report_error(TheirError("x"), ""))) is GenerationError
    assert restore_error(report_error(ValueError("x"), "")) is None
    for name in ("ValueError", "Exception", "annotations", "nothing"):
        with pytest.raises(ProtocolError, match="unknown error class"):
            restore_error(ErrorReport(name=name, args=(), traceback=""))
    with pytest.raises(ProtocolError, match="wrong arguments"):
        restore_error(ErrorReport(name="LoadError", args=(1, "2", "3"), traceback=""))


def test_events_keep_their_order_and_kind() -> None:
    events = [STEP, RECORD, STEP]
    travelled = json.loads(json.dumps(pack_events(events)))
    assert list(unpack_events(travelled)) == events
    for wrong in (None, [[0]], [[2, travelled[0][1]]], [[1, travelled[0][1]]], [[0, travelled[1][1]]], [travelled[0][1]]):
        with pytest.raises(ProtocolError):
            list(unpack_events(wrong))


def test_messages_keep_their_order_and_borders(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    sent = [(n, "step", ["x" * n, n, None, 1.5, "ü"]) for n in range(200)]
    for message in sent:
        left.send(*message)
    assert right.pending()
    assert [right.receive(1.0) for _ in sent] == sent
    assert not right.pending()


def test_a_channel_that_another_thread_has_closed_has_no_peer() -> None:
    near, far = socket.socketpair()
    with far:
        channel = Channel(near)
        channel.close()
        with pytest.raises(PeerGone):
            channel.send(1, "load", {})
        with pytest.raises(PeerGone):
            channel.receive(10.0)


def test_silence_has_a_deadline_and_an_end_is_noticed_after_the_last_message(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    with pytest.raises(TimeoutError):
        right.receive(0.01)
    left.send(1, "done", 5)
    left.close()
    assert right.receive(1.0) == (1, "done", 5)
    with pytest.raises(PeerGone):
        right.receive(1.0)
    with pytest.raises(PeerGone):
        right.send(1, "x")


def test_a_peer_that_takes_nothing_has_a_deadline(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(TimeoutError):
        ends[0].send(1, "run", "x" * 10_000_000, 0.05)


def test_an_ended_process_is_noticed_though_its_socket_is_still_open() -> None:
    left, right = socket.socketpair()
    ended, ending = os.pipe()
    channel = Channel(left, ended)
    os.close(ending)
    Channel(right).send(1, "done", None)
    assert channel.receive(1.0) == (1, "done", None)
    with pytest.raises(PeerGone):
        channel.receive(1.0)
    channel.close()
    right.close()
    os.close(ended)


def framed(payload: bytes) -> bytes:
    return struct.pack(">4sI", b"LLEM", len(payload)) + payload


@pytest.mark.parametrize(
    "data",
    [b"x", b"LLX", b"HTTP/1.1 200 OK", b"LLEM\xff\xff\xff\xff", framed(b"{"), framed(b"[1,2]"), framed(b"5"), framed(b"\xff\xfe"),
     framed(b'["1","a",0]'), framed(b"[1,2,3]"), framed(b'[true,"a",0]'), framed(b"[" * 100_000)],
)  # fmt: skip
def test_garbage_is_one_error(data: bytes) -> None:
    left, right = socket.socketpair()
    left.sendall(data)
    channel = Channel(right)
    with pytest.raises(ProtocolError, match="garbage on the socket"):
        channel.receive(1.0)
    channel.close()
    left.close()


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_are_a_message_or_one_of_the_typed_errors(data: bytes) -> None:
    left, right = socket.socketpair()
    channel = Channel(right)
    left.sendall(data)
    left.close()
    try:
        with pytest.raises((ProtocolError, PeerGone)):
            channel.receive(1.0)
    finally:
        channel.close()
