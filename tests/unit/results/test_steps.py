"""Steps in the dataset: as they were told, before and after compaction, small on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from llem_ray.core.backend import StepEvent
from llem_ray.core.step_log import StepLog
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.sizes import dataset_sizes
from llem_ray.results.writer import DatasetWriter

PASS_STEPS = 128


def steps(number: int) -> list[StepEvent]:
    """Steps of about 3 ms: passes of a prefill and decode steps that grow."""
    random, told, at_ns = np.random.default_rng(0), [], 5 * 10**13
    for index, length_ns in enumerate(random.normal(3e6, 2e5, number).astype(int).tolist()):
        place = index % PASS_STEPS
        told.append(
            StepEvent(
                begin_ns=at_ns,
                end_ns=at_ns + length_ns,
                kind="decode" if place else "prefill",
                prefill_tokens=0 if place else 512,
                decode_tokens=8,
                computed_tokens=8 if place else 512,
                flops=6e9 + place if place else None,
                read_bytes=None,
            )
        )
        at_ns += length_ns + 20_000
    return told


def log_of(events: list[StepEvent]) -> StepLog:
    log = StepLog()
    for event in events:
        log.add(event)
    return log


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "demo-0a1b2c3d")


def test_steps_are_read_back_as_they_were_told(run: RunDirectory, make_trial: Callable[..., Any]) -> None:
    events, writer = steps(300), DatasetWriter(run)
    for number in range(2):
        writer.write_trial(*make_trial(number), steps=log_of(events))
    loose = read_table(run.path, "steps")
    writer.finish()
    assert read_table(run.path, "steps").equals(loose, check_metadata=True)
    read = loose.to_pylist()
    assert len(read) == 600
    assert [row["trial_id"] for row in read] == ["cell0000-r0"] * 300 + ["cell0001-r0"] * 300
    names = ("begin_ns", "end_ns", "kind", "prefill_tokens", "decode_tokens", "computed_tokens", "flops", "read_bytes")
    assert [tuple(row[name] for name in names) for row in read[300:]] == [
        tuple(getattr(event, name) for name in names) for event in events
    ]
    joined = f"""select count(*), sum(s.end_ns - s.begin_ns) from '{run.path}/steps/*.parquet' s
                 join '{run.path}/trials/*.parquet' t using (run, trial_id, attempt) where s.kind = 'prefill'"""
    prefills = [event.end_ns - event.begin_ns for event in events if event.kind == "prefill"]
    assert duckdb.sql(joined).fetchall() == [(2 * len(prefills), 2 * sum(prefills))]


def test_a_trial_whose_steps_are_not_recorded_has_none(run: RunDirectory, make_trial: Callable[..., Any]) -> None:
    writer = DatasetWriter(run)
    writer.write_trial(*make_trial(0))
    writer.write_trial(*make_trial(1), steps=StepLog())
    writer.finish()
    assert read_table(run.path, "steps").num_rows == 0


def test_a_step_takes_few_bytes_and_the_sizes_say_so(run: RunDirectory, make_trial: Callable[..., Any]) -> None:
    writer = DatasetWriter(run)
    row, requests, phases = make_trial(0)
    times_ns = [event.end_ns for event in steps(4000)]
    requests[0]["token_times_ns"] = times_ns
    writer.write_trial(row, requests, phases, steps=log_of(steps(20_000)))
    assert dataset_sizes(run.path).keys() == {"segments"}
    writer.finish()
    sizes = dataset_sizes(run.path)
    assert sizes["steps"] < 8 * 20_000
    assert sizes["token_times"] < 5 * 4000
    on_disk = {path: path.stat().st_size for path in run.path.glob("*/*.parquet")}
    assert sum(sizes.values()) == sum(on_disk.values())
