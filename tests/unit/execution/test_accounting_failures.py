"""What a window is worth when a host of its gang fell silent, or was restarted."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fake_samplers import FakeCluster, FakeSampler, gpu

from llem_ray.config.sweep import load_sweep
from llem_ray.core.energy import PhaseSpan, Window
from llem_ray.core.outcome import Completed, Failed
from llem_ray.core.plan import Plan
from llem_ray.core.units import NS_PER_S
from llem_ray.execution.accounting import Accounts
from llem_ray.execution.calls import Leased
from llem_ray.execution.meter import Meter
from llem_ray.execution.records import AttemptEnded, GangRecord, HostDevice, IdleTaken, LoadEnded
from llem_ray.planning.plan import make_plan
from llem_ray.testing.clock import VirtualClock

SWEEP = """
schema_version: 1
name: two
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, tensor_parallel: 2, gpus: 2, nodes: 2}
  workload: {output_tokens: 8}
repeats: 1
measure: {sources: [nvml]}
"""
OFFSET_S = 7200.0
WINDOW_S = (1010.0, 1016.0)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return make_plan(load_sweep(tmp_path / "sweep.yaml"), past_run=None, gpus_available=2)


def sampled(until_s: float, *, counter: bool = True) -> tuple[Meter, FakeCluster]:
    """Two hosts, each with a GPU of 100 W; the second's samples end at ``until_s`` of the run driver's clock."""
    clock = VirtualClock()
    cluster = FakeCluster(clock)
    first, second = cluster.sampler("h1", "G1"), cluster.sampler("h2", "G2", offset_s=OFFSET_S)
    cluster.add("n1", first, gpus=1)
    cluster.add("n2", second, cluster.sampler("h2", "G2", offset_s=12.0), gpus=1)
    meter = cluster.meter()
    meter.open(cluster.nodes())
    _fill(first, 1020.0, counter)
    _fill(second, until_s, counter)
    clock.sleep_until_ns(1021 * NS_PER_S)
    meter.pump(hurry=True)
    return meter, cluster


def _fill(sampler: FakeSampler, until_s: float, counter: bool) -> None:
    times_s = [1000.0 + 0.05 * step for step in range(round((until_s - 1000.0) / 0.05) + 1)]
    sampler.sample(1, times_s, counter=counter)


def ended(plan: Plan, outcome: Completed | Failed, meter: Meter) -> AttemptEnded:
    group = plan.groups[0]
    workers = tuple(
        Leased(node=f"h{n}", hostname=f"h{n}", pid=n, gpu_ids=("0",), gpu_uuids=(f"G{n}",), rank=n - 1, node_id=f"n{n}")
        for n in (1, 2)
    )
    devices = tuple(HostDevice(host=f"h{n}", device=gpu(f"G{n}")) for n in (1, 2))
    gang = GangRecord(name="gang-1", group=group, workers=workers, devices=devices, context=(), reason=None)
    begin_ns, end_ns = (round(t * NS_PER_S) for t in WINDOW_S)
    return AttemptEnded(
        gang=gang,
        group=group,
        trial=group.trials[0],
        attempt=1,
        outcome=outcome,
        begin_ns=begin_ns,
        end_ns=end_ns,
        started_utc=datetime.now(UTC),
        gap_s=None,
        final=False,
    )


def completed() -> Completed:
    begin_ns, end_ns = (round(t * NS_PER_S) for t in WINDOW_S)
    return Completed(window=Window(node="h1", begin_ns=begin_ns, end_ns=end_ns), spans=(), requests=(), steps=1, passes=1)


def parts(row: dict[str, Any]) -> list[float | None]:
    return [entry["leased_energy_j"] for entry in row["gang_nodes"]]


def test_a_gang_whose_hosts_all_reported(plan: Plan) -> None:
    meter, _ = sampled(1020.0)
    row = Accounts(plan.measure, meter).energy_columns(ended(plan, completed(), meter))
    assert row["total_energy_j"] == pytest.approx(1200.0, rel=0.01)
    assert parts(row) == pytest.approx([600.0, 600.0], rel=0.01)
    assert "node_missing" not in row["invalid_reasons"]
    assert "status" not in row


def test_a_host_that_fell_silent_within_the_window_makes_the_trial_partial(plan: Plan) -> None:
    meter, _ = sampled(1014.0)
    row = Accounts(plan.measure, meter).energy_columns(ended(plan, completed(), meter))
    assert row["status"] == "partial"
    assert row["total_energy_j"] is None
    assert "no sample from h2 in the last 2.0 s" in row["energy_reason"]
    assert row["invalid_reasons"] == ["node_missing"]
    assert row["joules_per_output_token"] is None
    assert parts(row)[0] == pytest.approx(600.0, rel=0.01)
    assert parts(row)[1] is None
    assert (row["nodes_expected"], row["nodes_reported"]) == (2, 1)


def test_a_host_that_was_restarted_since_has_another_clock(plan: Plan) -> None:
    """Its new samples must not be taken for those of the window."""
    meter, cluster = sampled(1020.0)
    del cluster.members["n2"]
    meter.drop("n2", "gone")
    node = cluster.add("n3", cluster.sampler("h2", "G2", offset_s=12.0), gpus=1)
    meter.adopt([node])
    for _ in range(5):
        cluster.clock.advance_ns(NS_PER_S)
        meter.pump()
    assert meter.generation("h2") == 1
    row = Accounts(plan.measure, meter).energy_columns(ended(plan, completed(), meter))
    assert row["status"] == "partial"
    assert "h2 was restarted: its clock is another one" in row["energy_reason"]


@pytest.mark.parametrize(("until_s", "known"), [(1020.0, True), (1014.0, False)])
def test_the_waste_of_a_failed_attempt_is_known_or_null_with_the_reason(plan: Plan, until_s: float, known: bool) -> None:
    meter, _ = sampled(until_s)
    row = Accounts(plan.measure, meter).energy_columns(ended(plan, Failed(kind="node_died", message="", traceback=None), meter))
    if known:
        assert row["waste_energy_j"] == pytest.approx(1200.0, rel=0.01)
        assert row["energy_reason"] == "the attempt failed: its energy is waste"
    else:
        assert row["waste_energy_j"] is None
        assert "its waste is not known" in row["energy_reason"]


@pytest.mark.parametrize(("state_s", "known"), [(1000.9, 7), (1001.2, 7), (990.0, None)])
def test_the_memory_before_a_load_is_known_though_no_state_falls_into_a_short_idle(
    plan: Plan, state_s: float, known: int | None
) -> None:
    clock = VirtualClock()
    cluster = FakeCluster(clock)
    sampler = cluster.sampler("h1", "G1")
    cluster.add("n1", sampler, gpus=1)
    meter = cluster.meter()
    meter.open(cluster.nodes())
    sampler.sample(1, [state_s], memory_bytes=7)
    _fill_from(sampler, 2, 1001.0, 1005.0)
    clock.sleep_until_ns(1006 * NS_PER_S)
    meter.pump(hurry=True)
    gang = replace(
        ended(plan, completed(), meter).gang or pytest.fail("no gang"), devices=(HostDevice(host="h1", device=gpu("G1")),)
    )
    span = PhaseSpan(phase="bare_idle", begin_ns=1001 * NS_PER_S, end_ns=round(1001.5 * NS_PER_S))
    Accounts(plan.measure, meter).take_idle(IdleTaken(gang=gang, resident=False, span=span))
    assert gang.bare_memory_bytes.get(("h1", "G1")) == known


def _fill_from(sampler: FakeSampler, seq: int, begin_s: float, until_s: float) -> None:
    sampler.sample(seq, [begin_s + 0.05 * step for step in range(round((until_s - begin_s) / 0.05) + 1)], counter=True)


@pytest.mark.parametrize("holes", [False, True])
def test_the_energy_of_a_load_is_not_guessed_over_holes(plan: Plan, holes: bool) -> None:
    clock = VirtualClock()
    cluster = FakeCluster(clock)
    samplers = [cluster.sampler(f"h{n}", f"G{n}") for n in (1, 2)]
    for n, sampler in enumerate(samplers, start=1):
        cluster.add(f"n{n}", sampler, gpus=1)
    meter = cluster.meter()
    meter.open(cluster.nodes())
    times_s = [1000.0 + 0.05 * step for step in range(400)]
    samplers[0].sample(1, times_s)
    samplers[1].sample(1, [t for t in times_s if not (holes and 1011.0 < t < 1014.0)])
    clock.sleep_until_ns(1021 * NS_PER_S)
    meter.pump(hurry=True)
    gang = ended(plan, completed(), meter).gang
    assert gang is not None
    begin_ns, end_ns = (round(t * NS_PER_S) for t in WINDOW_S)
    span = PhaseSpan(phase="load", begin_ns=begin_ns, end_ns=end_ns)
    Accounts(plan.measure, meter).take_load(LoadEnded(gang=gang, span=span, lane=""))
    assert gang.load_energy_j == (None if holes else pytest.approx(1200.0, rel=0.01))
