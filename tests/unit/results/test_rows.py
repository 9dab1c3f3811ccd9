from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llem_ray.core.backend import LoadReport, Rank, RequestRecord
from llem_ray.core.energy import EnergyReading, Flag, PhaseEnergy, PhaseSpan, Window
from llem_ray.core.errors import DeviceMemoryError
from llem_ray.core.outcome import failed_from
from llem_ray.core.plan import Trial
from llem_ray.core.power import Calibration, Device, SamplerInfo
from llem_ray.core.spec import Cell, EngineSpec, Experiment, ModelSpec
from llem_ray.core.workload_spec import LengthSpec, LoadSpec, TimeSpec, WorkloadSpec
from llem_ray.results import rows
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.writer import DatasetWriter

EXPERIMENT = Experiment(
    model=ModelSpec(config="llama-tiny", dtype="float32"),
    engine=EngineSpec(tensor_parallel=2, engine_args={"attn_implementation": "sdpa"}),
    workload=WorkloadSpec(batch_size=4, input_tokens=16, output_tokens=8),
)
TRIAL = Trial(trial_id="c0-r1", cell=Cell(cell_id="c0", experiment=EXPERIMENT, settings={"workload.batch_size": 4}), repeat=1)
REPORT = LoadReport(
    import_s=1.0, construct_s=2.0, compile_s=None, warm_s=None, context_tokens=2048, vocab_size=100, parameters=10,
    weight_bytes=40, dtype="float32", device="cpu", model_commit=None, random_weights=True,
    notes={"engine": "transformers 5.17.0", "attention": "sdpa"},
)  # fmt: skip
RECORD = RequestRecord(
    request_id="0-0", prompt_tokens=12, padded_tokens=16, output_token_ids=(5, 6), finish_reason="length",
    scheduled_ns=1, queued_ns=2, sent_ns=3, token_times_ns=(10, 20), cached_tokens=0,
)  # fmt: skip
READING = EnergyReading(
    node="n1", device_uuid="GPU-1", name="H200", source="nvml", scope="gpu", method="measured_counter", energy_j=5.0, u_j=0.1,
    bound_j=(4.0, 6.0), cross_check_j=None, cross_check_ratio=None, sensor_rel=0.05, shift_w=None, delta_s=0.0, lag_s=0.0,
    coverage=1.0, mean_power_w=100.0, flags=(Flag(code="edge_gap", severity="flag", detail="0.2 s"),),
)  # fmt: skip


@pytest.mark.parametrize(
    ("turns", "think_s", "told"),
    [
        (3, 0.5, (3, 0.5)),
        (LengthSpec(distribution="fixed", mean=3), TimeSpec(distribution="fixed", mean=0.5), (3, 0.5)),
        (LengthSpec(distribution="uniform", min=1, max=3), TimeSpec(distribution="exponential", mean=2), (None, None)),
        ("recorded", 0.5, (None, 0.5)),
        (1, 0.0, (1, None)),
    ],
)
def test_turns_and_thinking_are_null_only_where_they_vary(turns, think_s, told) -> None:
    load = LoadSpec(pattern="closed", concurrency=2)
    experiment = replace(EXPERIMENT, workload=WorkloadSpec(turns=turns, think_time_s=think_s, load=load))
    row = rows.trial_row(replace(TRIAL, cell=replace(TRIAL.cell, experiment=experiment)), attempt=1, load_key="k", gpus=0)
    assert (row["turns"], row["think_time_s"]) == told


def test_a_whole_trial_made_of_core_objects_is_written_and_read(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    writer = DatasetWriter(run)
    span = PhaseSpan(phase="measured", begin_ns=0, end_ns=50_000_000, trial_id="c0-r1", attempt=1)
    phase = PhaseEnergy(span=span, device_uuid="GPU-1", energy_j=5.0, u_j=0.1, method="measured_counter", notes={"k": "v"})
    row = {
        **rows.trial_row(TRIAL, attempt=1, load_key="k", gpus=2),
        **rows.load_columns(REPORT),
        **rows.window_columns(Window(node="n1", begin_ns=0, end_ns=50_000_000)),
        **rows.count_columns(requests=2, prompt_tokens=24, padded_tokens=32, output_tokens=4, passes=2, steps=9),
        **rows.device_columns([READING]),
        **rows.flag_columns(READING.flags),
        **rows.rank_columns([Rank(rank=0, host="n1", pid=3, gpu_uuid="GPU-1")]),
        **rows.distribution_columns("ttft_s", {"mean": 0.1, "p50": 0.2, "count": 2}),
        **rows.distribution_columns("tpot_s", None),
        "status": "completed",
        "started_utc": rows.now_utc(),
    }
    request = rows.request_row(RECORD, trial_id="c0-r1", attempt=1, latencies={"ttft_s": 7e-9}, keep_token_times=False)
    writer.write_trial(row, [request], [rows.phase_row(phase, gang="g0", node="n1")])
    (read,) = read_table(run.path, "trials").to_pylist()
    expected = {
        "model": "llama-tiny", "weights": "random", "batch_size": 4, "output_tokens_requested": 8, "tensor_parallel": 2,
        "gpus": 2,
        "device": "cpu", "window_s": 0.05, "requests": 2, "prompt_tokens": 24, "padded_tokens": 32, "output_tokens": 4,
        "total_tokens": 28, "steps": 9, "passes": 2, "engine_version": "5.17.0", "ttft_s_p50": 0.2, "ttft_s_p99": None,
        "tpot_s_mean": None, "flags": ["edge_gap"], "invalid_reasons": [], "reason_details": [("edge_gap", "0.2 s")],
    }  # fmt: skip
    assert {name: read[name] for name in expected} == expected
    assert json.loads(read["experiment"])["workload"]["input_tokens"] == 16
    assert json.loads(read["engine_args"]) == {"attn_implementation": "sdpa"}
    assert (read["devices"][0]["bound_lo_j"], read["devices"][0]["bound_hi_j"]) == (4.0, 6.0)
    (request_read,) = read_table(run.path, "requests").to_pylist()
    assert (request_read["first_token_ns"], request_read["last_token_ns"], request_read["token_times_ns"]) == (10, 20, None)
    assert (request_read["output_chunks"], request_read["cached_tokens"], request_read["draft_tokens"]) == (2, 0, None)
    (phase_read,) = read_table(run.path, "phases").to_pylist()
    assert (phase_read["gang"], phase_read["duration_s"], phase_read["notes"]) == ("g0", 0.05, [("k", "v")])


def test_tokens_that_speculation_delivered_together_are_one_chunk() -> None:
    record = replace(RECORD, output_token_ids=(5, 6, 7, 8), token_times_ns=(10, 20, 20, 20), draft_tokens=6, accepted_tokens=2)
    row = rows.request_row(record, trial_id="c0-r1", attempt=1, latencies={}, keep_token_times=True)
    assert (row["output_tokens"], row["output_chunks"], row["draft_tokens"], row["accepted_tokens"]) == (4, 2, 6, 2)


def test_a_node_row_flattens_devices_with_their_calibration(tmp_path: Path) -> None:
    gpu = Device(uuid="GPU-1", name="H200", source="nvml", scope="gpu", method="measured_counter", power_limit_mw=7e5)
    cpu = Device(uuid="rapl:0", name="package", source="rapl", scope="cpu_package", method="measured_counter")
    calibration = Calibration(
        device_uuid="GPU-1", tick_period_s=0.1, has_instant=True, has_average=False, lag_s=0.01, call_s=1e-4
    )
    info = SamplerInfo(
        node="n1", hostname="h", pid=5, epoch=1, sample_hz=20.0, devices=(gpu, cpu), calibrations={"GPU-1": calibration},
        unavailable={"codecarbon": "not installed"},
        host={"cpu_model": "EPYC", "cpu_count_logical": 8, "memory_bytes": 2**34, "kernel": "6.1", "nvidia_driver": "580.1"},
    )  # fmt: skip
    run = RunDirectory.create(tmp_path, "demo")
    DatasetWriter(run).write_nodes([rows.node_row(info, {"ray": "2.60"})])
    (read,) = read_table(run.path, "nodes").to_pylist()
    assert read["gpu_names"] == ["H200"]
    assert [device["tick_period_s"] for device in read["devices"]] == [0.1, None]
    assert (read["nvidia_driver"], read["cpu_count_logical"], read["cpu_governor"]) == ("580.1", 8, None)
    assert json.loads(read["host"])["kernel"] == "6.1"


def test_flags_are_grouped_by_severity_once_with_every_detail() -> None:
    flags = [
        Flag(code="short_window", severity="flag", detail="0.5 s"),
        Flag(code="gpu_lost", severity="invalid", detail="GPU-1"),
        Flag(code="gpu_lost", severity="invalid", detail="GPU-2"),
        Flag(code="power_capped", severity="note", detail="600 W"),
    ]
    assert rows.flag_columns(flags) == {
        "invalid_reasons": ["gpu_lost"],
        "flags": ["short_window"],
        "notes": ["power_capped"],
        "reason_details": {"short_window": "0.5 s", "gpu_lost": "GPU-1; GPU-2", "power_capped": "600 W"},
    }


def test_a_failure_keeps_kind_message_and_traceback() -> None:
    try:
        raise DeviceMemoryError("no room for a batch of 512")
    except DeviceMemoryError as error:
        columns = rows.failure_columns(failed_from(error))
    assert columns["failure_kind"] == "out_of_memory"
    assert columns["status"] == "failed"
    assert "no room for a batch of 512" in columns["failure_message"]
    assert "Traceback" in columns["failure_traceback"]
