"""Warm-up: as many batches as asked, or until steps take the same time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from scripted import answered

from llem_ray.core.backend import Request, RequestRecord, StepEvent
from llem_ray.core.spec import WarmupSpec
from llem_ray.core.units import NS_PER_MS
from llem_ray.execution.warmup import variation, warm_up

ONE, TWO = ((Request(request_id=name, prompt_token_ids=(3,), max_new_tokens=2),) for name in "12")


class Engine:
    """Each batch: a prefill step of 50 ms, and decode steps that take what the script says."""

    def __init__(self, step_ms: Sequence[float], *, tells_steps: bool = True) -> None:
        self.served: list[str] = []
        self._step_ms, self._tells = step_ms, tells_steps

    def serve(self, batch: tuple[Request, ...]) -> Iterator[StepEvent | RequestRecord]:
        step_ms = self._step_ms[min(len(self.served), len(self._step_ms) - 1)]
        self.served.append(batch[0].request_id)
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


def test_a_fixed_number_of_batches_takes_the_workloads_in_turn() -> None:
    engine = Engine([1.0])
    report = warm_up(WarmupSpec(batches=3), [ONE, TWO], engine.serve)
    assert engine.served == ["1", "2", "1"]
    assert (report.batches, report.step_cv, report.steady) == (3, None, True)


@pytest.mark.parametrize("tells_steps", [True, False])
def test_it_goes_on_until_the_last_five_step_times_are_alike(tells_steps: bool) -> None:
    """10, 8, 6, 4, then 2 ms: five equal ones are batches 5 to 9."""
    engine = Engine([100.0, 80.0, 60.0, 40.0, 20.0], tells_steps=tells_steps)
    report = warm_up(WarmupSpec(batches=1, until_cv=0.01), [ONE, TWO], engine.serve)
    assert engine.served == ["1"] * 9
    assert (report.batches, report.step_cv, report.steady) == (9, 0.0, True)


def test_it_gives_up_at_the_limit_and_says_so() -> None:
    engine = Engine([1.0, 2.0] * 10)
    report = warm_up(WarmupSpec(until_cv=0.01, max_batches=7), [ONE], engine.serve)
    assert (report.batches, report.steady) == (7, False)
    assert report.step_cv == pytest.approx(variation([1, 2, 1, 2, 1]))


def test_no_fewer_batches_than_asked() -> None:
    assert warm_up(WarmupSpec(batches=8, until_cv=0.5), [ONE], Engine([1.0]).serve).batches == 8
