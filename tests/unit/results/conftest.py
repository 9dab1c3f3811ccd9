from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from llem_ray.core.power import DeviceState, SampleBatch

Rows = list[dict[str, Any]]
GPU = "GPU-11111111-2222-3333-4444-555555555555"


def _trial(number: int, attempt: int = 1, **more: Any) -> tuple[dict[str, Any], Rows, Rows]:
    trial_id = f"cell{number:04d}-r0"
    row = {
        "trial_id": trial_id,
        "cell_id": f"cell{number:04d}",
        "repeat": 0,
        "attempt": attempt,
        "status": "completed",
        "settings": '{"workload.batch_size":4}',
        "started_utc": datetime(2026, 1, 2, 3, 4, 5, 678901),
        "total_energy_j": 100.0 + number,
        "joules_per_output_token": None,
        "power_valid": True,
        "flags": ["random_weights"],
        "null_reasons": {"host_cpu_energy_j": "no RAPL here"},
        "devices": [{"node": "n1", "uuid": GPU, "energy_j": 100.0 + number, "flags": ["edge_gap"]}],
        "ranks": [{"rank": 0, "host": "n1", "pid": 7, "gpu_uuid": GPU}],
        **more,
    }
    requests = [
        {"trial_id": trial_id, "attempt": attempt, "request_id": f"0-{index}", "token_times_ns": [1, 2, 3]} for index in range(3)
    ]
    phases = [
        {"trial_id": trial_id, "attempt": attempt, "device_uuid": GPU, "phase": phase, "begin_ns": begin, "end_ns": begin + 5}
        for begin, phase in ((10 * number, "warmup"), (10 * number + 5, "measured"))
    ]
    return row, requests, phases


def _batch(seq: int, length: int = 8) -> SampleBatch:
    power = np.full(length, 300_000.0)
    power[0] = np.nan
    t_ns = np.arange(length, dtype=np.int64) * 50_000_000 + seq * 1_000_000_000
    return SampleBatch(
        node="n1",
        epoch=2,
        seq=seq,
        devices=(GPU, "rapl:0"),
        device=(np.arange(length) % 2).astype(np.int32),
        t_ns=t_ns,
        hw_ns=np.full(length, 5_000, dtype=np.int64),
        power_mw=power,
        power_avg_mw=np.full(length, np.nan),
        energy_mj=np.arange(length) * 15_000.0,
        errors={0: "timeout"},
        states=(DeviceState(t_ns=int(t_ns[0]), device_uuid=GPU, temperature_c=54.0, clock_event_mask=8),),
    )


@pytest.fixture
def make_trial() -> Callable[..., tuple[dict[str, Any], Rows, Rows]]:
    """Row, requests and phases of one attempt at trial ``number``."""
    return _trial


@pytest.fixture
def make_batch() -> Callable[..., SampleBatch]:
    """Samples of a GPU and a CPU package, the first one missing."""
    return _batch
