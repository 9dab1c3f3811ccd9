"""A sweep on three real hosts whose clocks are hours apart, through the real command: energies against closed-form truth."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from lab_fixtures import require_lab

from llem_ray.results.reader import read_table
from llem_ray.testing.lab import HostSpec, Lab, default_gpus
from llem_ray.testing.lab.truth import JudgedTrial, judge_trials

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]

require_lab()

CLOCKS_S = {"h1": 5, "h2": 7_200, "h3": 90_000}

SWEEP = """
schema_version: 1
name: lab
base:
  model: {config: llama-tiny}
  engine: {device: cpu, tensor_parallel: 2, gpus: 2}
  workload: {batch_size: 2, output_tokens: 10}
sweep:
  place:
    - {engine.nodes: 1, engine.backend: fake, engine.engine_args: {decode_ms: 5, prefill_ms: 5}}
    - {engine.nodes: 2, engine.backend: fake, engine.engine_args: {decode_ms: 5, prefill_ms: 5}}
    - {engine.nodes: 2, engine.backend: transformers, engine.engine_args: {num_threads: 1}}
repeats: 3
measure: {min_window_s: 2, idle_baseline_s: 1, sources: [nvml], gates: {min_coverage: 0.3}}
"""


@dataclass(frozen=True)
class Ran:
    lab: Lab
    trials: list[dict[str, Any]]
    phases: list[dict[str, Any]]
    clocks: list[dict[str, Any]]
    judged: list[JudgedTrial]
    log: str


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("lab-sweep")
    (folder / "sweep.yaml").write_text(SWEEP)
    hosts = [HostSpec(name=name, gpus=default_gpus(name, 4), monotonic_offset_s=shift) for name, shift in CLOCKS_S.items()]
    with Lab(hosts, folder=folder / "hosts") as lab:
        command = [sys.executable, "-m", "llem_ray", "submit", str(folder / "sweep.yaml"), "--results", str(folder / "runs")]
        done = lab.run("h1", [*command, "--address", lab.address], timeout_s=280)
        assert done.returncode == 0, done.stdout + done.stderr
        run: Path = next((folder / "runs").iterdir())
        trials = read_table(run, "trials").to_pylist()
        yield Ran(
            lab=lab,
            trials=trials,
            phases=read_table(run, "phases").to_pylist(),
            clocks=read_table(run, "clocks").to_pylist(),
            judged=judge_trials(lab, trials, "h1"),
            log=(run / "run.log").read_text(),
        )


def test_every_leased_gpu_and_the_sum_against_the_truth(ran: Ran) -> None:
    assert len(ran.judged) == 9
    squares = [trial.error_rel**2 for trial in ran.judged]
    assert (sum(squares) / len(squares)) ** 0.5 < 0.012, [trial.error_rel for trial in ran.judged]
    for trial in ran.judged:
        for reading in trial.readings:
            assert reading.bound_j[0] <= reading.true_j <= reading.bound_j[1], reading
    # About 2 % of trials are outside two sigma: of nine one is at times, and five never are.
    assert median(abs(trial.energy_j - trial.true_j) / trial.u_j for trial in ran.judged) <= 2


def test_exactly_the_leased_gpus_are_in_the_sum(ran: Ran) -> None:
    for row in ran.trials:
        leased = {uuid for worker in row["workers"] for uuid in worker["gpu_uuids"]}
        assert {part.rpartition("/")[2] for part in row["energy_covers"]} == leased
        assert len(leased) == 2
        assert row["total_gpu_energy_j"] == pytest.approx(sum(d["energy_j"] for d in row["devices"] if d["uuid"] in leased))


def test_clock_offsets_are_known_to_well_under_a_millisecond(ran: Ran) -> None:
    far = [reading for trial in ran.judged for reading in trial.readings if reading.host != "h1" and trial.nodes == 2]
    assert far
    assert all(abs(reading.clock_error_ns) < 1_000_000 for reading in far), [reading.clock_error_ns for reading in far]
    assert all(abs(reading.clock_error_ns) <= reading.clock_delta_ns for reading in far)


def test_two_gangs_ran_at_once_on_nodes_of_their_own(ran: Ran) -> None:
    nodes = {row["gang"]: {entry["hostname"] for entry in row["gang_nodes"]} for row in ran.trials}
    assert len(nodes) == 3
    assert sorted(map(len, nodes.values())) == [1, 2, 2]
    assert all(not row["flags"] or "shared_node" not in row["flags"] for row in ran.trials)
    shifts_ns = {host.host_id: CLOCKS_S[name] * 10**9 for name, host in ran.lab.hosts.items()}
    lives = {
        name: (
            min(row["begin_ns"] - shifts_ns[row["node"]] for row in ours),
            max(row["end_ns"] - shifts_ns[row["node"]] for row in ours),
        )
        for name in nodes
        if (ours := [row for row in ran.phases if row["gang"] == name])
    }
    overlapping = [
        {one, other}
        for one, other in combinations(lives, 2)
        if max(lives[one][0], lives[other][0]) < min(lives[one][1], lives[other][1]) - 10**9
    ]
    assert overlapping, lives
    assert all(not nodes[one] & nodes[other] for one, other in map(sorted, overlapping)), (overlapping, nodes)


def test_the_realised_map_and_the_completeness_record(ran: Ran) -> None:
    for row in ran.trials:
        workers = row["workers"]
        assert [worker["rank"] for worker in workers] == list(range(len(workers)))
        assert {worker["hostname"] for worker in workers} == {entry["hostname"] for entry in row["gang_nodes"]}
        assert row["nodes_expected"] == row["nodes_reported"] == len(row["gang_nodes"])
        assert row["max_gap_s"] is not None
        assert all(worker["pid"] > 0 for worker in workers)
        assert row["other_nodes_expected"] == 3 - row["nodes_expected"]
        parts = (row["total_gpu_energy_j"], row["unleased_gpu_energy_j"], row["other_nodes_gpu_energy_j"])
        assert all(part is not None for part in parts)
        assert row["cluster_gpu_energy_j"] == pytest.approx(sum(part for part in parts if part is not None))
        assert 0 <= row["rank_imbalance"] < 1
    parallel = [row for row in ran.trials if row["backend"] == "transformers"]
    assert {len(row["workers"]) for row in parallel} == {2}
    assert {len({rank["host"] for rank in row["ranks"]}) for row in parallel} == {2}


def test_the_whole_cluster_s_energy_is_that_of_all_its_gpus(ran: Ran) -> None:
    """Context by plain counter difference: good to a tick, whoever is asked."""
    for trial, row in zip(ran.judged, ran.trials, strict=True):
        names = {host.host_id: name for name, host in ran.lab.hosts.items()}
        shift_ns = CLOCKS_S[names[row["node"]]] * 10**9
        wall_ns = time.time_ns() - time.monotonic_ns()
        begin_ns, end_ns = row["begin_ns"] - shift_ns + wall_ns, row["end_ns"] - shift_ns + wall_ns
        true_j = sum(
            ran.lab.truth_j(name, gpu.uuid, begin_ns, end_ns) for name, host in ran.lab.hosts.items() for gpu in host.spec.gpus
        )
        assert row["cluster_gpu_energy_j"] == pytest.approx(true_j, rel=0.05), trial


def test_phases_tile_every_device_s_time_without_overlap_or_hole(ran: Ran) -> None:
    by_device: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in ran.phases:
        by_device.setdefault((row["node"], row["device_uuid"]), []).append(row)
    assert len(by_device) == 12
    for rows in by_device.values():
        rows.sort(key=lambda row: row["begin_ns"])
        for before, after in pairwise(rows):
            assert before["end_ns"] == after["begin_ns"], (before, after)
        unknown = [row for row in rows if row["energy_j"] is None and row["phase"] not in {"startup", "shutdown"}]
        assert not unknown
    leased = {uuid for row in ran.trials for worker in row["workers"] for uuid in worker["gpu_uuids"]}
    for (_, uuid), rows in by_device.items():
        assert ("measured" in {row["phase"] for row in rows}) == (uuid in leased)
