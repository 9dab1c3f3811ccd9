"""One NVIDIA GPU: what it can tell, and one reading of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import pynvml

from llem_ray.core.clock import Clock
from llem_ray.core.power import Device, DeviceState, Method, PowerSample, Scope
from llem_ray.power.nvml.native import AVERAGE, ENERGY, FIELDS, INSTANT, FieldPoll, ask, decode, explain, fault_of, text_of

SENSOR_REL: Final = 0.05
"""Gain error of the board's power sensor as the literature has it (arXiv 2312.02741); systematic and uncalibrated."""

COUNTER_QUANTUM_MJ: Final = 1.0
_MODULE_EXCESS: Final = 1.02
_ZERO: Final = "zero_reading: 0 mW is no reading"


class Gpu(Protocol):
    """A GPU as the source sees it."""

    def device(self) -> Device:
        """What the rest of the program sees of it."""
        ...

    def sample(self, clock: Clock) -> PowerSample:
        """One reading of energy and power."""
        ...

    def state(self, clock: Clock) -> DeviceState:
        """Slow-lane reading; each part on its own may be missing."""
        ...


class LostGpu:
    """A GPU that NVML counts but does not hand out: it is shown, not left out, and gives no reading."""

    def __init__(self, index: int, rc: int) -> None:
        self._index = index
        self._reason = explain(rc)
        self._uuid = f"nvml:index-{index}"

    def device(self) -> Device:
        """An unavailable device with the reason."""
        return Device(
            uuid=self._uuid,
            name="unknown NVIDIA GPU",
            source="nvml",
            scope="gpu",
            method="unavailable",
            index=self._index,
            reason=self._reason,
        )

    def sample(self, clock: Clock) -> PowerSample:
        """A sample that has only the reason."""
        return PowerSample(
            t_ns=clock.monotonic_ns(),
            hw_ns=0,
            device_uuid=self._uuid,
            power_mw=None,
            power_avg_mw=None,
            energy_mj=None,
            error=self._reason,
        )

    def state(self, clock: Clock) -> DeviceState:
        """A state without parts."""
        return DeviceState(t_ns=clock.monotonic_ns(), device_uuid=self._uuid)


def open_gpu(index: int) -> Gpu:
    """The GPU at NVML's ``index``."""
    try:
        return PresentGpu(index)
    except pynvml.NVMLError as error:
        return LostGpu(index, error.value)


class PresentGpu:
    """A GPU that answers.

    Raises:
        pynvml.NVMLError: It has no handle, UUID or name.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        self._uuid = text_of(pynvml.nvmlDeviceGetUUID(self._handle))
        self._name = text_of(pynvml.nvmlDeviceGetName(self._handle))
        self._capability = ask(pynvml.nvmlDeviceGetCudaComputeCapability, self._handle)
        mig = ask(pynvml.nvmlDeviceGetMigMode, self._handle)
        self._shared = mig is not None and mig[0] == 1
        self._scope: Scope = "module" if self._covers_module() else "gpu"
        scope_id = pynvml.NVML_POWER_SCOPE_MODULE if self._scope == "module" else pynvml.NVML_POWER_SCOPE_GPU
        self._fields = self._supported_fields(scope_id)
        self._poll = FieldPoll(self._handle, self._fields, scope_id) if self._fields else None
        legacy_power = AVERAGE if self._legacy_is_averaged() else INSTANT
        stand_ins: dict[int, Callable[[Any], int]] = {
            ENERGY: pynvml.nvmlDeviceGetTotalEnergyConsumption,
            legacy_power: pynvml.nvmlDeviceGetPowerUsage,
        }
        self._legacy = {
            column: call for column, call in stand_ins.items() if column not in self._fields and self._is_supported(call)
        }

    @property
    def has_counter(self) -> bool:
        """There is an energy counter, by one way or the other."""
        return ENERGY in self._fields or ENERGY in self._legacy

    @property
    def has_power(self) -> bool:
        """There is some power reading."""
        return bool({INSTANT, AVERAGE} & {*self._fields, *self._legacy})

    def _covers_module(self) -> bool:
        """Grace Hopper: the module draws more than its GPU, both read in the same call (not seen on real hardware)."""
        wanted = [(INSTANT, pynvml.NVML_POWER_SCOPE_GPU), (INSTANT, pynvml.NVML_POWER_SCOPE_MODULE)]
        values = ask(pynvml.nvmlDeviceGetFieldValues, self._handle, wanted)
        if values is None or any(value.nvmlReturn != pynvml.NVML_SUCCESS for value in values):
            return False
        gpu_mw, module_mw = (value.value.uiVal for value in values)
        return bool(module_mw > _MODULE_EXCESS * gpu_mw > 0)

    def _supported_fields(self, scope_id: int) -> tuple[int, ...]:
        """The fields worth polling; one that only fails just now is among them."""
        try:
            rc, values = FieldPoll(self._handle, FIELDS, scope_id).read()
        except pynvml.NVMLError:  # a driver from before field values
            return ()
        codes = [rc if code == pynvml.NVML_ERROR_UNKNOWN != rc != pynvml.NVML_SUCCESS else code for code in values[1::3]]
        return tuple(field for field, code in zip(FIELDS, codes, strict=True) if fault_of(code).code != "not_supported")

    def _legacy_is_averaged(self) -> bool:
        """Whether nvmlDeviceGetPowerUsage is a 1 s average: on Ampere (except GA100) and newer, by nvml.h."""
        return self._capability is None or tuple(self._capability) > (8, 0)

    def _is_supported(self, call: Callable[[Any], int]) -> bool:
        """Whether the call is there; one that only fails just now is."""
        try:
            call(self._handle)
        except pynvml.NVMLError as error:
            return fault_of(error.value).code != "not_supported"
        return True

    def device(self) -> Device:
        """What the rest of the program sees of it."""
        method: Method = (
            "measured_counter" if self.has_counter else "measured_power_integral" if self.has_power else "unavailable"
        )
        limit_mw = ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, self._handle)
        memory = ask(pynvml.nvmlDeviceGetMemoryInfo, self._handle)
        return Device(
            uuid=self._uuid,
            name=self._name,
            source="nvml",
            scope=self._scope,
            method=method,
            index=self._index,
            counter_quantum_mj=COUNTER_QUANTUM_MJ if self.has_counter else None,
            power_limit_mw=None if not limit_mw else float(limit_mw),
            memory_bytes=None if memory is None else int(memory.total) or None,
            sensor_rel=SENSOR_REL,
            shared=self._shared,
            reason="NVML gives neither energy nor power of this GPU" if method == "unavailable" else None,
        )

    def sample(self, clock: Clock) -> PowerSample:
        """One reading of everything."""
        begin_ns = clock.monotonic_ns()
        found, errors = self._read_fields()
        if not any(error.startswith("gpu_lost") for error in errors):
            self._read_legacy(found, errors)
        end_ns = clock.monotonic_ns()
        return PowerSample(
            t_ns=(begin_ns + end_ns) // 2,
            hw_ns=(end_ns - begin_ns + 1) // 2,
            device_uuid=self._uuid,
            power_mw=found.get(INSTANT),
            power_avg_mw=found.get(AVERAGE),
            energy_mj=found.get(ENERGY),
            error="; ".join(errors) or None,
        )

    def _read_fields(self) -> tuple[dict[int, float], list[str]]:
        found: dict[int, float] = {}
        errors: list[str] = []
        if self._poll is None:
            return found, errors
        rc, values = self._poll.read()
        if rc != pynvml.NVML_SUCCESS:
            errors.append(explain(rc))
            return found, errors
        for i, field in enumerate(self._fields):
            value_type, field_rc, raw = values[3 * i : 3 * i + 3]
            value = decode(value_type, raw) if field_rc == pynvml.NVML_SUCCESS else None
            if value is None:
                errors.append(f"{explain(field_rc or pynvml.NVML_ERROR_UNKNOWN)} (field {field})")
            elif value == 0 and field != ENERGY:
                errors.append(f"{_ZERO} (field {field})")
            else:
                found[field] = value
        return found, errors

    def _read_legacy(self, found: dict[int, float], errors: list[str]) -> None:
        for column, call in self._legacy.items():
            try:
                value = call(self._handle)
            except pynvml.NVMLError as error:
                errors.append(f"{explain(error.value)} ({call.__name__})")
                continue
            if value == 0 and column != ENERGY:
                errors.append(f"{_ZERO} ({call.__name__})")
            else:
                found[column] = value

    def state(self, clock: Clock) -> DeviceState:
        """Slow-lane reading; each part on its own may be missing."""
        t_ns = clock.monotonic_ns()
        memory = ask(pynvml.nvmlDeviceGetMemoryInfo, self._handle)
        processes = ask(pynvml.nvmlDeviceGetComputeRunningProcesses, self._handle)
        mask = ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, self._handle)
        if mask is None:  # drivers before 535 know it by its old name only
            mask = ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, self._handle)
        return DeviceState(
            t_ns=t_ns,
            device_uuid=self._uuid,
            temperature_c=ask(pynvml.nvmlDeviceGetTemperature, self._handle, pynvml.NVML_TEMPERATURE_GPU),
            sm_clock_mhz=ask(pynvml.nvmlDeviceGetClockInfo, self._handle, pynvml.NVML_CLOCK_SM),
            memory_clock_mhz=ask(pynvml.nvmlDeviceGetClockInfo, self._handle, pynvml.NVML_CLOCK_MEM),
            clock_event_mask=mask,
            memory_used_bytes=None if memory is None else memory.used,
            process_count=None if processes is None else len(processes),
            power_limit_mw=ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, self._handle),
        )
