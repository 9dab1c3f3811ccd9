"""What the user is shown while a run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressEvent:
    """Where a run is. A part that is not known yet is None."""

    trial: int
    """Trials settled so far, plus one while another runs."""
    total: int
    """Trials of the run, without those that turned out to be not needed."""
    phase: str
    label: str
    """The running trial's settings, short."""
    watts: float | None = None
    """Newest power of all devices together."""
    watts_estimated: bool = False
    """``watts`` is an estimate: nothing measures."""
    j_per_token: float | None = None
    """Mean of the valid trials so far, J per output token; of the estimates where nothing measures."""
    j_per_token_estimated: bool = False
    """``j_per_token`` is an estimate."""
    eta_s: float | None = None
    at_most: bool = False
    """Further trials may turn out to be not needed: ``total`` and ``eta_s`` are limits."""


class Progress(Protocol):
    """Somebody who shows progress. Called from the run driver's threads, so it must not block."""

    live: bool
    """Shown in place, every second: worth asking the gang what it does just now."""

    def update(self, event: ProgressEvent) -> None:
        """The run moved on, or time passed."""
        ...

    def message(self, text: str) -> None:
        """Something worth a line of its own: a failure, a retry, a request to stop."""
        ...


def format_setting(value: Any) -> str:
    """A value of a sweep file: text as it is, a distribution as ``normal(mean=60, std=8)``, all else as JSON."""
    if isinstance(value, Mapping) and "distribution" in value:
        inner = ", ".join(
            f"{key}={f'{item:g}' if isinstance(item, float) else json.dumps(item)}"
            for key, item in value.items()
            if key != "distribution"
        )
        return f"{value['distribution']}({inner})"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
