"""The steps of a window, column by column: small in memory and on its way, however many there are."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Final, get_args

from llem_ray.core.backend import StepEvent, StepKind

STEP_KINDS: Final[tuple[StepKind, ...]] = get_args(StepKind)
"""What the numbers in ``StepLog.kind`` stand for."""

_NUMBER: Final = {kind: number for number, kind in enumerate(STEP_KINDS)}
_NAN: Final = float("nan")


@dataclass(slots=True)
class StepLog:
    """Steps in the order they were told. Every column has one item a step, 57 bytes together."""

    begin_ns: array[int] = field(default_factory=lambda: array("q"))
    end_ns: array[int] = field(default_factory=lambda: array("q"))
    kind: array[int] = field(default_factory=lambda: array("b"))
    """Index into ``STEP_KINDS``."""
    prefill_tokens: array[int] = field(default_factory=lambda: array("q"))
    decode_tokens: array[int] = field(default_factory=lambda: array("q"))
    computed_tokens: array[int] = field(default_factory=lambda: array("q"))
    flops: array[float] = field(default_factory=lambda: array("d"))
    """NaN where the engine does not tell."""
    read_bytes: array[float] = field(default_factory=lambda: array("d"))
    """NaN where the engine does not tell."""

    def add(self, step: StepEvent) -> None:
        """Append one step."""
        self.begin_ns.append(step.begin_ns)
        self.end_ns.append(step.end_ns)
        self.kind.append(_NUMBER[step.kind])
        self.prefill_tokens.append(step.prefill_tokens)
        self.decode_tokens.append(step.decode_tokens)
        self.computed_tokens.append(step.computed_tokens)
        self.flops.append(_NAN if step.flops is None else step.flops)
        self.read_bytes.append(_NAN if step.read_bytes is None else step.read_bytes)

    def __len__(self) -> int:
        return len(self.begin_ns)
