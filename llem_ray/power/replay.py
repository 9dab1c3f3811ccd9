"""Plays recorded samples back as if a meter read them now: the whole tool on a laptop, with a real trace."""

from __future__ import annotations

import csv
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Final, cast, get_args

from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.errors import ConfigError, SourceUnavailable
from llem_ray.core.power import Device, DeviceState, PowerSample, Scope
from llem_ray.core.units import MJ_PER_J, MW_PER_W, NS_PER_S

REQUIRED: Final = ("t_s", "device_uuid", "power_w")
OPTIONAL: Final = ("power_avg_w", "energy_j", "scope")
_COLUMNS: Final = ", ".join((*REQUIRED, *(f"[{name}]" for name in OPTIONAL)))


@dataclass(slots=True)
class _Recording:
    """One device's rows, ascending in time from the recording's first row on. Empty cells are None."""

    t_s: list[float] = field(default_factory=list)
    power_w: list[float | None] = field(default_factory=list)
    power_avg_w: list[float | None] = field(default_factory=list)
    energy_j: list[float | None] = field(default_factory=list)
    scope: Scope = "gpu"

    @property
    def has_counter(self) -> bool:
        return any(energy_j is not None for energy_j in self.energy_j)

    def rise_j(self) -> float:
        """What the counter gains in one round of a loop: its rise, and once more its mean step; 0 without a counter."""
        counts = [energy_j for energy_j in self.energy_j if energy_j is not None]
        return (counts[-1] - counts[0]) * len(counts) / (len(counts) - 1) if len(counts) > 1 else 0.0


class ReplaySource:
    """A meter whose readings come from a CSV file.

    Columns: t_s, device_uuid, power_w; optional: power_avg_w, energy_j (a counter) and scope (default gpu; a device's first
    row counts). An empty cell is a reading that was missing.

    Time starts at the first row when the source is opened. A read gives each device's latest row by then, as a sensor
    holds its last value; before a device's first row, and after the end of the file, it gives an error. A looped recording
    starts over after its last row plus its mean spacing, and its energy counter goes on from where it was.

    Args:
        path: The file; None takes ``LLEM_RAY_REPLAY``.
        clock: Clock to play on and to stamp the samples with.
        loop: Start over at the end; None takes ``LLEM_RAY_REPLAY_LOOP`` (1 or 0, default 0).

    Raises:
        SourceUnavailable: No file is named.
        ConfigError: The file cannot be read; names line and column.
    """

    name = "replay"
    max_hz = 1000.0
    lag_s = 0.0

    def __init__(self, path: Path | None = None, *, clock: Clock | None = None, loop: bool | None = None) -> None:
        if path is None:
            named = os.environ.get("LLEM_RAY_REPLAY")
            if not named:
                raise SourceUnavailable("replay: no recording", "set LLEM_RAY_REPLAY to a CSV file with the columns " + _COLUMNS)
            path = Path(named)
        self._clock = clock or SystemClock()
        self._loop = os.environ.get("LLEM_RAY_REPLAY_LOOP", "0") not in ("", "0") if loop is None else loop
        self._recordings = read_recording(path)
        rows = [recording for recording in self._recordings.values() if len(recording.t_s) > 1]
        spacing_s = max((r.t_s[-1] - r.t_s[0]) / (len(r.t_s) - 1) for r in rows) if rows else 1.0
        self._end_s = max(recording.t_s[-1] for recording in self._recordings.values()) + spacing_s
        self._rise_j = {uuid: recording.rise_j() for uuid, recording in self._recordings.items()}
        self._begin_ns = self._clock.monotonic_ns()

    def devices(self) -> tuple[Device, ...]:
        """The devices of the recording, in order of appearance."""
        return tuple(
            Device(
                uuid=uuid,
                name=f"replay of {uuid}",
                source=self.name,
                scope=recording.scope,
                method="measured_counter" if recording.has_counter else "measured_power_integral",
                index=i,
            )
            for i, (uuid, recording) in enumerate(self._recordings.items())
        )

    def read(self) -> Sequence[PowerSample]:
        """The row in force now, one a device."""
        t_ns = self._clock.monotonic_ns()
        elapsed_s = (t_ns - self._begin_ns) / NS_PER_S
        rounds = int(elapsed_s // self._end_s) if self._loop else 0
        at_s = elapsed_s - rounds * self._end_s
        return [self._sample(t_ns, uuid, at_s, rounds) for uuid in self._recordings]

    def read_states(self) -> Sequence[DeviceState]:
        """None are recorded."""
        return ()

    def close(self) -> None:
        """Nothing to release."""

    def _sample(self, t_ns: int, uuid: str, at_s: float, rounds: int) -> PowerSample:
        recording = self._recordings[uuid]
        row = bisect_right(recording.t_s, at_s) - 1
        error = None
        if row < 0:
            error = "the recording of this device has not begun"
        elif at_s >= self._end_s:
            error = "the recording is over"
        if error is not None:
            return PowerSample(
                t_ns=t_ns, hw_ns=0, device_uuid=uuid, power_mw=None, power_avg_mw=None, energy_mj=None, error=error
            )
        energy_j = recording.energy_j[row]
        if energy_j is not None:
            energy_j += rounds * self._rise_j[uuid]
        return PowerSample(
            t_ns=t_ns,
            hw_ns=0,
            device_uuid=uuid,
            power_mw=_scaled(recording.power_w[row], MW_PER_W),
            power_avg_mw=_scaled(recording.power_avg_w[row], MW_PER_W),
            energy_mj=_scaled(energy_j, MJ_PER_J),
        )


def read_recording(path: Path) -> Mapping[str, _Recording]:
    """Device UUID -> its rows, with the first row of the file at 0 s.

    Raises:
        ConfigError: The file is missing, is not such a CSV file, has no rows, or time runs backwards in it.
    """
    recordings: dict[str, _Recording] = {}
    first_s: float | None = None
    for line, row in _rows(path):
        t_s = _number(path, line, "t_s", row["t_s"])
        uuid = (row["device_uuid"] or "").strip()
        if t_s is None or not uuid:
            raise ConfigError("is empty", file=str(path), line=line, field="t_s" if t_s is None else "device_uuid")
        first_s = t_s if first_s is None else first_s
        if uuid not in recordings:
            recordings[uuid] = _Recording(scope=_scope(path, line, row.get("scope")))
        recording = recordings[uuid]
        at_s = t_s - first_s
        if at_s < 0 or (recording.t_s and at_s <= recording.t_s[-1]):
            raise ConfigError(
                "time must rise from row to row of a device", file=str(path), line=line, field="t_s", found=row["t_s"]
            )
        recording.t_s.append(at_s)
        recording.power_w.append(_number(path, line, "power_w", row["power_w"]))
        recording.power_avg_w.append(_number(path, line, "power_avg_w", row.get("power_avg_w")))
        recording.energy_j.append(_number(path, line, "energy_j", row.get("energy_j")))
    if not recordings:
        raise ConfigError("the recording has no rows", file=str(path))
    return recordings


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            if set(REQUIRED) - set(names) or set(names) - set(REQUIRED) - set(OPTIONAL):
                raise ConfigError("wrong columns", file=str(path), line=1, found=", ".join(names) or "nothing", allowed=_COLUMNS)
            for row in reader:
                if None in row or None in row.values():
                    raise ConfigError(f"must have {len(names)} cells", file=str(path), line=reader.line_num)
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"the recording cannot be read: {error}", file=str(path)) from error


def _number(path: Path, line: int, column: str, text: str | None) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise ConfigError("is not a number", file=str(path), line=line, field=column, found=text, allowed="a finite number")
    return number


def _scope(path: Path, line: int, text: str | None) -> Scope:
    for scope in get_args(Scope):
        if (text or "gpu").strip() == scope:
            return cast("Scope", scope)
    allowed = ", ".join(get_args(Scope))
    raise ConfigError("is not a scope", file=str(path), line=line, field="scope", found=text, allowed=allowed)


def _scaled(number: float | None, factor: float) -> float | None:
    return None if number is None else number * factor
