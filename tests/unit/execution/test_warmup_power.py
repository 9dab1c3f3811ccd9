"""Warm-up until power is steady, with the whole run driver, on a gang of two pretended hosts whose clocks are hours apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llem_ray.config.sweep import load_sweep
from llem_ray.core.measure_spec import CV_BATCHES
from llem_ray.energy.steadiness import cut_pieces, variation
from llem_ray.execution import warmup, warmup_power
from llem_ray.execution.driver import RunDriver, RunOptions
from llem_ray.planning.plan import make_plan
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory
from llem_ray.testing.cluster import PretendCluster
from llem_ray.testing.loads import Segment, SegmentLoad
from llem_ray.testing.nodes import PretendDevice, PretendHost

PIECE_S = 0.4
UNTIL_CV = 0.1
SWEEP = f"""
schema_version: 1
name: warm
base:
  model: {{config: llama-tiny}}
  engine: {{backend: fake, device: cpu, gpus: 2, tensor_parallel: 2, nodes: 2, engine_args: {{decode_ms: 20}}}}
  workload: {{output_tokens: 5}}
repeats: 1
measure:
  min_window_s: 0.5
  idle_baseline_s: 0
  gates: {{min_coverage: 0.5}}
  warmup: {{until_cv: {UNTIL_CV}, max_batches: 200}}
"""
SHORT = SWEEP.replace("max_batches: 200", "max_batches: 30")
CPU = SWEEP.replace("gpus: 2, tensor_parallel: 2, nodes: 2, ", "")


class Quiet:
    live = False

    def update(self, event: Any) -> None:
        pass

    def message(self, text: str) -> None:
        pass


SOON_S = 0.1


class FromTrialOn:
    """A constant load that becomes another one soon after a trial begins, however long this machine takes to begin it."""

    def __init__(self, before_w: float, segments: Callable[[float], Iterable[Segment]]) -> None:
        self._before, self._segments = Segment(0.0, before_w), segments
        self.begin_s = float("nan")
        self._load = SegmentLoad([self._before])

    def begin(self) -> None:
        """Nobody has read it for as far ahead as it changes."""
        self.begin_s = time.monotonic() + SOON_S
        self._load = SegmentLoad([self._before, *self._segments(self.begin_s)])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load, name)


class Warmed:
    """One trial on a leading host whose GPU draws 200 W, and another whose GPU does as it is told."""

    def __init__(self, folder: Path, load: Any, sweep: str = SWEEP) -> None:
        flat = SegmentLoad([Segment(0.0, 200.0)])
        self.other = PretendHost(name="other", devices=(PretendDevice(uuid="GPU-1", load=load),), offset_s=-18_000.0)
        self.lead = PretendHost(
            name="lead", devices=(PretendDevice(uuid="GPU-0", load=flat, tick_phase_s=0.03),), offset_s=7_200.0
        )
        self.cluster = PretendCluster([self.lead, self.other])
        if isinstance(load, FromTrialOn):
            self.cluster.on_trial = lambda _order, _nodes: load.begin()
        path = folder / "sweep.yaml"
        path.write_text(sweep)
        self.rundir = RunDirectory.create(folder, "warm-00000000")
        options = RunOptions(begin_ns=time.monotonic_ns(), cache_dir=str(folder))
        plan = make_plan(load_sweep(path), gpus_available=2)
        self.driver = RunDriver(plan, self.rundir, self.cluster, options, Quiet())

    def run(self) -> dict[str, Any]:
        self.driver.run()
        (row,) = read_table(self.rundir.path, "trials").to_pylist()
        assert row["status"] == "completed", row["failure_message"]
        return row

    def listen(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, list[float]]]:
        """What the engine is told, with the edges of the stretches that it is of, in s of this process's clock."""
        told: list[tuple[float, list[float]]] = []
        whole = warmup_power.power_seen

        def power_seen(record: Any, marks: Any, meter: Any) -> Any:
            seen = whole(record, marks, meter)
            if seen is not None:
                edges_ns = cut_pieces([t_ns for batches, t_ns in marks if batches <= seen.batches], CV_BATCHES, PIECE_S)
                assert edges_ns is not None
                told.append((seen.cv, [self.lead.to_ours(t_ns) / 1e9 for t_ns in edges_ns.tolist()]))
            return seen

        monkeypatch.setattr(warmup_power, "power_seen", power_seen)
        return told

    def spans(self) -> list[dict[str, Any]]:
        """The attempt's phases as the second GPU's ledger has them, in order."""
        phases = read_table(self.rundir.path, "phases").to_pylist()
        mine = [one for one in phases if one["device_uuid"] == "GPU-1" and one["trial_id"] is not None]
        return sorted(mine, key=lambda one: one["begin_ns"])


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "PIECE_S", PIECE_S)
    monkeypatch.setattr(warmup_power, "PIECE_S", PIECE_S)


@pytest.fixture
def warmed(tmp_path: Path) -> Callable[..., Warmed]:
    return lambda load, sweep=SWEEP: Warmed(tmp_path, load, sweep)


def test_it_waits_for_a_host_that_does_not_lead(warmed: Callable[..., Warmed], monkeypatch: pytest.MonkeyPatch) -> None:
    """Step times are steady after 5 batches, 0.5 s; the other host's GPU swings for 4 s before it holds 600 W."""
    load = FromTrialOn(
        600.0, lambda begin_s: [Segment(begin_s + turn, 100.0 if turn % 2 else 600.0, "linear") for turn in range(5)]
    )
    ran = warmed(load)
    told = ran.listen(monkeypatch)
    row = ran.run()
    assert (row["warmup_end"], row["power_valid"]) == ("steady", True)
    assert row["warmup_step_cv"] <= UNTIL_CV
    assert row["warmup_power_cv"] <= UNTIL_CV
    assert "warmup_not_steady" not in row["flags"]
    spans = ran.spans()
    assert [span["phase"] for span in spans[:3]] == ["warmup", "guard", "measured"]
    assert all(before["end_ns"] == after["begin_ns"] for before, after in pairwise(spans))
    end_s, warm_s = ran.other.to_ours(spans[0]["end_ns"]) / 1e9, load.begin_s + 4.0
    assert end_s > warm_s, "while it swings its variation is far over the limit"
    assert end_s < warm_s + CV_BATCHES * PIECE_S + 30.0
    # What the window then has is the steady power of both.
    assert row["total_energy_j"] / row["window_s"] == pytest.approx(800.0, rel=0.01)
    # What the engine was told is what both GPUs really drew over the very same stretches.
    assert len(told) >= 3
    assert told[0][0] > UNTIL_CV >= told[-1][0]
    for cv, edges_s in told:
        true_w = [200.0 + load.energy_j(a, b) / (b - a) for a, b in pairwise(edges_s)]
        assert cv == pytest.approx(variation(true_w), abs=0.01)


def test_power_that_never_settles_ends_in_the_limit_and_is_flagged(warmed: Callable[..., Warmed]) -> None:
    load = FromTrialOn(
        100.0, lambda begin_s: [Segment(begin_s + turn * 0.7, 600.0 if turn % 2 else 100.0) for turn in range(200)]
    )
    ran = warmed(load, SHORT)
    row = ran.run()
    assert (row["warmup_end"], row["power_valid"]) == ("limit", True)
    assert row["warmup_power_cv"] > UNTIL_CV
    assert row["warmup_step_cv"] > 0  # small, but where others use the cores
    assert "warmup_not_steady" in row["flags"]
    assert row["warmup_batches"] >= 30
    # The limit was waited for no longer than the answer took.
    assert ran.spans()[0]["duration_s"] < 40.0


def test_without_a_meter_step_times_decide_and_the_row_says_so(warmed: Callable[..., Warmed]) -> None:
    row = warmed(SegmentLoad([Segment(0.0, 300.0)]), CPU).run()
    assert (row["warmup_end"], row["warmup_power_cv"]) == ("steady", None)
    assert row["warmup_batches"] < 200
    assert "warmup_without_power" in row["notes"]
