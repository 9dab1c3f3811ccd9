"""Warm-up: as many batches as asked, or until step time and power are the same again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from scripted import answered

from llem_ray.core.backend import Request, RequestRecord, StepEvent
from llem_ray.core.measure_spec import WarmupSpec
from llem_ray.core.outcome import WarmupReport
from llem_ray.core.units import NS_PER_MS
from llem_ray.energy.steadiness import variation
from llem_ray.execution.calls import PowerSeen
from llem_ray.execution.warmup import ANSWER_S, WarmupTalk, warm_up
from llem_ray.testing.clock import VirtualClock

ONE, TWO = ((Request(request_id=name, prompt_token_ids=(3,), max_new_tokens=2),) for name in "12")


class Engine:
    """Each batch: a prefill step of 50 ms, and decode steps that take what the script says."""

    def __init__(self, step_ms: Sequence[float], *, tells_steps: bool = True) -> None:
        self.served: list[str] = []
        self.clock = VirtualClock()
        self.on_batch: Callable[[int], None] = lambda _: None
        """Told the number of every batch when it begins."""
        self._step_ms, self._tells = step_ms, tells_steps

    def serve(self, batch: tuple[Request, ...]) -> Iterator[StepEvent | RequestRecord]:
        step_ms = self._step_ms[min(len(self.served), len(self._step_ms) - 1)]
        self.served.append(batch[0].request_id)
        self.on_batch(len(self.served))
        self.clock.advance_ns(round((50 + 2 * step_ms) * NS_PER_MS))
        for kind, length_ms in (("prefill", 50.0), ("decode", step_ms), ("decode", step_ms)):
            if self._tells:
                yield StepEvent(
                    begin_ns=0,
                    end_ns=round(length_ms * NS_PER_MS),
                    kind=kind,  # type: ignore[arg-type]
                    prefill_tokens=0,
                    decode_tokens=1,
                    computed_tokens=1,
                )
        yield answered(0, [0.05, 2 * step_ms / 1000])


def warmed(engine: Engine, talk: WarmupTalk | None = None, **spec: float) -> WarmupReport:
    return warm_up(WarmupSpec(**spec), [ONE, TWO], engine.serve, engine.clock, talk)  # type: ignore[arg-type]


def test_a_fixed_number_of_batches_takes_the_workloads_in_turn() -> None:
    engine = Engine([1.0])
    assert warmed(engine, batches=3) == WarmupReport(batches=3, end="fixed")
    assert engine.served == ["1", "2", "1"]


@pytest.mark.parametrize(("batches", "expected"), [(0, 20), (1, 20), (30, 30)])
def test_batches_go_on_for_as_long_as_devices_need_to_warm(batches: int, expected: int) -> None:
    """A batch takes 52 ms: 20 of them are the first to last 1 s."""
    assert warmed(Engine([1.0]), batches=batches, min_s=1.0).batches == expected
    assert warmed(Engine([1.0]), batches=batches, min_s=1.0, until_cv=0.5).batches == expected


@pytest.mark.parametrize("tells_steps", [True, False])
def test_it_goes_on_until_the_last_five_step_times_are_alike(tells_steps: bool) -> None:
    """10, 8, 6, 4, then 2 ms: five equal ones are batches 5 to 9."""
    engine = Engine([100.0, 80.0, 60.0, 40.0, 20.0], tells_steps=tells_steps)
    assert warmed(engine, batches=1, until_cv=0.01) == WarmupReport(batches=9, end="steady", step_cv=0.0)
    assert engine.served == ["1"] * 9


def test_it_gives_up_at_the_limit_and_says_so() -> None:
    report = warmed(Engine([1.0, 2.0] * 10), until_cv=0.01, max_batches=7)
    assert (report.batches, report.end) == (7, "limit")
    assert report.step_cv == pytest.approx(variation([1, 2, 1, 2, 1]))


def test_no_fewer_batches_than_asked() -> None:
    assert warmed(Engine([1.0]), batches=8, until_cv=0.5).batches == 8


class Watcher:
    """Says after each batch what power was up to one that ended some batches ago; a batch takes 250 ms."""

    def __init__(self, cv_of: Callable[[int], float | None], *, late: int = 3, step_ms: Sequence[float] = (100.0,)) -> None:
        self.engine, self.talk = Engine(step_ms), WarmupTalk("t-r0", 1)
        self.engine.on_batch = self._look
        self._cv_of, self._late = cv_of, late

    def _look(self, batch: int) -> None:
        seen, cv = batch - 1 - self._late, self._cv_of(batch - 1 - self._late)
        told = PowerSeen(batches=seen, cv=cv) if seen > 0 and cv is not None else None
        progress = self.talk.tell("t-r0", 1, told)
        assert [mark[0] for mark in progress.marks] == list(range(batch))
        assert progress.marks[-1][1] == self.engine.clock.monotonic_ns()


def test_steady_steps_alone_are_not_enough_where_power_is_seen() -> None:
    """Power is steady up to batch 30, which is known three batches later."""
    watcher = Watcher(lambda batch: 0.2 if batch < 30 else 0.01)
    assert warmed(watcher.engine, watcher.talk, until_cv=0.05) == WarmupReport(
        batches=34, end="steady", step_cv=0.0, power_cv=0.01
    )


def test_steady_power_alone_is_not_enough() -> None:
    watcher = Watcher(lambda _: 0.01, step_ms=[100.0 + 50.0 * (n % 2) for n in range(20)] + [100.0])
    report = warmed(watcher.engine, watcher.talk, until_cv=0.05)
    assert (report.batches, report.end) == (25, "steady")


def test_the_limit_waits_for_what_power_was_by_then() -> None:
    watcher = Watcher(lambda _: 0.2)
    report = warmed(watcher.engine, watcher.talk, until_cv=0.05, max_batches=40)
    assert (report.batches, report.end, report.power_cv) == (44, "limit", 0.2)


def test_the_limit_does_not_come_before_power_can_be_known() -> None:
    """Five batches are over after 1.25 s; five stretches of 0.5 s end with batch 10."""
    watcher = Watcher(lambda batch: 0.01 if batch == 10 else None)
    report = warmed(watcher.engine, watcher.talk, until_cv=0.05, max_batches=5)
    assert (report.batches, report.end) == (14, "steady")


def test_power_that_is_never_told_ends_in_the_limit() -> None:
    watcher = Watcher(lambda _: None)
    report = warmed(watcher.engine, watcher.talk, until_cv=0.05, max_batches=40)
    assert (report.batches, report.end, report.power_cv) == (40 + ANSWER_S / 0.25, "limit", None)


def test_power_of_long_ago_does_not_count() -> None:
    """Told once, for batch 20: when step times are steady, at batch 75, it is 13 s old."""
    watcher = Watcher(lambda batch: 0.01 if batch == 20 else None, step_ms=[100.0 + 50.0 * (n % 2) for n in range(70)] + [100.0])
    report = warmed(watcher.engine, watcher.talk, until_cv=0.05, max_batches=80)
    assert (report.end, report.step_cv, report.power_cv) == ("limit", 0.0, 0.01)


def test_another_attempt_is_told_nothing() -> None:
    talk = WarmupTalk("t-r0", 2)
    talk.mark(1, 5)
    assert talk.tell("t-r0", 1, PowerSeen(batches=1, cv=0.0)).marks == ()
    assert talk.seen() is None
    assert talk.tell("t-r0", 2, PowerSeen(batches=7, cv=0.0)).marks == ((1, 5),)
    assert talk.seen() is None, "of a batch that it does not know"
