"""What to do after an attempt ended: a decision, which the run driver carries out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llem_ray.core.outcome import Completed, FailureKind, Outcome

Decision = Literal["done", "retry", "skip", "abort"]

_OF_THE_ENGINE: frozenset[FailureKind] = frozenset({"engine_died", "hang", "node_died", "sampler", "internal"})
"""The engine or its machine failed: the same trial may well succeed on a fresh gang."""

_KEEPS_THE_ENGINE: frozenset[FailureKind] = frozenset({"out_of_memory", "numerics", "bad_request", "generation"})
"""The trial failed and the loaded model is still good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FailurePolicy:
    """When to try again and when to give up.

    Args:
        max_attempts: Attempts at one trial whose engine failed.
        max_consecutive_failures: Trials that fail in a row before the sweep is stopped.
    """

    max_attempts: int
    max_consecutive_failures: int

    def decide(self, outcome: Outcome, attempt: int, consecutive_failures: int) -> Decision:
        """The next step after an attempt.

        Args:
            outcome: How it ended.
            attempt: Its number in this session, from 1.
            consecutive_failures: Failed attempts in a row, this one included.
        """
        if isinstance(outcome, Completed):
            return "done"
        if outcome.kind == "interrupted":
            return "abort"
        if consecutive_failures >= self.max_consecutive_failures:
            return "abort"
        if outcome.kind in _OF_THE_ENGINE and attempt < self.max_attempts:
            return "retry"
        return "skip"

    @staticmethod
    def gang_survives(outcome: Outcome) -> bool:
        """The gang can go on to the next trial."""
        return isinstance(outcome, Completed) or outcome.kind in _KEEPS_THE_ENGINE
