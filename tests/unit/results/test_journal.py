from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llem_ray.core.errors import ResultsError
from llem_ray.results.journal import Journal, JournalEvent, encode_event, replay

_ATTEMPT_EVENTS = st.builds(
    JournalEvent,
    event=st.sampled_from(["leased", "measuring", "done", "failed"]),
    trial_id=st.sampled_from(["a-r0", "a-r1", "b-r0"]),
    attempt=st.integers(1, 4),
    kind=st.sampled_from([None, "out_of_memory", "ünïcödé \u2028 line"]),
    final=st.sampled_from([None, True, False]),
)
_RUN_EVENTS = st.builds(
    JournalEvent,
    event=st.sampled_from(["run_started", "run_finished", "interrupted"]),
    trial_id=st.sampled_from([None, "a-r0"]),
    pid=st.just(1),
    host=st.just("h"),
)
EVENTS = st.lists(st.one_of(_ATTEMPT_EVENTS, _ATTEMPT_EVENTS, _RUN_EVENTS), max_size=30)


def write(path: Path, events: list[JournalEvent]) -> bytes:
    data = b"".join(map(encode_event, events))
    path.write_bytes(data)
    return data


@given(events=EVENTS)
def test_replay_agrees_with_what_the_events_say(tmp_path_factory: pytest.TempPathFactory, events: list[JournalEvent]) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    write(path, events)
    state = replay(path)
    about = {t: [e for e in events if e.trial_id == t and not e.event.startswith("run_")] for t in ("a-r0", "a-r1", "b-r0")}
    session = events[max((i for i, e in enumerate(events) if e.event == "run_started"), default=-1) + 1 :]
    outcomes = [e.event for e in session if e.event in {"done", "failed"}]
    assert set(state.done) == {t for t, es in about.items() if any(e.event == "done" for e in es)}
    assert set(state.given_up) == {
        t for t, es in about.items() if any(e.event == "failed" and e.final for e in es) and t not in state.done
    }
    for trial, trial_events in about.items():
        attempts = [e.attempt for e in trial_events if e.attempt is not None]
        assert state.next_attempt(trial) == max(attempts, default=0) + 1
        assert (trial in state.open_attempts) == bool(trial_events and trial_events[-1].event in {"leased", "measuring"})
        assert state.is_settled(trial) == (trial in state.done or trial in state.given_up)
        assert state.failures.get(trial, 0) == sum(e.event == "failed" for e in trial_events)
    assert state.consecutive_failures == next((i for i, o in enumerate(reversed(outcomes)) if o == "done"), len(outcomes))
    ends = [e.event for e in events if e.event in {"run_started", "run_finished"}]
    assert state.finished == bool(ends and ends[-1] == "run_finished")
    assert state.sessions == ends.count("run_started")


@settings(max_examples=20)
@given(events=EVENTS.filter(bool), data=st.data())
def test_a_torn_last_line_is_forgiven_and_cut_before_the_next_event(
    tmp_path_factory: pytest.TempPathFactory, events: list[JournalEvent], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    whole = write(path, events)
    last = encode_event(events[-1])
    torn = whole[: len(whole) - data.draw(st.integers(1, len(last)))]
    path.write_bytes(torn)
    before = replay(path)
    extra = JournalEvent(event="done", trial_id="z-r0", attempt=1)
    with Journal.open(path) as journal:
        journal.append(extra)
    assert path.read_bytes() == b"".join(map(encode_event, events[:-1])) + encode_event(extra)
    before.apply({"event": "done", "trial_id": "z-r0", "attempt": 1})
    assert replay(path) == before


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"event": "done", "trial_id": "a-r', "not a journal line"),
        (b"[1, 2]", "list instead of an object"),
        (b'{"event": "exploded"}', "unknown event 'exploded'"),
        (b'{"event": "done", "trial_id": "a-r0"}', "needs a trial_id and an attempt number"),
        (b'{"event": "done", "trial_id": "a-r0", "attempt": true}', "needs a trial_id and an attempt number"),
        (b"\xff\xfe\x00", "not a journal line"),
        (b"", "not a journal line"),
    ],
)
def test_damage_that_is_not_a_torn_end_names_file_and_line(tmp_path: Path, line: bytes, told: str) -> None:
    path = tmp_path / "journal.jsonl"
    good = encode_event(JournalEvent(event="run_started", pid=1))
    path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(ResultsError, match=told) as caught:
        replay(path)
    assert f"{path}:2:" in caught.value.message
    assert "--again" in (caught.value.hint or "")


def test_a_missing_journal_is_an_empty_one(tmp_path: Path) -> None:
    state = replay(tmp_path / "journal.jsonl")
    assert (state.done, state.sessions, state.finished, state.next_attempt("a-r0")) == ({}, 0, False, 1)


def test_events_survive_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    event = JournalEvent(
        event="failed", trial_id="a-r0", cell_id="a", repeat=0, attempt=2, load_key="k", host="h", epoch=3, pid=9, kind="hang",
        final=False, detail="line one\nline two \u2028",
    )  # fmt: skip
    with Journal.open(path) as journal:
        journal.append(event)
    (line,) = path.read_bytes().split(b"\n")[:-1]
    assert JournalEvent(**json.loads(line)) == event


def test_a_failed_append_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    event = JournalEvent(event="failed", trial_id="a-r0", attempt=1, detail="x" * 3000)
    small = JournalEvent(event="run_started", pid=1)
    with Journal.open(path) as journal:
        journal.append(small)
        before = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1000, hard))
        try:
            with pytest.raises(ResultsError, match=r"cannot append to .*journal\.jsonl"):
                journal.append(event)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
        journal.append(event)
    assert replay(path).failures == {"a-r0": 1}


def test_every_event_is_synced_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    synced: list[bytes] = []
    fdatasync = os.fdatasync

    def record(descriptor: int) -> Any:
        synced.append(path.read_bytes())
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", record)
    with Journal.open(path) as journal:
        for attempt in (1, 2):
            journal.append(JournalEvent(event="done", trial_id="a-r0", attempt=attempt))
            assert synced[-1] == path.read_bytes()
    assert len(synced) == 2
