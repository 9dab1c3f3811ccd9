"""decide() as a table."""

from __future__ import annotations

from typing import get_args

import pytest

from llem_ray.core.energy import Window
from llem_ray.core.outcome import Completed, Failed, FailureKind
from llem_ray.execution.policy import FailurePolicy

POLICY = FailurePolicy(max_attempts=2, max_consecutive_failures=5)
DONE = Completed(window=Window(node="n", begin_ns=0, end_ns=1), spans=(), requests=(), steps=0, passes=1)


def failed(kind: FailureKind) -> Failed:
    return Failed(kind=kind, message="", traceback=None)


@pytest.mark.parametrize("kind", ["engine_died", "hang", "node_died", "sampler", "internal"])
def test_an_engine_that_failed_gets_another_attempt_and_no_more(kind: FailureKind) -> None:
    assert POLICY.decide(failed(kind), 1, 1) == "retry"
    assert POLICY.decide(failed(kind), 2, 2) == "skip"


@pytest.mark.parametrize("kind", ["out_of_memory", "numerics", "bad_request", "generation", "load"])
def test_a_trial_that_failed_is_not_tried_again(kind: FailureKind) -> None:
    assert POLICY.decide(failed(kind), 1, 1) == "skip"


def test_a_completed_trial_is_done_whatever_came_before() -> None:
    assert POLICY.decide(DONE, 9, 99) == "done"


@pytest.mark.parametrize("kind", get_args(FailureKind))
def test_failing_for_ever_aborts(kind: FailureKind) -> None:
    assert POLICY.decide(failed(kind), 1, 5) == "abort"


def test_the_user_s_word_aborts() -> None:
    assert POLICY.decide(failed("interrupted"), 1, 1) == "abort"


@pytest.mark.parametrize("kind", get_args(FailureKind))
def test_a_gang_lives_on_only_after_failures_of_the_trial(kind: FailureKind) -> None:
    assert FailurePolicy.gang_survives(failed(kind)) == (kind in {"out_of_memory", "numerics", "bad_request", "generation"})
    assert FailurePolicy.gang_survives(DONE)
