from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from llem_ray.core.errors import ResultsError
from llem_ray.results.export import export_run
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.schema import SCHEMAS
from llem_ray.results.writer import DatasetWriter

Make = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, make_trial: Make) -> RunDirectory:
    run = RunDirectory.create(tmp_path / "runs", "demo")
    writer = DatasetWriter(run, compact_trials=2)
    for number in range(3):
        writer.write_trial(*make_trial(number, failure_message='said "no",\nthen more'))
    return run


def test_csv_holds_every_column_lists_as_json_and_null_as_nothing(run: RunDirectory, tmp_path: Path) -> None:
    assert export_run(run.path, "csv", tmp_path / "out.csv") == 3
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == SCHEMAS["trials"].names
    assert rows[1]["total_energy_j"] == "101.0"
    assert rows[1]["joules_per_output_token"] == ""
    assert rows[1]["failure_message"] == 'said "no",\nthen more'
    assert rows[1]["started_utc"] == "2026-01-02T03:04:05.678901Z"
    assert json.loads(rows[1]["devices"])[0]["energy_j"] == 101.0
    assert json.loads(rows[1]["null_reasons"]) == {"host_cpu_energy_j": "no RAPL here"}


def test_json_is_an_array_of_objects(run: RunDirectory, tmp_path: Path) -> None:
    export_run(run.path, "json", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["trial_id"] for row in rows] == [f"cell000{n}-r0" for n in range(3)]
    assert rows[0]["joules_per_output_token"] is None
    assert rows[0]["null_reasons"] == {"host_cpu_energy_j": "no RAPL here"}


def test_parquet_is_one_file_with_the_schema(run: RunDirectory, tmp_path: Path) -> None:
    export_run(run.path, "parquet", tmp_path, table="requests")
    table = pq.read_table(tmp_path / "demo-requests.parquet")
    assert table.to_pylist() == read_table(run.path, "requests").to_pylist()
    assert table.schema.metadata == SCHEMAS["requests"].metadata
    assert table.schema.field("ttft_s").metadata[b"unit"] == b"s"


def test_an_empty_table_is_an_empty_file_of_its_format(run: RunDirectory, tmp_path: Path) -> None:
    assert export_run(run.path, "json", tmp_path / "n.json", table="nodes") == 0
    assert json.loads((tmp_path / "n.json").read_text()) == []
    export_run(run.path, "csv", tmp_path / "n.csv", table="nodes")
    assert (tmp_path / "n.csv").read_text().strip().split(",") == SCHEMAS["nodes"].names


def test_an_existing_file_is_kept_unless_forced(run: RunDirectory, tmp_path: Path) -> None:
    dest = tmp_path / "out.csv"
    dest.write_text("mine")
    with pytest.raises(ResultsError, match="exists already") as caught:
        export_run(run.path, "csv", dest)
    assert "--force" in (caught.value.hint or "")
    assert dest.read_text() == "mine"
    export_run(run.path, "csv", dest, force=True)
    assert dest.read_text().startswith("schema_version,run,trial_id")


def test_what_cannot_be_written_is_one_clear_error(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="there is no folder"):
        export_run(run.path, "csv", tmp_path / "absent" / "out.csv")
    with pytest.raises(ResultsError, match="unknown export format 'xml'"):
        export_run(run.path, "xml", tmp_path / "out.xml")  # type: ignore[arg-type]
    with pytest.raises(ResultsError, match="no run directory"):
        export_run(tmp_path / "nothing", "csv", tmp_path / "out.csv")
    assert list(tmp_path.glob("out*")) == []
