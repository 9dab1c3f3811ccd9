"""NVML itself: its error codes, its library's life, and the one call that a poll makes."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import pynvml

from llem_ray.core.errors import PowerError, PowerPermissionDenied, ReadFailed, SourceUnavailable

ENERGY: Final = pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION  # 83, mJ since the driver was loaded
INSTANT: Final = pynvml.NVML_FI_DEV_POWER_INSTANT  # 186, mW
AVERAGE: Final = pynvml.NVML_FI_DEV_POWER_AVERAGE  # 185, mW over 1 s
FIELDS: Final = (ENERGY, INSTANT, AVERAGE)

_T = TypeVar("_T")


class Fault(NamedTuple):
    """What a native return code means to us."""

    code: str
    """Stable prefix of ``PowerSample.error``."""
    error: type[PowerError]


_FAULTS: Final[Mapping[int, Fault]] = {
    pynvml.NVML_ERROR_UNINITIALIZED: Fault("not_initialised", SourceUnavailable),
    pynvml.NVML_ERROR_INVALID_ARGUMENT: Fault("not_supported", SourceUnavailable),
    pynvml.NVML_ERROR_NOT_SUPPORTED: Fault("not_supported", SourceUnavailable),
    pynvml.NVML_ERROR_NO_PERMISSION: Fault("no_permission", PowerPermissionDenied),
    pynvml.NVML_ERROR_NOT_FOUND: Fault("not_supported", SourceUnavailable),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: Fault("driver_not_loaded", SourceUnavailable),
    pynvml.NVML_ERROR_TIMEOUT: Fault("timeout", ReadFailed),
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: Fault("library_not_found", SourceUnavailable),
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: Fault("not_supported", SourceUnavailable),
    pynvml.NVML_ERROR_GPU_IS_LOST: Fault("gpu_lost", ReadFailed),
    pynvml.NVML_ERROR_RESET_REQUIRED: Fault("gpu_lost", ReadFailed),
    pynvml.NVML_ERROR_OPERATING_SYSTEM: Fault("no_permission", PowerPermissionDenied),
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: Fault("driver_mismatch", SourceUnavailable),
    pynvml.NVML_ERROR_GPU_NOT_FOUND: Fault("gpu_lost", ReadFailed),
}
_OTHER: Final = Fault("read_failed", ReadFailed)


def fault_of(rc: int) -> Fault:
    """Our meaning of a native return code."""
    return _FAULTS.get(rc, _OTHER)


def explain(rc: int) -> str:
    """Text for ``PowerSample.error``: the stable code, then NVML's words."""
    return f"{fault_of(rc).code}: NVML: {pynvml.NVMLError(rc)}"


def own_error(error: pynvml.NVMLError, doing: str) -> PowerError:
    """Our error for a native one, with what can be done about it."""
    fault = fault_of(error.value)
    hints = {
        "library_not_found": "install the NVIDIA driver, or give the container access to it (libnvidia-ml.so.1)",
        "driver_not_loaded": "is there an NVIDIA GPU, and does nvidia-smi work?",
        "driver_mismatch": "the driver was updated while it runs: restart the host",
        "no_permission": "the user may not read the GPU: check the permissions of /dev/nvidia*",
    }
    return fault.error(f"NVML: {doing}: {error}", hints.get(fault.code))


def text_of(value: str | bytes) -> str:
    """NVML's text; some versions of the bindings give bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def ask(call: Callable[..., _T], *args: object) -> _T | None:
    """The call's answer; None where NVML refuses it."""
    try:
        return call(*args)
    except pynvml.NVMLError:
        return None


class Session:
    """One nvmlInit and its nvmlShutdown. NVML counts them itself, so that sessions of one process don't end each other."""

    def __init__(self) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise own_error(error, "cannot start") from error
        self._open = True

    def close(self) -> None:
        """Give the library back; more than once does no harm."""
        if self._open:
            self._open = False
            ask(pynvml.nvmlShutdown)


def driver_facts() -> dict[str, str]:
    """``nvidia_driver`` and ``cuda_driver`` (the newest CUDA it can run) for the environment record; empty without a driver."""
    try:
        session = Session()
    except PowerError:
        return {}
    try:
        driver = ask(pynvml.nvmlSystemGetDriverVersion)
        cuda = ask(pynvml.nvmlSystemGetCudaDriverVersion)
    finally:
        session.close()
    facts = {} if driver is None else {"nvidia_driver": text_of(driver)}
    if cuda is not None:
        facts["cuda_driver"] = f"{cuda // 1000}.{cuda % 1000 // 10}"
    return facts


class FieldPoll:
    """Reads some fields of one GPU in one native call, into memory that is allocated once.

    pynvml's own wrapper allocates the array anew at every call; at 20 Hz for 8 GPUs that is most of the cost of a poll.
    """

    def __init__(self, handle: Any, fields: Sequence[int], scope_id: int) -> None:
        self._handle = handle
        self._values = (pynvml.c_nvmlFieldValue_t * len(fields))()
        for value, field_id in zip(self._values, fields, strict=True):
            value.fieldId, value.scopeId = field_id, 0 if field_id == ENERGY else scope_id
        self._count = ctypes.c_int32(len(fields))
        self._pointer = ctypes.byref(self._values)
        self._layout = struct.Struct("=" + "24xIi8s" * len(fields))  # valueType, nvmlReturn, value
        self._get = pynvml._nvmlGetFunctionPointer("nvmlDeviceGetFieldValues")
        for value in self._values:
            value.nvmlReturn = pynvml.NVML_ERROR_UNKNOWN

    def read(self) -> tuple[int, tuple[Any, ...]]:
        """The call's return code, and (value type, return code, 8 bytes) of each field, one after the other."""
        rc = self._get(self._handle, self._count, self._pointer)
        return rc, self._layout.unpack_from(self._values)


def decode(value_type: int, raw: bytes) -> float | None:
    """The number in the 8 bytes of a field's value; None for a type we don't know."""
    convert = _DECODE.get(value_type)
    return None if convert is None else convert(raw)


_DECODE: Final[Mapping[int, Callable[[bytes], float]]] = {
    pynvml.NVML_VALUE_TYPE_DOUBLE: lambda raw: float(struct.unpack("=d", raw)[0]),
    pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: lambda raw: int.from_bytes(raw[:4], "little"),
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: lambda raw: int.from_bytes(raw, "little"),
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: lambda raw: int.from_bytes(raw, "little"),
    pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: lambda raw: int.from_bytes(raw, "little", signed=True),
    pynvml.NVML_VALUE_TYPE_SIGNED_INT: lambda raw: int.from_bytes(raw[:4], "little", signed=True),
    pynvml.NVML_VALUE_TYPE_UNSIGNED_SHORT: lambda raw: int.from_bytes(raw[:2], "little"),
}
