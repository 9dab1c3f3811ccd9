"""Bookkeeping of a run driver that is held up: what samplers hold is waited for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_samplers import FakeCluster, FakeSampler

from llem_ray.config.sweep import load_sweep
from llem_ray.core.energy import PhaseSpan
from llem_ray.core.units import NS_PER_S
from llem_ray.execution.bookkeeper import ADVANCE_S, FIRST_S, PATIENCE_S, Bookkeeper
from llem_ray.execution.records import SpansAdded
from llem_ray.planning.plan import make_plan
from llem_ray.results.journal import Journal
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.writer import DatasetWriter
from llem_ray.testing.clock import VirtualClock

SWEEP = """
schema_version: 1
name: one
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu}
repeats: 1
measure: {sources: [nvml]}
"""
POWER_W = 100.0


class Bench:
    """One host whose sampler polls all the time, and a bookkeeper that is driven by hand."""

    def __init__(self, folder: Path) -> None:
        (folder / "sweep.yaml").write_text(SWEEP)
        self.clock = VirtualClock()
        cluster = FakeCluster(self.clock)
        self.sampler: FakeSampler = cluster.sampler("h1", "G1")
        cluster.add("n1", self.sampler, gpus=1)
        self.meter = cluster.meter()
        self.meter.open(cluster.nodes())
        self.rundir = RunDirectory.create(folder / "results", "one")
        self.writer = DatasetWriter(self.rundir)
        plan = make_plan(load_sweep(folder / "sweep.yaml"))
        journal = Journal.open(self.rundir.journal_path)
        self.begin_ns = self.clock.monotonic_ns()
        self.book = Bookkeeper(plan, self.meter, journal, self.writer, self.rundir.replay(), self.clock, self.begin_ns)
        self._sampled_s = self.begin_ns / NS_PER_S - 1.0

    def go_on(self, seconds: float) -> None:
        """Time passes, in which the sampler polls."""
        self.clock.advance_ns(round(seconds * NS_PER_S))
        now_s = self.clock.monotonic_ns() / NS_PER_S
        times = np.arange(self._sampled_s, now_s, 0.05)
        self.sampler.sample(len(self.sampler.batches) + 1, times, power_w=POWER_W)
        self._sampled_s = float(times[-1]) + 0.05

    def run(self, seconds: int) -> None:
        """The bookkeeper works as usual."""
        for _ in range(seconds):
            self.go_on(1.0)
            self.book._step()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_nobodys_time_is_not_given_up_while_nobody_asked(bench: Bench) -> None:
    bench.run(5)
    startup = PhaseSpan(phase="startup", begin_ns=bench.begin_ns, end_ns=bench.clock.monotonic_ns())
    bench.book.add(SpansAdded(gang=None, spans=(startup,)))
    bench.run(round(FIRST_S + ADVANCE_S) + 5)
    bench.go_on(3 * PATIENCE_S)  # the thread is held up, by a full disk or by a compaction
    bench.book._advance(bench.clock.monotonic_ns())
    bench.run(round(2 * ADVANCE_S))
    bench.writer.write_phases(bench.book._nobodys + bench.book._phases + bench.book._ledger.finish())
    bench.writer.finish()
    rows = read_table(bench.rundir.path, "phases").to_pylist()
    assert {row["phase"] for row in rows} == {"startup", "unleased"}
    for row in rows:
        assert row["energy_j"] == pytest.approx(POWER_W * (row["end_ns"] - row["begin_ns"]) / NS_PER_S, rel=0.01)


def test_an_event_waits_for_samples_that_were_not_asked_for(bench: Bench) -> None:
    bench.run(5)
    event = SpansAdded(gang=None, spans=(PhaseSpan(phase="gap", begin_ns=0, end_ns=bench.clock.monotonic_ns() + NS_PER_S),))
    bench.go_on(3 * PATIENCE_S)
    assert not bench.book._is_ready(event)
    bench.book._pump(hurry=True)
    assert bench.book._is_ready(event)


def test_an_event_does_not_wait_for_samples_that_will_not_come(bench: Bench) -> None:
    bench.run(5)
    event = SpansAdded(gang=None, spans=(PhaseSpan(phase="gap", begin_ns=0, end_ns=bench.clock.monotonic_ns() + NS_PER_S),))
    for _ in range(round(PATIENCE_S) + 5):  # it answers, and has nothing
        bench.clock.advance_ns(NS_PER_S)
        bench.book._pump(hurry=True)
    assert bench.book._is_ready(event)
