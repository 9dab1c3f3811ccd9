"""From what a scheduler granted to the devices whose energy is the gang's."""

from __future__ import annotations

from collections.abc import Sequence

from llem_ray.core.errors import PlacementError
from llem_ray.core.power import Device
from llem_ray.core.spec import MeasureSpec
from llem_ray.execution.calls import Leased
from llem_ray.execution.meter import Meter
from llem_ray.execution.records import GangRecord

GPU_SCOPES = frozenset({"gpu", "module"})
HOST_SCOPES = frozenset({"cpu_package", "dram", "host"})
CPU_SCOPES = frozenset({"cpu_package", "host"})
GUARD_TICKS = 3


def is_measured(device: Device) -> bool:
    """The device gives measured energy, not an estimate."""
    return device.method in {"measured_counter", "measured_power_integral"}


def gang_devices(
    leased: Leased, gpus: int, devices: Sequence[Device]
) -> tuple[tuple[Device, ...], tuple[Device, ...], str | None]:
    """The gang's devices, the other devices of its node, and why the first are none.

    A gang on GPUs answers for the GPUs it holds, by UUID; a gang on the CPU for what measures its node's CPU and memory.

    Raises:
        PlacementError: A GPU the gang holds is not among the node's devices, or one is held twice.
    """
    if gpus:
        held = tuple(_leased_gpu(gpu_id, leased, devices) for gpu_id in leased.gpu_ids)
        if len({device.uuid for device in held}) != gpus:
            raise PlacementError(
                f"the gang on {leased.hostname} was to hold {gpus} distinct GPUs, "
                f"but holds {', '.join(device.uuid for device in held) or 'none'}"
            )
        reason = None
    else:
        held = _host_meters(devices)
        reason = None if held else f"nothing on {leased.hostname} measures the CPU's energy"
    return held, tuple(device for device in devices if device not in held), reason


def _host_meters(devices: Sequence[Device]) -> tuple[Device, ...]:
    """What measures the host: all of each scope that is measured at all, so that a silent socket makes the total partial.

    None without the CPU: the memory's energy alone is not the gang's.
    """
    scopes = {device.scope for device in devices if device.scope in HOST_SCOPES and is_measured(device)}
    if not scopes & CPU_SCOPES:
        return ()
    return tuple(device for device in devices if device.scope in scopes and device.method != "estimated_model")


def _leased_gpu(gpu_id: str, leased: Leased, devices: Sequence[Device]) -> Device:
    gpus = [device for device in devices if device.scope in GPU_SCOPES]
    for device in gpus:
        if device.uuid == gpu_id or (gpu_id.isdecimal() and device.index == int(gpu_id)):
            return device
    known = ", ".join(f"{device.index}={device.uuid}" for device in gpus) or "none"
    raise PlacementError(
        f"GPU {gpu_id} of the gang on {leased.hostname} is not among those that can be measured there: {known}",
        "measure.sources must include nvml, and the NVIDIA driver's library must be visible to the sampler",
    )


def guard_s(gang: GangRecord, meter: Meter, measure: MeasureSpec) -> float:
    """Quiet time on both sides of a window: 3 ticks of the slowest counter among the gang's devices, 0 without one."""
    if measure.edge_guard_s != "auto":
        return measure.edge_guard_s
    periods_s = [meter.calibration(gang.node, device).tick_period_s for device in gang.devices]
    return GUARD_TICKS * max((period_s for period_s in periods_s if period_s is not None), default=0.0)
