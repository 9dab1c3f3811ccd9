"""How an attempt at a trial ended: Completed or Failed, told apart by type."""

from __future__ import annotations

import traceback as tb
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from llem_ray.core.backend import RequestRecord
from llem_ray.core.energy import PhaseSpan, Window
from llem_ray.core.errors import (
    BackendError,
    ConfigError,
    DeviceMemoryError,
    EngineDied,
    HangError,
    LoadError,
    NodeLost,
    NumericsError,
    PluginError,
)
from llem_ray.core.measure_spec import WindowRule
from llem_ray.core.step_log import StepLog

FailureKind = Literal[
    "out_of_memory",
    "numerics",
    "bad_request",
    "load",
    "generation",
    "engine_died",
    "hang",
    "node_died",
    "sampler",
    "interrupted",
    "internal",
]
WarmupEnd = Literal["fixed", "steady", "limit"]
"""As many batches as asked; step time and power were steady; the limit came first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupReport:
    """What ran before a window."""

    batches: int
    end: WarmupEnd = "fixed"
    step_cv: float | None = None
    """Coefficient of variation of the last batches' step times; None where it was not asked for."""
    power_cv: float | None = None
    """The same of the gang's power over the latest stretches of batches whose samples were there; None where it is not known."""
    no_power: str | None = None
    """Why nobody looked at power although it was asked for; None where somebody did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineRun:
    """An online trial's run, of which its window is a part."""

    whole: Window
    """From the schedule's begin to the last answer."""
    rule: WindowRule
    """Which chose the window; never ``auto``."""
    concurrency: int
    """Realised: the most requests that were being answered at one instant."""
    missed: str | None
    """Why the run does not have the window that the rule names; the window then is the whole run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completed:
    """A trial that ran to its end."""

    window: Window
    """The measured window, on the engine node's clock."""
    spans: tuple[PhaseSpan, ...]
    """Adjoining spans of the attempt: warmup, guard, measured, guard, cooldown."""
    requests: tuple[RequestRecord, ...]
    """Every request of the window, all passes; ids are ``<pass>-<index>``. Of an online trial, every request of the run."""
    steps: int
    """Forward steps of the engine in the window."""
    passes: int
    step_log: StepLog | None = None
    """Those steps, of an online trial all of its run; None where they are not recorded."""
    notes: Mapping[str, str] = field(default_factory=dict)
    warmup: WarmupReport | None = None
    """None where nothing ran before the window."""
    online: OnlineRun | None = None
    """None where batches ran."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A trial that did not. Its energy is waste."""

    kind: FailureKind
    message: str
    traceback: str | None
    spans: tuple[PhaseSpan, ...] = ()


Outcome: TypeAlias = Completed | Failed


def failure_kind(error: BaseException) -> FailureKind:
    """The kind of failure an exception stands for."""
    kinds: tuple[tuple[type[BaseException], FailureKind], ...] = (
        (DeviceMemoryError, "out_of_memory"),
        (NumericsError, "numerics"),
        (HangError, "hang"),
        (NodeLost, "node_died"),
        (EngineDied, "engine_died"),
        (LoadError, "load"),
        (BackendError, "generation"),
        (ConfigError, "bad_request"),
        (PluginError, "load"),
        (KeyboardInterrupt, "interrupted"),
    )
    return next((kind for cls, kind in kinds if isinstance(error, cls)), "internal")


def failed_from(error: BaseException, spans: tuple[PhaseSpan, ...] = ()) -> Failed:
    """A Failed that carries the exception's message and traceback text."""
    text = "".join(tb.format_exception(error))
    return Failed(kind=failure_kind(error), message=str(error) or type(error).__name__, traceback=text, spans=spans)
