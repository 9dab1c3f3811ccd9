"""What a plan is expected to cost: from a past run, else from configured rates, else unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llem_ray.core.measure_spec import MeasureSpec
from llem_ray.core.plan import Estimate, LoadGroup, Trial
from llem_ray.core.spec import Rates
from llem_ray.core.units import kwh_from_j


@dataclass(frozen=True, kw_only=True, slots=True)
class PastRun:
    """What an earlier run cost, as its results say. Any part may be unknown."""

    name: str
    seconds_per_load: float | None = None
    """Mean time to load a model, s."""
    seconds_per_trial: float | None = None
    """Mean time of an attempt from warm-up to cool-down, s."""
    cell_seconds: Mapping[str, float] = field(default_factory=dict)
    """The same by cell id, s; preferred for the cells it holds."""
    mean_power_w: float | None = None
    """Mean power over the run of all devices that its total covers, W."""
    gpus: int = 0
    """GPUs among those devices; 0 for a run on the CPU."""


@dataclass(frozen=True, slots=True)
class _Costs:
    """The numbers an estimate starts from, and their origin."""

    seconds_per_load: float | None
    watts_per_gpu: float | None
    watts_on_cpu: float | None
    basis: str


def estimate_cost(groups: Sequence[LoadGroup], measure: MeasureSpec, rates: Rates, past: PastRun | None) -> Estimate:
    """Duration with one gang at a time, and the energy of the leased devices.

    Without a past run, a trial is taken to last as long as its minimum window, an open loop as its arrivals, given guards and
    cool-down: warm-up, and batches longer than ``min_window_s``, come on top. The basis says so.
    """
    costs = _costs(rates, past)
    if costs.seconds_per_load is None:
        reason = "time to load a model: set rates.seconds_per_load, or run it once"
        return Estimate(duration_s=None, energy_kwh=None, unknown={"duration_s": reason, "energy_kwh": reason}, basis="nothing")
    seconds = [_group_seconds(group, measure, costs.seconds_per_load, past) for group in groups]
    powers_w = [_group_watts(group, costs) for group in groups]
    unknown: dict[str, str] = {}
    energy_kwh = None
    if any(watts is None and group.gpus for watts, group in zip(powers_w, groups, strict=True)):
        unknown["energy_kwh"] = "power of a GPU: set rates.watts_per_gpu, or run it once on GPUs"
    elif any(watts is None for watts in powers_w):
        unknown["energy_kwh"] = "power of the CPU: no earlier run of this sweep measured it"
    else:
        energy_kwh = kwh_from_j(sum((watts or 0.0) * duration for watts, duration in zip(powers_w, seconds, strict=True)))
    return Estimate(duration_s=sum(seconds), energy_kwh=energy_kwh, unknown=unknown, basis=costs.basis)


def _costs(rates: Rates, past: PastRun | None) -> _Costs:
    if past is None:
        basis = "configured rates; warm-up and batches longer than min_window_s come on top"
        return _Costs(rates.seconds_per_load, rates.watts_per_gpu, None, basis)
    seconds_per_load = rates.seconds_per_load if past.seconds_per_load is None else past.seconds_per_load
    watts_per_gpu, watts_on_cpu = rates.watts_per_gpu, None
    if past.mean_power_w is not None and past.gpus:
        watts_per_gpu = past.mean_power_w / past.gpus
    elif past.mean_power_w is not None:
        watts_on_cpu = past.mean_power_w
    return _Costs(seconds_per_load, watts_per_gpu, watts_on_cpu, f"past run {past.name}")


def _group_seconds(group: LoadGroup, measure: MeasureSpec, seconds_per_load: float, past: PastRun | None) -> float:
    guard_s = 0.0 if measure.edge_guard_s == "auto" else measure.edge_guard_s
    by_cell = {} if past is None else past.cell_seconds

    def trial_s(trial: Trial) -> float:
        if past is not None and past.seconds_per_trial is not None:
            return past.seconds_per_trial
        return measure.least_run_s(trial.experiment.workload) + 2 * guard_s + measure.cooldown_s

    trials_s = sum(by_cell[cell_id] if (cell_id := trial.cell.cell_id) in by_cell else trial_s(trial) for trial in group.trials)
    return seconds_per_load + 2 * measure.idle_baseline_s + trials_s


def _group_watts(group: LoadGroup, costs: _Costs) -> float | None:
    if not group.gpus:
        return costs.watts_on_cpu
    return None if costs.watts_per_gpu is None else costs.watts_per_gpu * group.gpus
