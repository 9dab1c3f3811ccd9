"""The energy side of bookkeeping: samples of the meter and what happened, to columns of the ``trials`` table."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from llem_ray.core.energy import Baseline, EnergyReading, EnergyTotal, Flag, PhaseEnergy, PhaseSpan, Window
from llem_ray.core.outcome import Completed
from llem_ray.core.power import Device, Trace
from llem_ray.core.spec import MeasureSpec
from llem_ray.core.units import ns_from_s
from llem_ray.energy import metrics
from llem_ray.energy.estimator import read_window
from llem_ray.energy.idle import idle_baseline, net_energy, sum_net
from llem_ray.energy.ledger import DeviceLedger
from llem_ray.energy.total import sum_readings
from llem_ray.energy.validity import check_errors, check_foreign_load, flag
from llem_ray.execution.meter import Meter
from llem_ray.execution.placement import GPU_SCOPES
from llem_ray.execution.records import AttemptEnded, GangRecord, IdleTaken, LoadEnded, SpansAdded
from llem_ray.results.rows import device_columns, flag_columns

Row = dict[str, Any]

METHODS_BY_STRENGTH: Final = ("measured_counter", "measured_power_integral", "estimated_model", "unavailable")
ESTIMATE_NOTE: Final = "modelled from CPU load and memory size, not measured"


class Accounts:
    """What a run's devices spent, by window and by phase.

    Args:
        measure: Gates and settings.
        meter: Where samples come from.
    """

    def __init__(self, measure: MeasureSpec, meter: Meter) -> None:
        self._gates = measure.gates
        self._meter = meter
        self._ledgers: dict[tuple[str, str], DeviceLedger] = {}
        self._foreign: dict[str, tuple[Flag, ...]] = {}
        self._bare_power_w: dict[tuple[str, str], float] = {}

    def take_idle(self, idle: IdleTaken) -> None:
        """Idle power of every device of the gang's node; before the load also whether somebody else uses it."""
        gang, span = idle.gang, idle.span
        for device in (*gang.devices, *gang.context):
            baseline = self._baseline(gang.node, device, span, resident=idle.resident)
            (gang.resident if idle.resident else gang.bare)[device.uuid] = baseline
            if not idle.resident:
                self._check_foreign(gang.node, device, span, baseline)

    def take_load(self, load: LoadEnded) -> None:
        """Energy of loading the model."""
        load.gang.load_energy_j = self._sum(load.gang, load.span.begin_ns, load.span.end_ns).energy_j

    def energy_columns(self, ended: AttemptEnded) -> Row:
        """Every energy column of one attempt's row."""
        gang, outcome = ended.gang, ended.outcome
        if gang is None:
            return {"energy_reason": "no gang ran", "power_valid": False, "est_reason": "no gang ran"}
        if not isinstance(outcome, Completed):
            waste = self._sum(gang, ended.begin_ns, ended.end_ns)
            reason = "the attempt failed: its energy is waste"
            return {"waste_energy_j": waste.energy_j, "energy_reason": reason, "power_valid": False, "est_reason": reason}
        window = outcome.window
        held = [self._read(gang, device, window) for device in gang.devices]
        context = [self._read(gang, device, window) for device in gang.context]
        total = self._total(gang, held)
        flags = [*_flags(held), *self._trial_flags(ended, gang, outcome)]
        tokens = (sum(r.prompt_tokens for r in outcome.requests), sum(r.output_tokens for r in outcome.requests))
        valid = total.energy_j is not None and not any(item.severity == "invalid" for item in flags)
        row = _total_columns(total, held, gang, window.duration_s)
        row |= flag_columns(flags) | device_columns([*held, *context]) | {"power_valid": valid}
        row |= _host_columns([*held, *context]) | _net_columns(gang, held, window)
        succeeded = sum(request.finish_reason != "abort" and request.output_tokens > 0 for request in outcome.requests)
        row |= _per_token(total.energy_j if valid else None, *tokens, succeeded)
        return row | _estimate_columns(context, tokens[1], gpus=gang.group.gpus)

    def phase_energies(self, added: SpansAdded) -> Iterable[tuple[str, list[PhaseEnergy]]]:
        """Energy of every device over the new spans, by node: the ledger's next lines."""
        for info in self._meter.infos:
            energies: list[PhaseEnergy] = []
            for device in info.devices:
                spans = added.spans if _follows(device, info.node, added.gang) else _unleased(added.spans)
                energies.extend(self._ledger(info.node, device, spans))
            yield info.node, energies

    def _ledger(self, node: str, device: Device, spans: Sequence[PhaseSpan]) -> Sequence[PhaseEnergy]:
        if not spans:
            return ()
        key = (node, device.uuid)
        if key not in self._ledgers:
            self._ledgers[key] = DeviceLedger(
                device=device,
                calibration=self._meter.calibration(node, device),
                sample_period_s=self._meter.period_s(node, device),
                begin_ns=spans[0].begin_ns,
            )
        ledger = self._ledgers[key]
        return ledger.add(self._trace(node, device, ledger.end_ns, spans[-1].end_ns), spans)

    def _read(self, gang: GangRecord, device: Device, window: Window) -> EnergyReading:
        idle = gang.resident.get(device.uuid) or gang.bare.get(device.uuid)
        errors = self._meter.errors(gang.node, device.uuid, window.begin_ns, window.end_ns)
        reading = read_window(
            device=device,
            calibration=self._meter.calibration(gang.node, device),
            trace=self._trace(gang.node, device, window.begin_ns, window.end_ns),
            window=window,
            sample_period_s=self._meter.period_s(gang.node, device),
            gates=self._gates,
            idle_power_w=idle.power_w if idle else None,
            states=self._meter.states(gang.node, device.uuid, window.begin_ns - ns_from_s(2.0), window.end_ns),
        )
        return replace(reading, flags=(*reading.flags, *check_errors(errors, window.begin_ns, window.end_ns)))

    def _trace(self, node: str, device: Device, begin_ns: int, end_ns: int) -> Trace:
        margin_ns = ns_from_s(self._meter.margin_s(node, device))
        return self._meter.trace(node, device.uuid, begin_ns - margin_ns, end_ns + margin_ns)

    def _total(self, gang: GangRecord, readings: Sequence[EnergyReading]) -> EnergyTotal:
        return sum_readings(readings, {(gang.node, device.uuid) for device in gang.devices})

    def _sum(self, gang: GangRecord, begin_ns: int, end_ns: int) -> EnergyTotal:
        window = Window(node=gang.node, begin_ns=begin_ns, end_ns=end_ns)
        return self._total(gang, [self._read(gang, device, window) for device in gang.devices])

    def _baseline(self, node: str, device: Device, span: PhaseSpan, *, resident: bool) -> Baseline:
        return idle_baseline(
            device=device,
            calibration=self._meter.calibration(node, device),
            trace=self._trace(node, device, span.begin_ns, span.end_ns),
            window=Window(node=node, begin_ns=span.begin_ns, end_ns=span.end_ns),
            sample_period_s=self._meter.period_s(node, device),
            kind="resident" if resident else "bare",
        )

    def _check_foreign(self, node: str, device: Device, span: PhaseSpan, baseline: Baseline) -> None:
        """Before our model is loaded: memory in use, or idle power above the lowest seen on this device in this run."""
        if device.scope not in GPU_SCOPES:
            return
        states = self._meter.states(node, device.uuid, span.begin_ns, span.end_ns)
        used = [state.memory_used_bytes for state in states if state.memory_used_bytes is not None]
        key = (node, device.uuid)
        self._foreign[device.uuid] = check_foreign_load(
            memory_used_bytes=max(used) if used else None,
            idle_power_w=baseline.power_w,
            baseline_power_w=self._bare_power_w.get(key),
        )
        if baseline.power_w is not None:
            self._bare_power_w[key] = min(baseline.power_w, self._bare_power_w.get(key, baseline.power_w))

    def _trial_flags(self, ended: AttemptEnded, gang: GangRecord, outcome: Completed) -> Iterable[Flag]:
        for device in gang.devices:
            yield from self._foreign.get(device.uuid, ())
        if gang.loaded is not None and gang.loaded.report.random_weights:
            yield flag("random_weights", "weights drawn at random")
        workload = ended.trial.experiment.workload
        wrong = [r for r in outcome.requests if workload.ignore_eos and r.output_tokens != workload.output_tokens]
        if wrong:
            detail = f"{len(wrong)} of {len(outcome.requests)} requests, the first gave {wrong[0].output_tokens}"
            yield flag("token_count_mismatch", f"{detail} tokens instead of {workload.output_tokens}")


def _follows(device: Device, node: str, gang: GangRecord | None) -> bool:
    """The device goes through the gang's phases: it is the gang's, or its host's, or no gang is meant."""
    if gang is None or (node == gang.node and device.scope not in GPU_SCOPES):
        return True
    return node == gang.node and device in gang.devices


def _unleased(spans: Sequence[PhaseSpan]) -> tuple[PhaseSpan, ...]:
    if not spans:
        return ()
    return (PhaseSpan(phase="unleased", begin_ns=spans[0].begin_ns, end_ns=spans[-1].end_ns),)


def _flags(readings: Iterable[EnergyReading]) -> Iterable[Flag]:
    for reading in readings:
        yield from reading.flags


def _net_columns(gang: GangRecord, held: Sequence[EnergyReading], window: Window) -> Row:
    """Energy above the idle power of the gang's devices with the model loaded; never without the gross beside it."""
    idle_w = _sum_power(gang.resident, gang.devices)
    net = sum_net([net_energy(reading, gang.resident.get(reading.device_uuid), window) for reading in held])
    return {
        "bare_idle_power_w": _sum_power(gang.bare, gang.devices),
        "idle_power_w": idle_w,
        "idle_energy_j": None if idle_w is None else idle_w * window.duration_s,
        "net_energy_j": net.energy_j,
        "net_energy_u_j": net.u_j,
        "null_reasons": {"net_energy_j": net.reason} if net.energy_j is None and net.reason else None,
    }


def _sum_power(baselines: dict[str, Baseline], devices: Collection[Device]) -> float | None:
    powers_w = [line.power_w if (line := baselines.get(device.uuid)) else None for device in devices]
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
    """Measured CPU and memory of the gang's node, whether or not the total covers them."""
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
