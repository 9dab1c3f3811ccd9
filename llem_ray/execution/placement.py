"""From what a scheduler granted to the devices whose energy is the gang's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from llem_ray.core.errors import PlacementError
from llem_ray.core.measure_spec import MeasureSpec
from llem_ray.core.power import Device
from llem_ray.execution.calls import Leased
from llem_ray.execution.meter import GPU_SCOPES, Meter
from llem_ray.execution.records import GangRecord, HostDevice

HOST_SCOPES: Final = frozenset({"cpu_package", "dram", "host"})
CPU_SCOPES: Final = frozenset({"cpu_package", "host"})
GUARD_TICKS: Final = 3


def is_measured(device: Device) -> bool:
    """The device gives measured energy, not an estimate."""
    return device.method in {"measured_counter", "measured_power_integral"}


def place_gang(
    workers: Sequence[Leased], gpus: int, meter: Meter
) -> tuple[tuple[HostDevice, ...], tuple[HostDevice, ...], str | None]:
    """The gang's devices, the other devices of its hosts, and why the first are none.

    Raises:
        PlacementError: As ``gang_devices``, or the processes do not hold ``gpus`` distinct GPUs together.
    """
    held: list[HostDevice] = []
    context: list[HostDevice] = []
    reasons: list[str] = []
    for host in dict.fromkeys(worker.node for worker in workers):
        mine = [worker for worker in workers if worker.node == host]
        devices, others, reason = gang_devices(mine, gpus, meter.devices(host))
        held += [HostDevice(host=host, device=device) for device in devices]
        context += [HostDevice(host=host, device=device) for device in others]
        reasons += [reason] if reason else []
    if gpus and len(held) != gpus:
        names = ", ".join(item.device.uuid for item in held) or "none"
        raise PlacementError(f"the gang was to hold {gpus} distinct GPUs, but holds {names}")
    return (() if reasons else tuple(held)), ((*held, *context) if reasons else tuple(context)), "; ".join(reasons) or None


def gang_devices(
    workers: Sequence[Leased], gpus: int, devices: Sequence[Device]
) -> tuple[tuple[Device, ...], tuple[Device, ...], str | None]:
    """What a gang's processes on one host hold of its devices, the other devices, and why the first are none.

    A gang on GPUs answers for the GPUs it holds, by UUID; a gang on the CPU for what measures its hosts' CPU and memory.

    Args:
        workers: The gang's processes on the host.
        gpus: Whole GPUs of the whole gang; 0 on the CPU.
        devices: What is sampled on the host.

    Raises:
        PlacementError: A GPU the gang holds is not among the host's devices, one is held twice, or none is held.
    """
    hostname = workers[0].hostname
    if gpus:
        held = tuple(_leased_gpu(gpu, worker, devices) for worker in workers for gpu in (worker.gpu_uuids or worker.gpu_ids))
        granted = sum(len(worker.gpu_ids) for worker in workers)
        if not held or len({device.uuid for device in held}) != granted:
            raise PlacementError(
                f"the gang's processes on {hostname} were granted {granted} GPUs, "
                f"but hold {', '.join(dict.fromkeys(device.uuid for device in held)) or 'none'}",
                "does Ray count more GPUs there than NVML shows?",
            )
        reason = None
    else:
        held = _host_meters(devices)
        reason = None if held else f"nothing on {hostname} measures the CPU's energy"
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
    periods_s = [meter.calibration(item.host, item.device).tick_period_s for item in gang.devices]
    return GUARD_TICKS * max((period_s for period_s in periods_s if period_s is not None), default=0.0)
