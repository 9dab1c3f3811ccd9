"""Things that die on a cluster of real hosts, through the real command: what is done stays, nothing runs twice, nothing hangs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from lab_fixtures import alive, require_lab, until

from llem_ray.core.units import NS_PER_S
from llem_ray.testing.lab import HostSpec, Lab, default_gpus
from llem_ray.testing.lab.runs import LabRun

pytestmark = [pytest.mark.ray, pytest.mark.slow]

require_lab()

CLOCKS_S = {"h2": 7_200, "h3": 90_000, "h4": 300}

SWEEP = """
schema_version: 1
name: failures
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, tensor_parallel: 2, gpus: 2, nodes: NODES, engine_args: {decode_ms: 5, prefill_ms: 5}}
  workload: {batch_size: 2, output_tokens: 10}
repeats: REPEATS
measure:
  min_window_s: WINDOW
  idle_baseline_s: 0.5
  sources: [nvml]
  warmup: {batches: 0}
  trial_timeout_s: 60
  gates: {min_coverage: 0.3}
"""


def sweep(nodes: int, repeats: int, window_s: float) -> str:
    return SWEEP.replace("NODES", str(nodes)).replace("REPEATS", str(repeats)).replace("WINDOW", str(window_s))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The run driver's host has no GPU: it can be no part of what is lost."""
    hosts = [HostSpec(name="h1", monotonic_offset_s=5)]
    hosts += [HostSpec(name=name, gpus=default_gpus(name, 2), monotonic_offset_s=shift_s) for name, shift_s in CLOCKS_S.items()]
    with Lab(hosts, folder=tmp_path_factory.mktemp("lab")) as made:
        yield made


def measuring(run: LabRun, count: int) -> list[str]:
    """Hosts of the journal's ``count``-th attempt, the leading one first, once it measures."""
    hosts = run.wait_for("measuring", count)["host"].split(",")
    time.sleep(1.0)
    return [str(host) for host in hosts]


def measuring_elsewhere(run: LabRun, lost: str) -> str:
    """The host of a gang of one on which the run goes on; trials may have ended on the lost one meanwhile."""
    run.wait_until(lambda: any(event["host"] != lost for event in run.events("measuring")), f"a trial elsewhere than on {lost}")
    return next(str(event["host"]) for event in run.events("measuring") if event["host"] != lost)


def check_done_once(run: LabRun, trials: int) -> list[dict[str, Any]]:
    """Every trial has one row that is not a failure; returns the rows in the order of their attempts."""
    rows = run.table("trials")
    done = Counter(row["trial_id"] for row in rows if row["status"] != "failed")
    assert len(done) == trials, run.said()
    assert set(done.values()) == {1}
    return sorted(rows, key=lambda row: (row["trial_id"], row["attempt"]))


def check_ledger(run: LabRun) -> None:
    """No sample twice; the phases of a device adjoin, and do not overlap, on each of its host's clocks."""
    samples = Counter((row["node"], row["device_uuid"], row["t_ns"]) for row in run.table("power"))
    assert max(samples.values()) == 1
    by_device: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in run.table("phases"):
        by_device.setdefault((row["node"], row["device_uuid"]), []).append(row)
    for rows in by_device.values():
        rows.sort(key=lambda row: row["begin_ns"])
        for before, after in pairwise(rows):
            assert before["end_ns"] <= after["begin_ns"], (before, after)


def test_a_killed_engine_and_then_a_killed_sampler(lab: Lab, tmp_path: Path) -> None:
    run = LabRun(lab, tmp_path, sweep(1, 4, 4))
    run.start()
    (host,) = measuring(run, 1)
    assert run.kill_actors(host, "EngineActor") == 1
    (again,) = measuring(run, 2)
    assert run.kill_actors(again, "SamplerActor") == 1
    assert run.finish() == 0, run.said()
    died, *rest = check_done_once(run, 4)
    assert (died["failure_kind"], died["attempt"]) == ("engine_died", 1)
    wasted = [row for row in run.table("phases") if (row["phase"], row["trial_id"]) == ("waste", died["trial_id"])]
    wasted_s = sum(row["duration_s"] for row in wasted)
    assert wasted_s > 2 * 0.9, "it ran for a second at least"
    # Each of the two GPUs draws 100 to 680 W.
    assert 100 * wasted_s < died["waste_energy_j"] < 680 * wasted_s
    assert rest[0]["trial_id"] == died["trial_id"]
    assert not rest[0]["power_valid"]
    if rest[0]["total_energy_j"] is None:  # the hole is as long as the window
        assert "no counter ticks" in rest[0]["energy_reason"]
    else:
        assert {"dropped_samples", "edge_gap"} & {*rest[0]["invalid_reasons"], *rest[0]["flags"]}
    back_ns = min(row["t_ns"] for row in run.table("power") if row["epoch"] == 2) + NS_PER_S
    later = [row for row in rest if row["begin_ns"] > back_ns]
    assert later
    assert all(row["power_valid"] for row in later)
    epochs = {(row["hostname"], row["epoch"]) for row in run.table("nodes")}
    assert (again, 2) in epochs
    assert Counter(epoch for _, epoch in epochs) == {1: 3, 2: 1}
    check_ledger(run)


def test_a_host_loses_power_and_comes_back_with_another_clock(lab: Lab, tmp_path: Path) -> None:
    run = LabRun(lab, tmp_path, sweep(1, 6, 3))
    run.start()
    run.wait_for("done", 1)
    (host,) = measuring(run, 2)
    lab.kill_host(host)
    other = measuring_elsewhere(run, host)
    with run.suspended():  # else it may end before the host is there again
        lab.restart_host(host, monotonic_offset_s=500_000)
    assert run.finish() == 0, run.said()
    rows = check_done_once(run, 6)
    failed = [row for row in rows if row["status"] == "failed"]
    assert [row["failure_kind"] for row in failed] == ["node_died"]
    assert failed[0]["waste_energy_j"] is None
    assert "waste is not known" in failed[0]["energy_reason"]
    assert rows[0]["workers"][0]["hostname"] == host
    assert rows[0]["power_valid"]
    assert all(row["power_valid"] for row in rows if row["status"] == "completed")
    assert {row["workers"][0]["hostname"] for row in rows if row["attempt"] == 2} == {other}
    nodes = {row["epoch"]: row["node"] for row in run.table("nodes") if row["hostname"] == host}
    assert len(set(nodes.values())) == 1
    assert sorted(nodes) == [1, 2]
    stamps_s = {row["epoch"]: row["t_ns"] / 1e9 for row in run.table("power") if row["node"] == nodes[1]}
    assert stamps_s[2] - stamps_s[1] > 100_000
    assert "was restarted" in run.said()
    check_ledger(run)


def test_a_cut_link_that_heals_loses_nothing_and_one_that_does_not_loses_the_node(lab: Lab, tmp_path: Path) -> None:
    run = LabRun(lab, tmp_path, sweep(1, 2, 9))
    run.start()
    (host,) = measuring(run, 1)
    lab.cut_link(host)
    time.sleep(5.0)
    lab.heal_link(host)
    assert measuring(run, 2) == [host]
    lab.cut_link(host)
    measuring_elsewhere(run, host)
    lab.heal_link(host)
    assert run.finish() == 0, run.said()
    whole, lost, again = check_done_once(run, 2)
    assert whole["power_valid"], run.said()
    # Without the samples of the 5 s that it was cut off for, half of its window of 9 s would be missing.
    assert whole["coverage"] > 0.9
    assert whole["max_gap_s"] < 2.0
    assert lost["failure_kind"] == "node_died"
    assert again["power_valid"]
    check_ledger(run)
    # Ray's raylet ends itself when it learns that it was given up.
    until(lambda: not lab.hosts[host].raylet_alive, what=f"the end of the raylet on {host}")
    lab.restart_host(host)


def test_one_of_a_gang_s_two_hosts_vanishes(lab: Lab, tmp_path: Path) -> None:
    """The fake engine's leader needs no help: trials end until the loss is known, but half of their energy is missing."""
    until(lambda: len(alive(lab, "h1")) == 4, what="four nodes")
    run = LabRun(lab, tmp_path, sweep(2, 3, 4))
    run.start()
    lead, follower = measuring(run, 1)
    lab.kill_host(follower, silent=True)
    begin = time.monotonic()
    run.wait_until(lambda: any(event["kind"] == "node_died" for event in run.events("failed")), "a lost node")
    assert time.monotonic() - begin < 50, "it waited for the trial's own deadline"
    assert run.finish() == 0, run.said()
    lab.restart_host(follower)
    rows = check_done_once(run, 3)
    assert [row["failure_kind"] for row in rows if row["status"] == "failed"] == ["node_died"]
    partials = [row for row in rows if row["status"] == "partial"]
    assert partials
    for row in partials:
        assert row["total_energy_j"] is None
        assert row["joules_per_output_token"] is None
        assert row["invalid_reasons"] == ["node_missing"]
        assert (row["nodes_expected"], row["nodes_reported"]) == (2, 1)
        parts = {entry["hostname"]: entry["leased_energy_j"] for entry in row["gang_nodes"]}
        assert parts[lead] > 0
        assert parts[follower] is None
    whole = [row for row in rows if row["status"] == "completed"]
    assert all(row["power_valid"] for row in whole)
    assert whole
    assert all(follower not in {worker["hostname"] for worker in row["workers"]} for row in whole)


def test_kill_9_of_the_run_driver_and_a_second_one_refused(lab: Lab, tmp_path: Path) -> None:
    until(lambda: len(alive(lab, "h1")) == 4, what="four nodes")
    run = LabRun(lab, tmp_path, sweep(1, 6, 2))
    run.start()
    run.wait_for("done", 1)
    second = LabRun(lab, tmp_path / "second", sweep(1, 6, 2))
    second.results = run.results
    with run.suspended():
        assert second.run() == 5
    assert f"works on {run.path}" in second.said()
    (host,) = run.wait_for("measuring", 2)["host"].split(",")
    run.kill()
    kept = {row["trial_id"]: row["total_energy_j"] for row in run.table("trials") if row["status"] == "completed"}
    assert kept
    until(lambda: not run.actors(host, "EngineActor"), what="the end of the dead run driver's engine")
    samplers = {name: [process.pid for process in run.actors(name, "SamplerActor")] for name in CLOCKS_S}
    assert all(samplers.values())
    assert run.run() == 0, run.said()
    rows = check_done_once(run, 6)
    assert {row["trial_id"]: row["total_energy_j"] for row in rows if row["trial_id"] in kept} == kept
    pids = Counter((row["hostname"], row["sampler_pid"]) for row in run.table("nodes"))
    assert set(pids.values()) == {2}, "the second session found the samplers of the first"
    assert len(run.events("run_started")) == 2
    check_ledger(run)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("nodes: 1, gpus: 8, tensor_parallel: 8", "needs 8 GPUs on one node; the largest node has 2"),
        ("nodes: 2, gpu_type: NVIDIA-B300", "needs GPU type NVIDIA-B300; there are H200"),
        ("nodes: 5, gpus: 10, tensor_parallel: 10", "needs 5 nodes, there are 3"),
    ],
)
def test_a_gang_that_the_cluster_can_never_hold_is_refused(lab: Lab, tmp_path: Path, change: str, said: str) -> None:
    until(lambda: len(alive(lab, "h1")) == 4, what="four nodes")
    text = sweep(1, 1, 2).replace("tensor_parallel: 2, gpus: 2, nodes: 1", change)
    text = text if "gpus" in change else text.replace(change, f"{change}, gpus: 2, tensor_parallel: 2")
    run = LabRun(lab, tmp_path, text)
    begin = time.monotonic()
    assert run.run() == 5
    assert said in run.said()
    assert not run.events("measuring")
    assert time.monotonic() - begin < 60
