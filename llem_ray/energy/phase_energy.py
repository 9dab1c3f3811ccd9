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
from llem_ray.energy.phase_split import NoSplit, PhaseSplit, SplitMethod, long_run_variance, split_phases, step_table
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
    """Sum over the devices of a gang.

    They run the same steps, so that a step which draws more than its like errs on all of them at once: what ticks add to the
    errors is summed over the devices before it is squared. Never less than errors that have nothing in common would give.
    """
    return PhaseTotal(
        method=splits[0].method,
        prefill_j=sum(split.prefill_j for split in splits),
        prefill_u_j=_sum_u_j(splits, [split.prefill_u_j for split in splits], 0),
        decode_j=sum(split.decode_j for split in splits),
        decode_u_j=_sum_u_j(splits, [split.decode_u_j for split in splits], 1),
        rest_j=sum(split.rest_j for split in splits),
        residual_rel=max(split.residual_rel for split in splits),
    )


def _sum_u_j(splits: Sequence[PhaseSplit], u_j: Sequence[float], part: int) -> float:
    """One sigma of the sum of one part, J. Devices tick at different times: their errors meet on a common grid."""
    apart_j = float(np.hypot.reduce(u_j))
    if len(splits) == 1:
        return apart_j
    errors = [split.errors for split in splits]
    begin_s, end_s = max(each.edges_s[0] for each in errors), min(each.edges_s[-1] for each in errors)
    grid_s = np.linspace(begin_s, end_s, min(len(each.edges_s) for each in errors))
    reached_j = [np.interp(grid_s, each.edges_s, np.concatenate([[0.0], np.cumsum(each.added_j[:, part])])) for each in errors]
    together_j = float(np.sqrt(max(0.0, long_run_variance(np.diff(np.sum(reached_j, axis=0))))))
    return min(max(apart_j, together_j), sum(u_j))
