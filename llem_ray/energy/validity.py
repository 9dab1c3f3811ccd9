"""What can be wrong with a window's energy: one table of reason codes, and the checks that raise them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from llem_ray.core.energy import Flag, Severity
from llem_ray.core.measure_spec import GateSpec
from llem_ray.core.power import DeviceState
from llem_ray.core.units import NS_PER_S


@dataclass(frozen=True, slots=True)
class Reason:
    """One row of the table of reason codes."""

    code: str
    severity: Severity
    meaning: str
    action: str


_TABLE: Final = (
    Reason(
        "counter_mismatch",
        "invalid",
        "The energy counter and the averaged power disagree by more than the gate allows.",
        "Check the driver version and whether the load is far shorter than the window; compare both published numbers.",
    ),
    Reason(
        "counter_reset",
        "invalid",
        "The energy counter went down inside the window: the driver was reloaded or the GPU was reset.",
        "Repeat the trial; keep the driver loaded with persistence mode.",
    ),
    Reason(
        "counter_frozen",
        "invalid",
        "The energy counter stood still for five of its periods while the device drew power.",
        "Repeat the trial; if it recurs the counter of this driver cannot be used.",
    ),
    Reason(
        "implausible",
        "invalid",
        "Mean power is outside 0 to 1.3 times the enforced power limit, or the counter jumped by more than that allows.",
        "Check the meter of this device against another one.",
    ),
    Reason(
        "dropped_samples",
        "invalid",
        "Fewer samples arrived inside the window than the gate asks for.",
        "Look for a starved sampler: keep a core free, or lower measure.sample_hz.",
    ),
    Reason("gpu_lost", "invalid", "The GPU stopped answering inside the window.", "Reset the GPU or reboot the node."),
    Reason(
        "uuid_changed",
        "invalid",
        "The worker's GPU is not the one that was measured.",
        "Check that nothing renumbers GPUs between placement and start.",
    ),
    Reason(
        "node_missing",
        "invalid",
        "A node of the gang gave no samples for the window.",
        "Check the sampler on that node; the total is null because a part is missing.",
    ),
    Reason(
        "token_count_mismatch",
        "invalid",
        "The engine returned another number of tokens than was asked for.",
        "Check the prompt length against the context and the stop conditions.",
    ),
    Reason(
        "window_not_reached",
        "invalid",
        "The run does not have the window that was asked for: no steady state, or it ended before an interval or MLPerf's 600 s.",
        "Send more requests (workload.requests), or ask for another window. The row is that of the whole run.",
    ),
    Reason(
        "rate_not_sent",
        "invalid",
        "Requests were not sent at the rate that was asked for: the load generator was late.",
        "Keep a core free for it; lower the rate.",
    ),
    Reason(
        "short_window",
        "flag",
        "The window is shorter than 1 s: edges weigh heavily and there is no cross-check.",
        "Raise measure.min_window_s.",
    ),
    Reason(
        "edge_gap",
        "flag",
        "Counter ticks are missing at an edge of the window; the uncertainty was widened for it.",
        "Look for a starved sampler; raise measure.edge_guard_s.",
    ),
    Reason(
        "zero_reading",
        "flag",
        "The meter returned 0 where power was drawn; those readings count as missing.",
        "Update the driver if it recurs.",
    ),
    Reason(
        "throttled",
        "flag",
        "The GPU slowed down for heat or a hardware limit inside the window.",
        "Improve cooling or power supply, or lower the power limit for all trials.",
    ),
    Reason(
        "foreign_process",
        "flag",
        "Somebody else used the device before the model was loaded.",
        "End the other process or take another GPU.",
    ),
    Reason(
        "not_thermally_stable",
        "flag",
        "The temperature drifted by more than 10 C across the window.",
        "Warm up for longer (measure.warmup) before the window.",
    ),
    Reason(
        "not_stationary",
        "flag",
        "Power or throughput drifted across the window.",
        "Warm up for longer, or lengthen the window.",
    ),
    Reason(
        "below_min_window",
        "flag",
        "An online window is shorter than measure.min_window_s.",
        "Send more requests (workload.requests).",
    ),
    Reason(
        "rate_not_reached",
        "flag",
        "The engine answered more slowly than requests came: they piled up, and the window is that of an overload.",
        "Lower the rate, or take it for the engine's limit.",
    ),
    Reason(
        "warmup_not_steady",
        "flag",
        "Step time or power of the warm-up batches still varied by more than measure.warmup.until_cv at the limit.",
        "Raise measure.warmup.max_batches, or look for what disturbs the node.",
    ),
    Reason(
        "not_cooled_down",
        "flag",
        "A device was still hotter than measure.cooldown_until_c when the trial began, or its temperature is not known.",
        "Raise measure.cooldown_limit_s or the temperature.",
    ),
    Reason(
        "shared_node",
        "flag",
        "Another gang ran on the same node: CPU, fans and power supply were shared.",
        "Run gangs on nodes of their own.",
    ),
    Reason(
        "random_weights",
        "flag",
        "The model has random weights; operand values change the power drawn.",
        "Use pretrained weights for absolute numbers.",
    ),
    Reason(
        "few_requests",
        "note",
        "A steady state of fewer than 4 requests for each that runs at once: it is short against filling up and running empty.",
        "Send more requests (workload.requests).",
    ),
    Reason(
        "warmup_without_power",
        "note",
        "Warm-up until steady went by step times alone: the gang's power is not measured.",
        "Nothing, or choose a source that measures (measure.sources).",
    ),
    Reason("power_capped", "note", "The power limit held the clocks down for part of the window.", "Report the limit."),
    Reason(
        "no_cross_check",
        "note",
        "There is no independent average power to compare the counter with.",
        "Nothing: A100, V100 and CPUs have none.",
    ),
)

REASONS: Final[Mapping[str, Reason]] = {reason.code: reason for reason in _TABLE}
"""Every reason code, in the order of the docs: the only place where a code's severity is set."""

THROTTLE_MASK: Final = 0xE8
"""NVML clocks-event reasons: hardware slowdown, software and hardware thermal slowdown, hardware power brake."""

POWER_CAP_MASK: Final = 0x04
"""NVML clocks-event reason: software power cap."""

IMPLAUSIBLE_FACTOR: Final = 1.3
FOREIGN_MEMORY_BYTES: Final = 1 << 30
FOREIGN_POWER_REL: Final = 0.10
THERMAL_DRIFT_C: Final = 10.0
SHORT_WINDOW_S: Final = 1.0
LONG_WINDOW_S: Final = 5.0


def flag(code: str, detail: str) -> Flag:
    """A flag with its code's severity.

    Raises:
        KeyError: The code is not in the table.
    """
    return Flag(code=code, severity=REASONS[code].severity, detail=detail)


def check_cross_check(ratio: float | None, window_s: float, gates: GateSpec) -> tuple[Flag, ...]:
    """counter_mismatch: averaged power over counter is off 1 by more than the gate of this window's length."""
    if ratio is None or window_s < SHORT_WINDOW_S:
        return ()
    gate = gates.max_cross_check_rel if window_s >= LONG_WINDOW_S else gates.max_cross_check_rel_short
    if abs(ratio - 1.0) <= gate:
        return ()
    return (flag("counter_mismatch", f"averaged power gives {ratio:.4f} of the counter, the gate is +-{gate:.0%}"),)


def check_coverage(coverage: float, gates: GateSpec) -> tuple[Flag, ...]:
    """dropped_samples."""
    if coverage >= gates.min_coverage:
        return ()
    return (flag("dropped_samples", f"{coverage:.1%} of the samples arrived, the gate is {gates.min_coverage:.0%}"),)


def check_length(window_s: float) -> tuple[Flag, ...]:
    """short_window."""
    return (flag("short_window", f"{window_s:.3f} s"),) if window_s < SHORT_WINDOW_S else ()


def check_mean_power(mean_w: float, power_limit_w: float | None) -> tuple[Flag, ...]:
    """Implausible mean power."""
    if mean_w < 0:
        return (flag("implausible", f"mean power is {mean_w:.1f} W"),)
    if power_limit_w is not None and mean_w > IMPLAUSIBLE_FACTOR * power_limit_w:
        return (flag("implausible", f"mean power is {mean_w:.1f} W, the enforced limit {power_limit_w:.1f} W"),)
    return ()


def check_states(states: Sequence[DeviceState], begin_ns: int, end_ns: int) -> tuple[Flag, ...]:
    """Throttled, power_capped and not_thermally_stable, from the slow-lane readings of one device around a window.

    A reading holds until the next one. ``states`` ascend in time.
    """
    flags: list[Flag] = []
    throttled_s, mask = _seconds_with(states, THROTTLE_MASK, begin_ns, end_ns)
    if throttled_s > 0:
        flags.append(flag("throttled", f"{throttled_s:.1f} s, clocks-event reasons {mask:#x}"))
    capped_s, _ = _seconds_with(states, POWER_CAP_MASK, begin_ns, end_ns)
    if capped_s > 0:
        flags.append(flag("power_capped", f"{capped_s:.1f} s"))
    inside_c = [s.temperature_c for s in states if s.temperature_c is not None and begin_ns <= s.t_ns <= end_ns]
    if len(inside_c) > 1 and abs(drift_c := inside_c[-1] - inside_c[0]) > THERMAL_DRIFT_C:
        flags.append(flag("not_thermally_stable", f"{inside_c[0]:.0f} C to {inside_c[-1]:.0f} C ({drift_c:+.0f} C)"))
    return tuple(flags)


def _seconds_with(states: Sequence[DeviceState], mask: int, begin_ns: int, end_ns: int) -> tuple[float, int]:
    """How long any bit of ``mask`` was set inside the window, and which bits."""
    known = [state for state in states if state.clock_event_mask is not None]
    total_ns, seen = 0, 0
    for i, state in enumerate(known):
        until_ns = known[i + 1].t_ns if i + 1 < len(known) else end_ns
        held_ns = min(until_ns, end_ns) - max(state.t_ns, begin_ns)
        bits = (state.clock_event_mask or 0) & mask
        if bits and held_ns > 0:
            total_ns += held_ns
            seen |= bits
    return total_ns / NS_PER_S, seen


def check_foreign_load(
    *, memory_used_bytes: int | None, idle_power_w: float | None = None, baseline_power_w: float | None = None
) -> tuple[Flag, ...]:
    """foreign_process, before our model is loaded: over 1 GiB in use, or idle power 10 % over a known baseline.

    Process ids are not used: inside a container they are unreliable.
    """
    flags: list[Flag] = []
    if memory_used_bytes is not None and memory_used_bytes > FOREIGN_MEMORY_BYTES:
        flags.append(flag("foreign_process", f"{memory_used_bytes / FOREIGN_MEMORY_BYTES:.1f} GiB in use before the load"))
    if idle_power_w is not None and baseline_power_w is not None and idle_power_w > (1 + FOREIGN_POWER_REL) * baseline_power_w:
        flags.append(flag("foreign_process", f"idle at {idle_power_w:.1f} W, the baseline is {baseline_power_w:.1f} W"))
    return tuple(flags)


def check_errors(errors: Sequence[tuple[int, str]], begin_ns: int, end_ns: int) -> tuple[Flag, ...]:
    """gpu_lost and zero_reading, from the reasons that samples inside the window give for missing readings.

    Args:
        errors: (t_ns, reason) of one device's samples; reasons are joined by semicolons, each
            begins with its code and a colon.
        begin_ns: Begin of the window.
        end_ns: End of the window.
    """
    flags: list[Flag] = []
    reasons = [part.strip() for t_ns, text in errors if begin_ns <= t_ns <= end_ns for part in text.split(";")]
    for code in ("gpu_lost", "zero_reading"):
        seen = [reason for reason in reasons if reason.partition(":")[0] == code]
        if seen:
            flags.append(flag(code, f"{len(seen)} samples: {seen[0].partition(':')[2].strip() or code}"))
    return tuple(flags)
