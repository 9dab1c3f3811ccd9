from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from llem_ray.core.errors import ResultsError
from llem_ray.results import segments
from llem_ray.results.reader import read_table, recorded_attempts
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.schema import SCHEMA_VERSION, SCHEMAS, TABLE_NAMES
from llem_ray.results.writer import DatasetWriter

Make = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "demo-0a1b2c3d")


@pytest.fixture
def finished(run: RunDirectory, make_trial: Make, make_batch: Make) -> RunDirectory:
    writer = DatasetWriter(run, compact_trials=2)
    writer.write_nodes([{"node": "n1", "hostname": "h", "epoch": 2, "unavailable": {"nvml": "no driver"}}])
    for number in range(5):
        writer.write_power([make_batch(number)])
        writer.write_trial(*make_trial(number))
    writer.finish()
    return run


def test_what_was_written_is_read_back_before_and_after_compaction(run: RunDirectory, make_trial: Make, make_batch: Make) -> None:
    writer = DatasetWriter(run)
    writer.write_power([make_batch(0)])
    row, requests, phases = make_trial(0)
    assert writer.write_trial(row, requests, phases)
    tables = {name: read_table(run.path, name) for name in TABLE_NAMES}
    (read,) = tables["trials"].to_pylist()
    assert {name: read[name] for name in row if name not in {"devices", "null_reasons"}} == {
        name: value for name, value in row.items() if name not in {"devices", "null_reasons"}
    }
    assert read["null_reasons"] == [("host_cpu_energy_j", "no RAPL here")]
    assert read["devices"][0]["flags"] == ["edge_gap"]
    assert (read["run"], read["schema_version"], read["window_s"]) == (run.name, SCHEMA_VERSION, None)
    assert [item["token_times_ns"] for item in tables["requests"].to_pylist()] == [[1, 2, 3]] * 3
    assert tables["phases"].column("phase").to_pylist() == ["warmup", "measured"]
    writer.finish()
    for name, table in tables.items():
        assert table.schema.equals(SCHEMAS[name], check_metadata=True)
        assert read_table(run.path, name).equals(table, check_metadata=True)


def test_missing_readings_are_null_with_the_error_beside_them(run: RunDirectory, make_batch: Make) -> None:
    writer = DatasetWriter(run)
    batch = make_batch(3)
    writer.write_power([batch])
    assert read_table(run.path, "power").num_rows == 0
    writer.flush()
    power = read_table(run.path, "power")
    assert power.column("power_mw").null_count == 1
    assert power.column("power_avg_mw").null_count == 8
    assert not np.isnan(power.column("power_mw").drop_null().to_numpy()).any()
    assert power.column("error").to_pylist() == ["timeout"] + [None] * 7
    assert power.column("device_uuid").to_pylist() == list(batch.devices) * 4
    assert power.column("t_ns").to_pylist() == batch.t_ns.tolist()
    (state,) = read_table(run.path, "states").to_pylist()
    assert (state["temperature_c"], state["clock_event_mask"], state["sm_clock_mhz"]) == (54.0, 8, None)


def test_many_samples_reach_the_disk_without_a_trial(run: RunDirectory, make_batch: Make) -> None:
    writer = DatasetWriter(run)
    writer.write_power([make_batch(seq, 40_000) for seq in range(2)])
    assert read_table(run.path, "power").num_rows == 80_000


@pytest.mark.parametrize("compacted", [False, True])
def test_samples_that_an_earlier_session_wrote_are_left_out(run: RunDirectory, make_batch: Make, compacted: bool) -> None:
    """A sampler that outlives its run driver hands out everything again to the next one."""
    first = DatasetWriter(run)
    first.write_power([make_batch(1), make_batch(2)])
    first.finish() if compacted else first.flush()
    rows = read_table(run.path, "power").num_rows
    states = read_table(run.path, "states").num_rows
    second = DatasetWriter(run)
    second.write_power([make_batch(1), make_batch(2)])
    second.flush()
    assert read_table(run.path, "power").num_rows == rows
    assert read_table(run.path, "states").num_rows == states
    second.write_power([make_batch(3)])
    second.flush()
    assert read_table(run.path, "power").num_rows == rows * 3 // 2


def test_an_attempt_is_written_once_also_by_a_later_writer(run: RunDirectory, make_trial: Make) -> None:
    writer = DatasetWriter(run, compact_trials=1)
    assert writer.write_trial(*make_trial(0, status="failed"))
    assert not writer.write_trial(*make_trial(0))
    assert writer.write_trial(*make_trial(0, attempt=2))
    later = DatasetWriter(run)
    assert not later.write_trial(*make_trial(0, attempt=2))
    assert recorded_attempts(run.path) == {("cell0000-r0", 1): "failed", ("cell0000-r0", 2): "completed"}


def test_a_wrong_column_or_type_is_named_and_writes_nothing(run: RunDirectory, make_trial: Make) -> None:
    writer = DatasetWriter(run)
    with pytest.raises(ResultsError, match="table trials has no column energi_j"):
        writer.write_trial(*make_trial(0, energi_j=1.0))
    with pytest.raises(ResultsError, match=r"table trials: column window_s \(double\)"):
        writer.write_trial(*make_trial(0, window_s="long"))
    row, _, _ = make_trial(0)
    with pytest.raises(ResultsError, match="table requests has no column bogus"):
        writer.write_trial(row, [{"bogus": 1}])
    assert read_table(run.path, "trials").num_rows == 0
    assert writer.write_trial(row)


def test_compaction_follows_the_trials_and_keeps_their_order(run: RunDirectory, make_trial: Make) -> None:
    writer = DatasetWriter(run, compact_trials=4)
    parts = []
    for number in range(10):
        writer.write_trial(*make_trial(number))
        parts.append(len(segments.list_parts(run.table_path("trials"))[0]))
    assert parts == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert read_table(run.path, "trials", ["trial_id"]).to_pylist() == [{"trial_id": f"cell{n:04d}-r0"} for n in range(10)]


def test_power_heavy_runs_compact_by_size(
    run: RunDirectory, make_trial: Make, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llem_ray.results.writer.COMPACT_BYTES", 10_000)
    writer = DatasetWriter(run)
    for number in range(2):
        writer.write_power([make_batch(number, 2000)])
        writer.write_trial(*make_trial(number))
    assert len(segments.list_parts(run.table_path("power"))[0]) == 1
    assert read_table(run.path, "power").num_rows == 4000


def test_a_reader_never_sees_a_row_missing_or_twice_while_a_run_goes_on(run: RunDirectory, make_trial: Make) -> None:
    writer = DatasetWriter(run, compact_trials=2)
    writer.write_trial(*make_trial(0))
    written = [1]
    wrong: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            at_least = written[0]
            trials = read_table(run.path, "trials", ["trial_id"]).column(0).to_pylist()
            if len(set(trials)) != len(trials) or len(trials) < at_least:
                wrong.append(f"{len(trials)} rows, {len(set(trials))} distinct, {at_least} written")

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 40):
        writer.write_trial(*make_trial(number))
        written[0] += 1
    stop.set()
    reader.join()
    assert not wrong


def test_every_reader_opens_every_table(finished: RunDirectory) -> None:
    for name in TABLE_NAMES:
        pattern = f"{finished.path}/{name}/*.parquet"
        rows = {
            "trials": 5,
            "requests": 15,
            "steps": 0,
            "loads": 0,
            "power": 40,
            "states": 5,
            "phases": 10,
            "nodes": 1,
            "clocks": 0,
        }[name]
        assert ds.dataset(finished.path / name).to_table().num_rows == rows
        assert pl.read_parquet(pattern).height == rows
        assert len(pd.read_parquet(finished.path / name)) == rows
        assert duckdb.sql(f"select count(*) from '{pattern}'").fetchall() == [(rows,)]


def test_readers_agree_on_values(finished: RunDirectory) -> None:
    pattern = f"{finished.path}/trials/*.parquet"
    sql = f"select trial_id, total_energy_j, started_utc, devices[1].uuid, flags[1] from '{pattern}' order by trial_id limit 1"
    when = datetime(2026, 1, 2, 3, 4, 5, 678901)
    expected = ("cell0000-r0", 100.0, when, "GPU-11111111-2222-3333-4444-555555555555", "random_weights")
    assert duckdb.sql(sql).fetchall() == [expected]
    frame = pl.read_parquet(pattern).sort("trial_id")
    first = frame.row(0, named=True)
    found = (first["trial_id"], first["total_energy_j"], first["started_utc"], first["devices"][0]["uuid"], first["flags"][0])
    assert found == expected
    table = pd.read_parquet(finished.path / "trials").sort_values("trial_id")
    assert table["started_utc"].iloc[0] == pd.Timestamp(when)
    assert table["joules_per_output_token"].isna().all()
    joined = f"""select t.trial_id, count(*) from '{pattern}' t join '{finished.path}/requests/*.parquet' r
                 using (run, trial_id, attempt) group by all order by all"""
    assert duckdb.sql(joined).fetchall() == [(f"cell{n:04d}-r0", 3) for n in range(5)]


def test_a_run_without_any_trial_still_opens_everywhere(run: RunDirectory) -> None:
    DatasetWriter(run).finish()
    for name in TABLE_NAMES:
        assert duckdb.sql(f"select count(*) from '{run.path}/{name}/*.parquet'").fetchall() == [(0,)]
        assert pl.read_parquet(f"{run.path}/{name}/*.parquet").columns == SCHEMAS[name].names


def test_a_run_of_an_older_llem_ray_with_fewer_columns_is_read(run: RunDirectory, make_trial: Make) -> None:
    writer = DatasetWriter(run)
    writer.write_trial(*make_trial(0))
    writer.finish()
    (path,) = segments.list_parts(run.table_path("trials"))[0]
    old = pq.read_table(path).drop_columns(["window_s", "gap_s"])
    pq.write_table(old, path)
    DatasetWriter(run).write_trial(*make_trial(1, window_s=2.5))
    table = read_table(run.path, "trials", ["trial_id", "window_s"])
    assert table.to_pylist() == [{"trial_id": "cell0000-r0", "window_s": None}, {"trial_id": "cell0001-r0", "window_s": 2.5}]


def test_another_schema_version_is_refused(run: RunDirectory, make_trial: Make) -> None:
    writer = DatasetWriter(run)
    writer.write_trial(*make_trial(0))
    writer.finish()
    (path,) = segments.list_parts(run.table_path("trials"))[0]
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"llem_ray.schema_version": b"99"}), path)
    with pytest.raises(ResultsError, match="has schema version 99; this llem-ray reads version 1"):
        read_table(run.path, "trials")
    pq.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(ResultsError, match="has schema version none"):
        read_table(run.path, "trials")


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"garbage", lambda data: data[:-3] + b"abc"]
)
def test_damaged_files_are_one_clear_error(run: RunDirectory, make_trial: Make, damage: Callable[[bytes], bytes]) -> None:
    writer = DatasetWriter(run)
    writer.write_trial(*make_trial(0))
    (segment,) = segments.list_segments(run.segments_path).values()
    whole = segment.read_bytes()
    segment.write_bytes(damage(whole))
    with pytest.raises(ResultsError, match=str(segment)):
        read_table(run.path, "trials")
    segment.write_bytes(whole)
    writer.finish()
    (part,) = segments.list_parts(run.table_path("trials"))[0]
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(ResultsError, match=str(part)):
        read_table(run.path, "trials")


def test_unknown_run_or_column_is_one_clear_error(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no run directory at"):
        read_table(tmp_path / "absent", "trials")
    with pytest.raises(ResultsError, match="table trials has no column nope"):
        read_table(run.path, "trials", ["trial_id", "nope"])
    assert read_table(run.path, "trials", ["trial_id"]).schema.types == [pa.string()]
