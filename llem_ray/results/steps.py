"""The steps of a window as rows of ``steps``, column by column."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from llem_ray.core.step_log import STEP_KINDS, StepLog
from llem_ray.results.segments import stream_schema


def step_table(log: StepLog, *, trial_id: str, attempt: int, run: str) -> pa.Table:
    """The steps as rows of ``steps``, in their order. The numbers are those of ``log``, not copied."""
    length = len(log)
    columns = {
        "run": _same(run, length),
        "trial_id": _same(trial_id, length),
        "attempt": pa.array(np.full(length, attempt, np.int32)),
        "begin_ns": pa.array(np.frombuffer(log.begin_ns, np.int64)),
        "end_ns": pa.array(np.frombuffer(log.end_ns, np.int64)),
        "kind": _encoded(np.frombuffer(log.kind, np.int8).astype(np.int32), list(STEP_KINDS)),
        "prefill_tokens": pa.array(np.frombuffer(log.prefill_tokens, np.int64)),
        "decode_tokens": pa.array(np.frombuffer(log.decode_tokens, np.int64)),
        "computed_tokens": pa.array(np.frombuffer(log.computed_tokens, np.int64)),
        "flops": pa.array(np.frombuffer(log.flops, np.float64), from_pandas=True),
        "read_bytes": pa.array(np.frombuffer(log.read_bytes, np.float64), from_pandas=True),
    }
    return pa.table(columns, schema=stream_schema("steps"))


def _same(text: str, length: int) -> pa.Array:
    return _encoded(np.zeros(length, np.int32), [text])


def _encoded(numbers: np.ndarray, names: list[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(names, pa.string()))
