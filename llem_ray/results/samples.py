"""Sample batches as rows of ``power`` and ``states``, column by column: a missing reading is null, never NaN or 0."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from llem_ray.core.power import DeviceState, Float64, SampleBatch
from llem_ray.results.segments import stream_schema

_STATE_FIELDS = tuple(item.name for item in dataclasses.fields(DeviceState))


def _constant(value: object, data_type: pa.DataType, length: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, data_type), length)


def _readings(values: Float64) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def power_table(run: str, batch: SampleBatch) -> pa.Table:
    """The batch as rows of ``power``, in polling order."""
    length = len(batch)
    errors: pa.Array = pa.nulls(length, pa.string())
    if batch.errors:
        texts = np.full(length, None, dtype=object)
        texts[list(batch.errors)] = list(batch.errors.values())
        errors = pa.array(texts, pa.string())
    uuids = pa.array(batch.devices, pa.string()).take(pa.array(batch.device, pa.int32()))
    columns = {
        "run": _constant(run, pa.string(), length),
        "node": _constant(batch.node, pa.string(), length),
        "epoch": _constant(batch.epoch, pa.int32(), length),
        "device_uuid": uuids,
        "t_ns": pa.array(batch.t_ns, pa.int64()),
        "hw_ns": pa.array(batch.hw_ns, pa.int64()),
        "power_mw": _readings(batch.power_mw),
        "power_avg_mw": _readings(batch.power_avg_mw),
        "energy_mj": _readings(batch.energy_mj),
        "error": errors,
    }
    return pa.table(columns, schema=stream_schema("power"))


def state_table(run: str, batch: SampleBatch) -> pa.Table:
    """The batch's slow-lane readings as rows of ``states``."""
    length = len(batch.states)
    columns = {name: [getattr(state, name) for state in batch.states] for name in _STATE_FIELDS}
    keys = {
        "run": _constant(run, pa.string(), length),
        "node": _constant(batch.node, pa.string(), length),
        "epoch": _constant(batch.epoch, pa.int32(), length),
    }
    return pa.table({**keys, **columns}, schema=stream_schema("states"))
