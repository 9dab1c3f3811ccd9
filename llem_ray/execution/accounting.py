"""The energy side of bookkeeping: samples of the meter and what happened, to columns of the ``trials`` table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from llem_ray.core.energy import Baseline, EnergyReading, EnergyTotal, Flag, PhaseSpan, Window
from llem_ray.core.measure_spec import FootprintSpec, MeasureSpec
from llem_ray.core.outcome import Completed
from llem_ray.core.power import Trace
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.energy import metrics
from llem_ray.energy.balance import idle_bubble_share, rank_imbalance
from llem_ray.energy.estimator import read_window
from llem_ray.energy.idle import idle_baseline, net_energy, sum_net
from llem_ray.energy.phase_split import NoSplit
from llem_ray.energy.request_share import BY_PHASES, BY_TOTAL_TOKENS
from llem_ray.energy.stationarity import Trend, bin_power_w, bin_tokens, check_drift, edges_ns, trend
from llem_ray.energy.total import sum_readings
from llem_ray.energy.validity import check_errors, check_foreign_load, flag
from llem_ray.execution.clock_windows import moved_window
from llem_ray.execution.completeness import cluster_columns, node_columns
from llem_ray.execution.computing import flop_columns
from llem_ray.execution.footprint import Footprint, footprint_columns, look_up_footprint
from llem_ray.execution.load_rows import counts_of, goodput_columns, load_flags
from llem_ray.execution.meter import GPU_SCOPES, Meter
from llem_ray.execution.phases import phase_columns, split_gang
from llem_ray.execution.records import AttemptEnded, DeviceKey, GangRecord, HostDevice, IdleTaken, LoadEnded
from llem_ray.results.rows import device_columns, flag_columns

Row = dict[str, Any]

METHODS_BY_STRENGTH: Final = ("measured_counter", "measured_power_integral", "estimated_model", "unavailable")
SILENT_S: Final = 0.5
"""A device whose samples end so long before a window does was not read to its end."""
STATE_NS: Final = 5 * NS_PER_S
"""A state that is older says nothing."""
ESTIMATE_NOTE: Final = "modelled from CPU load and memory size, not measured"


class Accounts:
    """What a run's gangs spent, by window.

    Args:
        measure: Gates and settings.
        meter: Where samples come from.
        footprint: What a kWh emits and costs; default: nothing is known.
    """

    def __init__(self, measure: MeasureSpec, meter: Meter, footprint: Footprint | None = None) -> None:
        self._footprint = footprint or look_up_footprint(FootprintSpec())
        self._measure, self._gates = measure, measure.gates
        self._meter = meter
        self._foreign: dict[DeviceKey, tuple[Flag, ...]] = {}
        self._bare_power_w: dict[DeviceKey, float] = {}

    def take_idle(self, idle: IdleTaken) -> None:
        """Idle power of every device of the gang's hosts; before the load also whether somebody else uses it."""
        gang, span = idle.gang, idle.span
        for item in (*gang.devices, *gang.context):
            window = self._window_on(item.host, span.begin_ns, span.end_ns)
            if window is None:
                continue
            baseline = self._baseline(item, window, resident=idle.resident)
            (gang.resident if idle.resident else gang.bare)[item.key] = baseline
            if not idle.resident:
                self._check_foreign(gang, item, window, baseline)

    def take_load(self, load: LoadEnded) -> None:
        """Energy of loading the model."""
        load.gang.load_energy_j = _not_guessed(self._sum(load.gang, load.span)).energy_j

    def energy_columns(self, ended: AttemptEnded) -> Row:
        """Every energy column of one attempt's row."""
        gang, outcome = ended.gang, ended.outcome
        if gang is None:
            return {"energy_reason": "no gang ran", "power_valid": False, "est_reason": "no gang ran"}
        if not isinstance(outcome, Completed):
            waste = _not_guessed(self._sum(gang, PhaseSpan(phase="waste", begin_ns=ended.begin_ns, end_ns=ended.end_ns)))
            reason = "the attempt failed: its energy is waste"
            if waste.energy_j is None:
                reason = f"the attempt failed, and its waste is not known: {waste.reason}"
            return {"waste_energy_j": waste.energy_j, "energy_reason": reason, "power_valid": False, "est_reason": reason}
        window = outcome.window
        held = self._read_all(gang, gang.devices, window)
        context = self._read_all(gang, gang.context, window)
        total = self._total(gang, held)
        drifts = self._drifts(gang, outcome)
        flags = [*_flags(held), *self._trial_flags(ended, gang, outcome, held)]
        flags += [item for what, found in drifts.items() for item in check_drift(what, found, self._gates.max_drift_rel)]
        counts = counts_of(outcome)
        tokens = (counts.prompt_tokens, counts.output_tokens)
        valid = total.energy_j is not None and not any(item.severity == "invalid" for item in flags)
        row = _total_columns(total, held, gang, window.duration_s)
        row |= flag_columns(flags) | device_columns([*held, *context]) | {"power_valid": valid}
        row |= _host_columns([*held, *context]) | _net_columns(gang, held, window, total.u_j)
        energy_j = total.energy_j if valid else None
        row |= _per_token(energy_j, *tokens, counts.succeeded)
        row |= self._phase_columns(gang, outcome, held, valid=valid)
        parts = (
            flop_columns(gang, outcome, energy_j),
            footprint_columns(self._footprint, energy_j),
            self._run_columns(gang, outcome, valid=valid),
        )
        for more in parts:
            reasons = {**(row["null_reasons"] or {}), **more.get("null_reasons", {})}
            row |= more | {"null_reasons": reasons or None}
        power_w = metrics.avg_total_gpu_power_w(energy_j, window.duration_s)
        row |= goodput_columns(outcome, self._measure.slo, power_w)
        row |= _drift_columns(drifts)
        row |= node_columns(gang, self._meter, window, held, context)
        row |= cluster_columns(gang, self._meter, window, held, context)
        row |= self._balance_columns(gang, held, window)
        if total.energy_j is None and len(gang.hosts) > 1 and any(reading.energy_j is not None for reading in held):
            row["status"] = "partial"
        return row | _estimate_columns(context, tokens[1], gpus=gang.group.gpus)

    def _read_all(self, gang: GangRecord, items: Iterable[HostDevice], window: Window) -> list[EnergyReading]:
        return [self._read(gang, item, window) for item in items]

    def _read(self, gang: GangRecord, item: HostDevice, window: Window) -> EnergyReading:
        """One device over a window that may have been marked on another host."""
        device, host = item.device, item.host
        local = self._moved(window, host)
        if local is None:
            return _unread(item, window, f"the clock of {self._meter.hostname(host)} is not known")
        if gang.generations.get(host, 0) != self._meter.generation(host):
            return _unread(item, window, f"{self._meter.hostname(host)} was restarted: its clock is another one")
        if reason := self._silent(item, local):
            return _unread(item, window, reason)
        idle = gang.resident.get(item.key) or gang.bare.get(item.key)
        errors = self._meter.errors(host, device.uuid, local.begin_ns, local.end_ns)
        reading = read_window(
            device=device,
            calibration=self._meter.calibration(host, device),
            trace=self._trace(item, local),
            window=local,
            sample_period_s=self._meter.period_s(host, device),
            gates=self._gates,
            idle_power_w=idle.power_w if idle else None,
            states=self._meter.states(host, device.uuid, local.begin_ns - ns_from_s(2.0), local.end_ns),
        )
        return replace(reading, flags=(*reading.flags, *check_errors(errors, local.begin_ns, local.end_ns)))

    def _silent(self, item: HostDevice, local: Window) -> str | None:
        """Why a device has no energy although it was read at first: its samples ended within the window. No end is guessed."""
        last_ns = self._meter.last_ns(item.host, item.device.uuid)
        slack_s = SILENT_S + 2 * self._meter.period_s(item.host, item.device)
        if last_ns is None or local.end_ns - last_ns <= ns_from_s(slack_s):
            return None
        left_s = (local.end_ns - max(last_ns, local.begin_ns)) / NS_PER_S
        return f"no sample from {self._meter.hostname(item.host)} in the last {left_s:.1f} s"

    def _moved(self, window: Window, host: str) -> Window | None:
        """The window on another host's clock, with what is known of both offsets; None when one is not known."""
        return moved_window(window, host, self._meter.clocks)

    def _window_on(self, host: str, begin_ns: int, end_ns: int) -> Window | None:
        """A stretch of the run driver's time on a host's clock."""
        begin, end = self._meter.clocks.offset(host, begin_ns), self._meter.clocks.offset(host, end_ns)
        if begin is None or end is None:
            return None
        return Window(
            node=host,
            begin_ns=begin_ns + begin.offset_ns,
            end_ns=end_ns + end.offset_ns,
            delta_ns=max(begin.delta_ns, end.delta_ns),
        )

    def _trace(self, item: HostDevice, window: Window) -> Trace:
        margin_ns = ns_from_s(self._meter.margin_s(item.host, item.device))
        return self._meter.trace(item.host, item.device.uuid, window.begin_ns - margin_ns, window.end_ns + margin_ns)

    def _total(self, gang: GangRecord, readings: Sequence[EnergyReading]) -> EnergyTotal:
        return sum_readings(readings, {item.key for item in gang.devices})

    def _sum(self, gang: GangRecord, span: PhaseSpan) -> EnergyTotal:
        """Energy of the gang over a stretch of the run driver's time."""
        readings = []
        for item in gang.devices:
            window = self._window_on(item.host, span.begin_ns, span.end_ns)
            if window is not None:
                readings.append(self._read(gang, item, window))
        return self._total(gang, readings)

    def _baseline(self, item: HostDevice, window: Window, *, resident: bool) -> Baseline:
        return idle_baseline(
            device=item.device,
            calibration=self._meter.calibration(item.host, item.device),
            trace=self._trace(item, window),
            window=window,
            sample_period_s=self._meter.period_s(item.host, item.device),
            kind="resident" if resident else "bare",
        )

    def _check_foreign(self, gang: GangRecord, item: HostDevice, window: Window, baseline: Baseline) -> None:
        """Before our model is loaded: memory in use, or idle power above the lowest seen on this device in this run."""
        if item.device.scope not in GPU_SCOPES:
            return
        # States are polled once a second or so: a short idle may lie between two of them.
        states = self._meter.states(item.host, item.device.uuid, min(window.begin_ns, window.end_ns - STATE_NS), window.end_ns)
        known = [state for state in states if state.memory_used_bytes is not None]
        inside = [state for state in known if state.t_ns >= window.begin_ns]
        used = [state.memory_used_bytes for state in inside or known[-1:] if state.memory_used_bytes is not None]
        if used:
            gang.bare_memory_bytes[item.key] = used[-1]
        self._foreign[item.key] = check_foreign_load(
            memory_used_bytes=max(used) if used else None,
            idle_power_w=baseline.power_w,
            baseline_power_w=self._bare_power_w.get(item.key),
        )
        if baseline.power_w is not None:
            self._bare_power_w[item.key] = min(baseline.power_w, self._bare_power_w.get(item.key, baseline.power_w))

    def _trial_flags(
        self, ended: AttemptEnded, gang: GangRecord, outcome: Completed, held: Sequence[EnergyReading]
    ) -> Iterable[Flag]:
        for item in gang.devices:
            yield from self._foreign.get(item.key, ())
        if gang.loaded is not None and gang.loaded.report.random_weights:
            yield flag("random_weights", "weights drawn at random")
        if gang.neighbours:
            yield flag("shared_node", f"beside {', '.join(sorted(gang.neighbours))}")
        for host in gang.hosts if len(gang.hosts) > 1 else ():
            mine = [reading for reading in held if reading.node == host]
            if mine and all(reading.energy_j is None for reading in mine):
                yield flag("node_missing", f"{self._meter.hostname(host)}: {mine[0].reason or 'no energy'}")
        workload = ended.trial.experiment.workload
        wrong = [r for r in outcome.requests if workload.ignore_eos and r.output_tokens != r.requested_tokens]
        if wrong:
            detail = f"{len(wrong)} of {len(outcome.requests)} requests, the first gave {wrong[0].output_tokens}"
            yield flag("token_count_mismatch", f"{detail} tokens instead of {wrong[0].requested_tokens}")
        if ended.hot is not None:
            yield flag("not_cooled_down", ended.hot)
        yield from load_flags(outcome, workload.load, self._measure)

    def _phase_columns(self, gang: GangRecord, outcome: Completed, held: Sequence[EnergyReading], *, valid: bool) -> Row:
        """What prefill and decode cost, and the rule by which requests share the window's energy."""
        split = split_gang(gang, self._meter, outcome, held) if valid else NoSplit(reason="the energy is invalid")
        row = phase_columns(split, gpus=gang.group.gpus)
        counts = counts_of(outcome)
        if valid and counts.prompt_tokens + counts.output_tokens:
            row["request_energy_rule"] = BY_TOTAL_TOKENS if isinstance(split, NoSplit) else BY_PHASES
        return row

    def _run_columns(self, gang: GangRecord, outcome: Completed, *, valid: bool) -> Row:
        """Energy of the whole run beside that of the window."""
        if outcome.online is None:
            return {}
        held = self._read_all(gang, gang.devices, outcome.online.whole)
        total = self._total(gang, held)
        wrong = [item for item in _flags(held) if item.severity == "invalid"]
        tokens = sum(record.output_tokens for record in outcome.requests)
        per_token = metrics.joules_per_output_token(total.energy_j if valid and not wrong else None, tokens)
        row: Row = {"run_energy_j": total.energy_j, "run_energy_u_j": total.u_j, "run_joules_per_output_token": per_token}
        if valid and wrong:
            row["null_reasons"] = {"run_joules_per_output_token": f"of the whole run, {wrong[0].code}: {wrong[0].detail}"}
        return row

    def _drifts(self, gang: GangRecord, outcome: Completed) -> dict[str, Trend | None]:
        """Trends of power and throughput across the window; None where they are not known."""
        window = outcome.window
        edges = edges_ns(window.begin_ns, window.end_ns)
        if edges is None:
            return {"power": None, "throughput": None}
        times_ns = np.asarray([t for record in outcome.requests for t in record.token_times_ns], np.int64)
        return {"power": self._power_trend(gang, window), "throughput": trend(bin_tokens(times_ns, edges))}

    def _power_trend(self, gang: GangRecord, window: Window) -> Trend | None:
        powers_w = []
        for item in gang.devices:
            local = self._moved(window, item.host)
            edges = None if local is None else edges_ns(local.begin_ns, local.end_ns)
            power_w = None if local is None or edges is None else bin_power_w(self._trace(item, local), edges)
            if power_w is None:
                return None
            powers_w.append(power_w)
        return trend(np.sum(powers_w, axis=0)) if powers_w else None

    def _balance_columns(self, gang: GangRecord, held: Sequence[EnergyReading], window: Window) -> Row:
        """How evenly the gang's GPUs worked."""
        if not gang.group.gpus:
            return {}
        shares = []
        for item in gang.devices:
            local, idle = self._moved(window, item.host), gang.resident.get(item.key) or gang.bare.get(item.key)
            if local is None or idle is None or idle.power_w is None:
                continue
            trace = self._meter.trace(item.host, item.device.uuid, local.begin_ns, local.end_ns)
            share = idle_bubble_share(trace.power_mw, idle.power_w)
            if share is not None:
                shares.append(share)
        energies_j = [reading.energy_j for reading in held if reading.energy_j is not None]
        return {
            "idle_bubble_share": sum(shares) / len(shares) if shares and len(shares) == len(held) else None,
            "rank_imbalance": rank_imbalance(energies_j) if len(energies_j) == len(held) else None,
        }


def _is_guessed(reading: EnergyReading) -> bool:
    """Power was integrated over holes: fewer samples than the gate asks for, and no counter that went on meanwhile."""
    return reading.method == "measured_power_integral" and any(flag.code == "dropped_samples" for flag in reading.flags)


def _not_guessed(total: EnergyTotal) -> EnergyTotal:
    """The total, without its energy where a part is a guess."""
    if not any(map(_is_guessed, total.parts)):
        return total
    return replace(total, energy_j=None, reason="too many samples are missing")


def _unread(item: HostDevice, window: Window, reason: str) -> EnergyReading:
    return EnergyReading(
        node=item.host,
        device_uuid=item.device.uuid,
        name=item.device.name,
        source=item.device.source,
        scope=item.device.scope,
        method="unavailable",
        energy_j=None,
        u_j=None,
        bound_j=None,
        cross_check_j=None,
        cross_check_ratio=None,
        sensor_rel=item.device.sensor_rel,
        shift_w=None,
        delta_s=window.delta_ns / 1e9,
        lag_s=0.0,
        coverage=0.0,
        mean_power_w=None,
        reason=reason,
    )


def _drift_columns(drifts: dict[str, Trend | None]) -> Row:
    row: Row = {}
    for what, found in drifts.items():
        row |= {f"{what}_drift_rel": found.drift_rel if found else None, f"{what}_trend_p": found.p_value if found else None}
    return row


def _flags(readings: Iterable[EnergyReading]) -> Iterable[Flag]:
    for reading in readings:
        yield from reading.flags


def _net_columns(gang: GangRecord, held: Sequence[EnergyReading], window: Window, energy_u_j: float | None) -> Row:
    """Energy above the idle power of the gang's devices with the model loaded; never without the gross beside it."""
    idle_w = _sum_power(gang.resident, gang.devices)
    parts = [net_energy(reading, gang.resident.get((reading.node, reading.device_uuid)), window) for reading in held]
    net = sum_net(parts, energy_u_j)
    return {
        "bare_idle_power_w": _sum_power(gang.bare, gang.devices),
        "idle_power_w": idle_w,
        "idle_energy_j": None if idle_w is None else idle_w * window.duration_s,
        "net_energy_j": net.energy_j,
        "net_energy_u_j": net.u_j,
        "null_reasons": {"net_energy_j": net.reason} if net.energy_j is None and net.reason else None,
    }


def _sum_power(baselines: dict[DeviceKey, Baseline], items: Sequence[HostDevice]) -> float | None:
    powers_w = [line.power_w if (line := baselines.get(item.key)) else None for item in items]
    known_w = [power_w for power_w in powers_w if power_w is not None]
    return sum(known_w) if known_w and len(known_w) == len(powers_w) else None


def _total_columns(total: EnergyTotal, held: Sequence[EnergyReading], gang: GangRecord, window_s: float) -> Row:
    """The measured total, its uncertainty and its checks."""
    energy_j = total.energy_j
    row: Row = {
        "total_energy_j": energy_j,
        "total_gpu_energy_j": energy_j if gang.group.gpus else None,
        "energy_u_j": total.u_j,
        "energy_uncertainty_j": None if total.u_j is None else 2 * total.u_j,
        "energy_sensor_j": total.sensor_j,
        "coverage": min((reading.coverage for reading in held), default=None),
        "energy_source": ", ".join(dict.fromkeys(reading.source for reading in held)) or None,
        "energy_method": max((reading.method for reading in held), key=METHODS_BY_STRENGTH.index, default="unavailable"),
        "energy_covers": list(total.covers),
        "energy_not_measured": list(total.not_measured),
        "energy_reason": gang.reason or total.reason,
    }
    if energy_j is None:
        return row
    bounds = [reading.bound_j for reading in held]
    if all(bound is not None for bound in bounds):
        row["energy_bound_lo_j"] = sum(bound[0] for bound in bounds if bound)
        row["energy_bound_hi_j"] = sum(bound[1] for bound in bounds if bound)
    checks = [reading.cross_check_j for reading in held]
    if all(check is not None for check in checks):
        row["cross_check_j"] = sum(check for check in checks if check is not None)
        row["cross_check_ratio"] = row["cross_check_j"] / energy_j if energy_j > 0 else None
    if total.sensor_j is not None and energy_j > 0:
        row["sensor_rel"] = total.sensor_j / energy_j
    row["energy_delay_product_js"] = metrics.energy_delay_product_js(energy_j, window_s)
    row["avg_power_w"] = metrics.avg_power_w(energy_j, window_s, len(held)) if gang.group.gpus else None
    row["avg_total_gpu_power_w"] = metrics.avg_total_gpu_power_w(energy_j, window_s) if gang.group.gpus else None
    return row


def _host_columns(readings: Sequence[EnergyReading]) -> Row:
    """Measured CPU and memory of the gang's hosts, whether or not the total covers them."""
    return {
        "host_cpu_energy_j": _sum_scope(readings, "cpu_package", estimated=False),
        "dram_energy_j": _sum_scope(readings, "dram", estimated=False),
    }


def _estimate_columns(context: Sequence[EnergyReading], output_tokens: int, *, gpus: int) -> Row:
    cpu_j, dram_j = (_sum_scope(context, scope, estimated=True) for scope in ("cpu_package", "dram"))
    known_j = [part_j for part_j in (cpu_j, dram_j) if part_j is not None]
    row: Row = {"est_cpu_energy_j": cpu_j, "est_dram_energy_j": dram_j}
    if not known_j:
        return row | {"est_reason": "no power source estimates on this host"}
    row |= {"est_energy_j": sum(known_j), "est_reason": ESTIMATE_NOTE}
    if output_tokens and not gpus:  # of a gang on GPUs the estimate lacks the most: no J/token
        row["est_joules_per_output_token"] = sum(known_j) / output_tokens
    return row


def _sum_scope(readings: Sequence[EnergyReading], scope: str, *, estimated: bool) -> float | None:
    parts = [r.energy_j for r in readings if r.scope == scope and (r.method == "estimated_model") == estimated]
    known = [part for part in parts if part is not None]
    return sum(known) if known and len(known) == len(parts) else None


def _per_token(energy_j: float | None, input_tokens: int, output_tokens: int, succeeded: int) -> Row:
    """Each quotient has its own denominator."""
    return {
        "joules_per_output_token": metrics.joules_per_output_token(energy_j, output_tokens),
        "joules_per_input_token": metrics.joules_per_input_token(energy_j, input_tokens),
        "joules_per_total_token": metrics.joules_per_total_token(energy_j, input_tokens, output_tokens),
        "joules_per_successful_query": metrics.joules_per_successful_query(energy_j, succeeded),
        "output_tokens_per_joule": metrics.output_tokens_per_joule(energy_j, output_tokens),
    }
