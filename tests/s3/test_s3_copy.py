"""Whole runs of the real command that are copied to a real S3 server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from submission import Submission, kill_hard

from llem_ray.core.errors import ResultsError
from llem_ray.results.copied import OWNER, data_files, fetch_run, journal_pieces
from llem_ray.results.destination import Destination, open_destination
from llem_ray.results.reader import read_table
from llem_ray.results.schema import TABLE_NAMES

pytestmark = [pytest.mark.slow]

SWEEP = """
schema_version: 1
name: copied
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, engine_args: {decode_ms: 1}}
  workload: {output_tokens: 8}
sweep:
  workload.output_tokens: {range: [4, 9, 1]}
repeats: 1
measure:
  sources: [replay]
  min_window_s: 0.3
  idle_baseline_s: 0
  warmup: {batches: 0}
  gates: {min_coverage: 0.3}
"""


def place(tmp_path: Path, name: str, sweep: str = SWEEP) -> Submission:
    """A machine with a results folder of its own."""
    (tmp_path / name).mkdir()
    return Submission(tmp_path / name, sweep)


def llem(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llem_ray", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def copy_of(uri: str, run: Submission) -> Destination:
    return open_destination(uri).child(run.rundir.name)


def test_a_whole_run_is_copied_and_read_back(server: Any, tmp_path: Path) -> None:
    here = place(tmp_path, "here")
    uri = server.uri("bucket/results")
    code, output = here.run("--inline", "--copy-to", uri)
    assert code == 0, output
    names = copy_of(uri, here).list_files()
    assert data_files(names) == {str(path.relative_to(here.rundir.path)) for path in here.rundir.path.glob("*/part-*")}
    assert {"sweep.json", "plan.json", "environment.json", "run.log", OWNER} <= names.keys()
    assert journal_pieces(names)
    fetched = fetch_run(open_destination(uri), tmp_path / "there", here.rundir.name)
    assert fetched is not None
    for table in TABLE_NAMES:
        assert read_table(fetched.path, table).equals(read_table(here.rundir.path, table))
    assert fetched.journal_path.read_bytes() == here.rundir.journal_path.read_bytes()
    there = place(tmp_path, "elsewhere")
    code, output = there.run("--inline", "--copy-to", uri)
    assert code == 0, output
    assert "going on from its copy in s3://bucket/results/copied-" in output
    assert "is finished" in output
    code, output = there.run("--inline", "--again", "--copy-to", uri)
    assert code == 0, output
    assert {f"{here.rundir.name}", f"{here.rundir.name}-2"} <= set(open_destination(uri).list_folders())


def test_a_killed_run_goes_on_elsewhere_and_repeats_nothing(server: Any, tmp_path: Path) -> None:
    here, there = place(tmp_path, "here"), place(tmp_path, "there")
    uri = server.uri("bucket/results")
    process = here.start("--inline", "--copy-to", uri, "--set", "measure.min_window_s=2")
    here.wait_until(lambda: here.journal().count('"done"') >= 2, process)
    copy = copy_of(uri, here)
    here.wait_until(lambda: len(data_files(copy.list_files())) >= 4, process)
    kill_hard(process)
    seed = fetch_run(open_destination(uri), tmp_path / "look", here.rundir.name)
    assert seed is not None
    copied = {row["trial_id"]: row for row in read_table(seed.path, "trials").to_pylist()}
    assert copied
    code, output = there.run("--inline", "--copy-to", uri, "--set", "measure.min_window_s=2")
    assert code == 0, output
    assert "going on from its copy" in output
    trials = there.trials()
    completed = [row["trial_id"] for row in trials if row["status"] == "completed"]
    assert len(completed) == len(set(completed)) == 6
    assert [row for row in trials if row["trial_id"] in copied] == list(copied.values())
    assert there.journal().count('"run_started"') == 2
    code, output = here.run("--inline", "--copy-to", uri, "--set", "measure.min_window_s=2")
    assert code == 5, output
    assert "this run after it went on elsewhere" in output


def test_a_server_that_dies_in_the_middle_costs_nothing(server: Any, tmp_path: Path) -> None:
    here = place(tmp_path, "here")
    uri = server.uri("bucket/results")
    process = here.start("--inline", "--copy-to", uri, "--set", "measure.min_window_s=2")
    here.wait_until(lambda: '"done"' in here.journal(), process)
    server.stop()
    code, output = here.finish(process)
    assert code == 0, output
    assert "it cannot be reached" in output
    assert "the run goes on" in output
    assert "is not complete" in output
    assert f"llem-ray copy {here.rundir.path} '{uri}'" in output
    assert len(here.trials()) == 6
    dead = llem("copy", here.rundir.path, uri)
    assert dead.returncode == 5
    assert "it cannot be reached" in dead.stderr
    server.start()
    completed = llem("copy", here.rundir.path, uri)
    assert completed.returncode == 0, completed.stderr
    assert "copied to s3://bucket/results/copied-" in completed.stdout
    fetched = fetch_run(open_destination(uri), tmp_path / "there", here.rundir.name)
    assert fetched is not None
    assert read_table(fetched.path, "trials").equals(read_table(here.rundir.path, "trials"))


def test_an_unreachable_server_is_refused_before_anything_is_measured(server: Any, tmp_path: Path) -> None:
    here = place(tmp_path, "here")
    server.stop()
    code, output = here.run("--inline", "--copy-to", server.uri("bucket/results"))
    assert code == 5, output
    assert "error: cannot copy to s3://bucket/results: it cannot be reached" in output
    assert not here.results.exists()


def test_a_missing_bucket_is_said(server: Any) -> None:
    with pytest.raises(ResultsError, match="its bucket does not exist"):
        open_destination(server.uri("other/results"))
