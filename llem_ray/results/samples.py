"""Sample batches as rows of ``power`` and ``states``, column by column: a missing reading is null, never NaN or 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from llem_ray.core.power import DeviceStates, Float64, SampleBatch
from llem_ray.results.segments import stream_schema


def power_table(run: str, batches: Sequence[SampleBatch]) -> pa.Table:
    """The batches as rows of ``power``, one after the other, each in polling order."""
    lengths = [len(batch) for batch in batches]
    uuids = [batch.devices for batch in batches]
    columns = {
        **_keys(run, batches, lengths),
        "device_uuid": _named(uuids, [batch.device for batch in batches]),
        "t_ns": _joined([batch.t_ns for batch in batches], np.int64),
        "hw_ns": _joined([batch.hw_ns for batch in batches], np.int64),
        "power_mw": _readings([batch.power_mw for batch in batches]),
        "power_avg_mw": _readings([batch.power_avg_mw for batch in batches]),
        "energy_mj": _readings([batch.energy_mj for batch in batches]),
        "error": _errors(batches, sum(lengths)),
    }
    return pa.table(columns, schema=stream_schema("power"))


def state_table(run: str, batches: Sequence[SampleBatch]) -> pa.Table:
    """The batches' slow-lane readings as rows of ``states``."""
    batches = [batch for batch in batches if len(batch.states)]
    states = [DeviceStates.of(batch.states) for batch in batches]
    schema = stream_schema("states")
    columns: dict[str, Any] = _keys(run, batches, [len(one) for one in states])
    columns["t_ns"] = _joined([one.t_ns for one in states], np.int64)
    columns["device_uuid"] = _named([one.uuids for one in states], [one.device for one in states])
    for name in schema.names:
        if name not in columns:
            parts = [one.column(name) for one in states]
            values = _joined([part for part, _ in parts], parts[0][0].dtype if parts else np.float64)
            absent = _joined([absent for _, absent in parts], np.bool_)
            columns[name] = pa.array(values, mask=absent).cast(schema.field(name).type)
    return pa.table(columns, schema=schema)


def _keys(run: str, batches: Sequence[SampleBatch], lengths: Sequence[int]) -> dict[str, pa.Array]:
    """Columns that a batch has the same in all of its rows."""
    of_row = np.repeat(np.arange(len(batches), dtype=np.int32), lengths)
    return {
        "run": _encoded(np.zeros(len(of_row), np.int32), [run]),
        "node": _encoded(of_row, [batch.node for batch in batches]),
        "epoch": pa.array(np.repeat(np.array([batch.epoch for batch in batches], np.int32), lengths)),
    }


def _named(uuids: Sequence[tuple[str, ...]], device: Sequence[Any]) -> pa.Array:
    """UUID of each row: each batch numbers its own devices."""
    starts = np.cumsum([0, *map(len, uuids)])
    numbers = [index + start for index, start in zip(device, starts.tolist(), strict=False)]
    return _encoded(_joined(numbers, np.int32), [uuid for some in uuids for uuid in some])


def _encoded(numbers: Any, names: Sequence[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(names, pa.string()))


def _readings(columns: Sequence[Float64]) -> pa.Array:
    return pa.array(_joined(columns, np.float64), from_pandas=True)


def _errors(batches: Sequence[SampleBatch], length: int) -> pa.Array:
    if not any(batch.errors for batch in batches):
        return pa.nulls(length, pa.string())
    texts, start = np.full(length, None, dtype=object), 0
    for batch in batches:
        for row, text in batch.errors.items():
            texts[start + row] = text
        start += len(batch)
    return pa.array(texts, pa.string())


def _joined(columns: Sequence[Any], dtype: Any) -> Any:
    return np.concatenate(columns, dtype=dtype, casting="same_kind") if columns else np.empty(0, dtype)
