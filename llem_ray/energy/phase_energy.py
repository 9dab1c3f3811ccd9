"""What prefill and decode cost a whole gang: the split of each of its devices, summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llem_ray.core.backend import StepKind
from llem_ray.core.energy import Window
from llem_ray.core.power import Calibration, Int64, Trace
from llem_ray.core.step_log import STEP_KINDS, StepLog
from llem_ray.core.units import NS_PER_S
from llem_ray.energy.phase_split import NoSplit, PhaseSplit, SplitMethod, split_phases, step_table
from llem_ray.energy.readings import clean, monotone_piece
from llem_ray.energy.ticks import find_ticks

_MIXED: StepKind = "mixed"


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseTotal:
    """Energy of a gang in one window, by phase, J. The three parts add up to the window's energy."""

    method: SplitMethod
    prefill_j: float
    prefill_u_j: float
    """One sigma."""
    decode_j: float
    decode_u_j: float
    rest_j: float
    residual_rel: float
    """The worst device's."""


def split_device(
    log: StepLog,
    marked: Window,
    window: Window,
    *,
    calibration: Calibration,
    trace: Trace,
    sample_period_s: float,
    energy_j: float,
) -> PhaseSplit | NoSplit:
    """Split one device's energy of a window.

    Args:
        log: Steps of the window, on the clock of the host that marked it.
        marked: The window on that clock.
        window: The window on the clock of the device's host.
        calibration: What the device's sensor was found to do.
        trace: Its samples around the window.
        sample_period_s: Time between polls of it.
        energy_j: Its energy by the counter.
    """
    piece, faults = monotone_piece(clean(trace, window).trace, window)
    if faults:
        return NoSplit(reason=faults[0].detail)
    ticks = find_ticks(piece, calibration, sample_period_s=sample_period_s, origin_ns=window.begin_ns)
    steps = step_table(
        moved_stamps(log.begin_ns, marked, window),
        moved_stamps(log.end_ns, marked, window),
        log.prefill_tokens,
        log.decode_tokens,
        np.asarray(log.kind) == STEP_KINDS.index(_MIXED),
        window.begin_ns,
    )
    slack_s = calibration.lag_s + window.delta_ns / NS_PER_S
    return split_phases(ticks, steps, 0.0, window.duration_s, energy_j, slack_s=slack_s)


def moved_stamps(stamps_ns: Sequence[int], marked: Window, window: Window) -> Int64:
    """Times on the clock of ``marked`` on the clock of ``window``, the same window on another host; drift falls evenly on it."""
    at_ns = np.asarray(stamps_ns, np.int64)
    begin_ns, end_ns = window.begin_ns - marked.begin_ns, window.end_ns - marked.end_ns
    share = (at_ns - marked.begin_ns) / max(1, marked.end_ns - marked.begin_ns)
    moved: Int64 = at_ns + begin_ns + np.rint(share * (end_ns - begin_ns)).astype(np.int64)
    return moved


def sum_splits(splits: Sequence[PhaseSplit]) -> PhaseTotal:
    """Sum over the devices of a gang; errors add in quadrature."""
    return PhaseTotal(
        method=splits[0].method,
        prefill_j=sum(split.prefill_j for split in splits),
        prefill_u_j=float(np.hypot.reduce([split.prefill_u_j for split in splits])),
        decode_j=sum(split.decode_j for split in splits),
        decode_u_j=float(np.hypot.reduce([split.decode_u_j for split in splits])),
        rest_j=sum(split.rest_j for split in splits),
        residual_rel=max(split.residual_rel for split in splits),
    )
