"""Deadlines are kept and named; the user's signals end waits."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from llem_ray.core.errors import HangError
from llem_ray.execution.interrupts import Aborted, Interrupts
from llem_ray.execution.waits import Waits
from llem_ray.testing.clock import VirtualClock


class Never:
    """A call that is never answered; asking costs virtual time."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def result(self, timeout_s: float) -> Any:
        self._clock.advance_ns(max(int(timeout_s * 1e9), 1))
        raise TimeoutError


class Answer:
    def result(self, timeout_s: float) -> str:
        return "here"


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    made = Interrupts()
    made.install()
    yield made
    made.restore()


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_an_answer_comes_back(interrupts: Interrupts) -> None:
    assert Waits(VirtualClock(), interrupts, lambda: None).answer(Answer(), 1.0, "it") == "here"


def test_a_deadline_is_an_error_that_names_what_was_awaited(interrupts: Interrupts) -> None:
    clock, ticks = VirtualClock(), []
    waits = Waits(clock, interrupts, lambda: ticks.append(1))
    begin_ns = clock.monotonic_ns()
    with pytest.raises(HangError, match=r"no answer to trial x within 3 s"):
        waits.answer(Never(clock), 3.0, "trial x")
    assert clock.monotonic_ns() - begin_ns == pytest.approx(3e9, rel=0.01)
    assert len(ticks) >= 14


def test_one_ctrl_c_asks_to_stop_and_two_abort(interrupts: Interrupts) -> None:
    assert not interrupts.stop_requested
    send(signal.SIGINT)
    assert interrupts.stop_requested
    interrupts.raise_if_aborted()
    send(signal.SIGINT)
    with pytest.raises(Aborted):
        interrupts.raise_if_aborted()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_aborts_at_once(interrupts: Interrupts, number: int) -> None:
    send(number)
    with pytest.raises(Aborted):
        interrupts.raise_if_aborted()


def test_the_first_ctrl_c_ends_only_waits_that_lose_nothing(interrupts: Interrupts) -> None:
    clock = VirtualClock()
    waits = Waits(clock, interrupts, lambda: None)
    send(signal.SIGINT)
    with pytest.raises(HangError):
        waits.answer(Never(clock), 1.0, "a trial")
    with pytest.raises(Aborted):
        waits.answer(Never(clock), 1.0, "a load", may_stop=True)
    assert waits.sleep(100.0) is False


def test_sleep_takes_its_time(interrupts: Interrupts) -> None:
    clock = VirtualClock()
    begin_ns = clock.monotonic_ns()
    assert Waits(clock, interrupts, lambda: None).sleep(12.5) is True
    assert clock.monotonic_ns() - begin_ns == 12_500_000_000


def test_a_tick_may_end_the_wait(interrupts: Interrupts) -> None:
    def broken() -> None:
        raise OSError("disk full")

    clock = VirtualClock()
    with pytest.raises(OSError, match="disk full"):
        Waits(clock, interrupts, broken).answer(Never(clock), 5.0, "a trial")


def test_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    made = Interrupts()
    made.install()
    made.restore()
    assert signal.getsignal(signal.SIGTERM) is before
    assert threading.current_thread() is threading.main_thread()


def test_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    made = Interrupts()
    made.install()
    try:
        send(signal.SIGHUP)
        made.raise_if_aborted()
        assert not made.stop_requested
    finally:
        made.restore()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, before)
