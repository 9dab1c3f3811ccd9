"""Every error llem-ray raises on purpose.

    LlemRayError                      exit code
    |- ConfigError                    2   the sweep file, a flag or an input file is wrong
    |- PlanError                      2   the sweep is well-formed but cannot become a plan
    |- PlacementError                 5   the resources the plan needs are not there
    |- PluginError                    5   an engine or power source is unknown or not installed
    |- BackendError                   3   an inference engine failed
    |  |- LoadError                       while it loaded the model
    |  |- GenerationError                 while it generated
    |  |- DeviceMemoryError               because the device's memory is too small
    |  |- NumericsError                   because it produced NaN or Inf logits
    |  |- HangError                       because it answered nothing before its deadline
    |  '- EngineDied                      its process ended
    |     |- NodeLost                     with the node it ran on
    |     '- Unreachable                  or not: nothing can be heard of it now
    |- PowerError                     4   a power source failed
    |  |- SourceUnavailable               the source does not exist on this host
    |  |- PowerPermissionDenied           it exists, but this user may not read it
    |  '- ReadFailed                      one read failed
    |- ResultsError                   5   the run directory cannot be read or written
    |  '- RunInUse                        another process works on it
    |- EnergyGateError                4   an energy gate failed under --require-energy
    '- TilingError                    1   phases of a ledger overlap or leave a hole

A class exists only where a caller would catch it. All of them pickle: every field goes to ``Exception.__init__``.
"""

from __future__ import annotations

from typing import ClassVar


class LlemRayError(Exception):
    """Base of every error llem-ray raises on purpose.

    Args:
        message: What is wrong, in one sentence.
        hint: What to do about it, or None.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ConfigError(LlemRayError):
    """Bad input: names file, line, field, what was found and what is allowed.

    Args:
        message: What is wrong, in one sentence.
        hint: What to do about it (a "did you mean", a command), or None.
        file: Path of the offending file, or None for a flag.
        line: 1-based line in that file, or None when it has no line.
        field: Dotted path of the field, such as ``base.model.dtype``.
        found: What stands there, shortened.
        allowed: What may stand there.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        file: str | None = None,
        line: int | None = None,
        field: str | None = None,
        found: str | None = None,
        allowed: str | None = None,
    ) -> None:
        Exception.__init__(self, message, hint, file, line, field, found, allowed)
        self.message = message
        self.hint = hint
        self.file = file
        self.line = line
        self.field = field
        self.found = found
        self.allowed = allowed

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        head = ": ".join(part for part in (where, self.field, self.message) if part)
        details = (("found", self.found), ("allowed", self.allowed), ("hint", self.hint))
        return "\n".join([head, *(f"  {name}: {text}" for name, text in details if text)])


class PlanError(LlemRayError):
    """The sweep is well-formed but cannot become a plan."""

    exit_code = 2


class PlacementError(LlemRayError):
    """The resources the plan needs are not there."""

    exit_code = 5


class PluginError(LlemRayError):
    """An engine or power source is unknown, or not installed."""

    exit_code = 5


class BackendError(LlemRayError):
    """An inference engine failed."""

    exit_code = 3


class LoadError(BackendError):
    """The engine could not load the model."""


class GenerationError(BackendError):
    """The engine failed while it generated."""


class DeviceMemoryError(BackendError):
    """The device's memory is too small for this trial."""


class NumericsError(BackendError):
    """The model produced NaN or Inf logits."""


class HangError(BackendError):
    """Nothing was heard before the deadline."""


class EngineDied(BackendError):
    """The engine's process ended without being asked to."""


class NodeLost(EngineDied):
    """A node of the gang is gone, or cannot be reached."""


class Unreachable(EngineDied):
    """A process cannot be reached now. It may be dead, or answer again later: what it was asked is lost either way."""


class PowerError(LlemRayError):
    """A power source failed."""

    exit_code = 4


class SourceUnavailable(PowerError):
    """The power source does not exist on this host."""


class PowerPermissionDenied(PowerError):
    """The power source exists, but this user may not read it."""


class ReadFailed(PowerError):
    """One read of a power source failed."""


class ResultsError(LlemRayError):
    """The run directory cannot be read or written."""

    exit_code = 5


class RunInUse(ResultsError):
    """Another process works on the run directory."""


class EnergyGateError(LlemRayError):
    """An energy gate failed under ``--require-energy``."""

    exit_code = 4


class TilingError(LlemRayError):
    """Phases of a ledger overlap or leave a hole: joules would be counted twice or lost."""
