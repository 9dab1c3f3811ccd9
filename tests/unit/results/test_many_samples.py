"""Samples of a large cluster: many batches at once, in pieces of bounded size, on the disk and in compactions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llem_ray.core.power import DeviceState, SampleBatch
from llem_ray.results import segments
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.samples import power_table, state_table
from llem_ray.results.schema import SCHEMAS
from llem_ray.results.writer import DatasetWriter

Make = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "demo-0a1b2c3d")


def batch_of(make_batch: Make, node: str, seq: int, length: int = 8, **more: Any) -> SampleBatch:
    made: SampleBatch = make_batch(seq, length)
    return dataclasses.replace(made, node=node, devices=(f"{node}/gpu", f"{node}/cpu"), **more)


def test_one_table_of_many_batches_is_as_many_tables_of_one(make_batch: Make) -> None:
    batches = [batch_of(make_batch, f"n{node}", seq, length=5 + node) for seq in (1, 2) for node in range(3)]
    together = power_table("run", batches).to_pylist()
    assert together == [row for batch in batches for row in power_table("run", [batch]).to_pylist()]
    assert [row["error"] for row in together if row["error"]] == ["timeout"] * 6
    states = state_table("run", batches).to_pylist()
    assert states == [row for batch in batches for row in state_table("run", [batch]).to_pylist()]
    assert {row["node"] for row in states} == {"n0", "n1", "n2"}


def test_states_of_some_batches_only_and_of_none(make_batch: Make) -> None:
    large = DeviceState(t_ns=5, device_uuid="other", memory_used_bytes=2**60 + 1, process_count=3)
    batches = [batch_of(make_batch, "n0", 1, states=()), batch_of(make_batch, "n1", 1, states=(large,))]
    [row] = state_table("run", batches).to_pylist()
    assert (row["node"], row["device_uuid"], row["memory_used_bytes"], row["process_count"]) == ("n1", "other", 2**60 + 1, 3)
    assert row["temperature_c"] is None
    assert state_table("run", batches[:1]).num_rows == 0


def test_what_is_handed_in_at_once_is_written_in_pieces(
    run: RunDirectory, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llem_ray.results.writer.TABLE_BATCHES", 4)
    monkeypatch.setattr("llem_ray.results.writer.FLUSH_ROWS", 20)
    writer = DatasetWriter(run)
    writer.write_power([batch_of(make_batch, f"n{node}", 1) for node in range(10)])
    assert len(segments.list_segments(run.segments_path)) == 2
    assert writer.held_rows == 2 * 8
    writer.flush()
    assert writer.held_rows == 0
    assert read_table(run.path, "power").num_rows == 80


def test_a_compaction_holds_no_more_than_a_row_group(
    run: RunDirectory, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "ROW_GROUP", 30)
    monkeypatch.setattr("llem_ray.results.writer.FLUSH_ROWS", 1)
    writer = DatasetWriter(run)
    for seq, length in enumerate([100, 8, 8, 8, 8, 8, 45], start=1):
        writer.write_power([batch_of(make_batch, f"n{seq}", seq, length)])
    before = read_table(run.path, "power")
    writer.finish()
    [part] = segments.list_parts(run.table_path("power"))[0]
    groups = pq.ParquetFile(part).metadata
    assert max(groups.row_group(i).num_rows for i in range(groups.num_row_groups)) <= 30
    assert read_table(run.path, "power").equals(before)
    assert before.num_rows == 185


def test_names_are_plain_strings_for_every_reader(run: RunDirectory, make_batch: Make) -> None:
    writer = DatasetWriter(run)
    writer.write_power([batch_of(make_batch, "n1", 1)])
    writer.flush()
    assert read_table(run.path, "power").schema.equals(SCHEMAS["power"])
    writer.finish()
    [part] = segments.list_parts(run.table_path("power"))[0]
    assert pq.read_schema(part).field("node").type == pa.string()


def test_segments_of_an_older_llem_ray_are_compacted_with_new_ones(run: RunDirectory, make_batch: Make) -> None:
    old = segments.conform("power", power_table("run", [batch_of(make_batch, "n1", 1)]))
    segments.write_segment(segments.segment_path(run.segments_path, 1), {"power": old.drop_columns(["error"])})
    writer = DatasetWriter(run)
    writer.write_power([batch_of(make_batch, "n2", 1)])
    writer.finish()
    rows = read_table(run.path, "power").to_pylist()
    assert [row["node"] for row in rows] == ["n1"] * 8 + ["n2"] * 8
    assert (rows[0]["error"], rows[8]["error"]) == (None, "timeout")
