"""Several gangs at once on a cluster that is pretended in this process, with the whole run driver, against closed-form truth."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from model_configs import LLAMA_3_70B

from llem_ray import __version__
from llem_ray.config.sweep import load_sweep
from llem_ray.core.energy import PhaseSpan
from llem_ray.core.errors import PlacementError
from llem_ray.core.plan import Trial
from llem_ray.energy.ledger import check_tiling
from llem_ray.execution import bookkeeper, dispatch, fleet, meter
from llem_ray.execution.calls import TrialOrder
from llem_ray.execution.driver import RunDriver, RunOptions, RunResult
from llem_ray.execution.stopping import Stopping
from llem_ray.planning.plan import make_plan
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory
from llem_ray.testing import nodes
from llem_ray.testing.cluster import PretendCluster
from llem_ray.testing.nodes import PretendDevice, PretendHost, swinging

SWEEP = """
schema_version: 1
name: pretended
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, gpus: 1}
  workload: {output_tokens: 8}
sweep:
  engine.engine_args.load_ms: [1, 2, 3]
  workload.output_tokens: [4, 8]
repeats: 1
measure: {min_window_s: 0.4, idle_baseline_s: 0, warmup: {batches: 0}, gates: {min_coverage: 0.5}}
"""
ONE_GROUP = SWEEP.replace("[1, 2, 3]", "[1]")
TWO_NODES = ONE_GROUP.replace("gpus: 1", "gpus: 2, tensor_parallel: 2, nodes: 2")
HOURS_S = {"north": 7_200.0, "east": -3_600.0 * 5, "west": 90_000.0}


class Silent:
    """A progress display that keeps its messages to itself."""

    live = False

    def __init__(self) -> None:
        self.messages: list[str] = []

    def update(self, event: Any) -> None:
        pass

    def message(self, text: str) -> None:
        self.messages.append(text)


def host(name: str, gpus: int = 2, *, drift_ppm: float = 0.0, offset_s: float | None = None) -> PretendHost:
    """Each GPU swings around another power, at another pace, with other ticks."""
    number = sorted(HOURS_S).index(name)
    devices = tuple(
        PretendDevice(
            uuid=f"GPU-{name}-{index}",
            load=swinging(150.0 + 70.0 * number + 31.0 * index, 40.0, 3.0 + 0.4 * index + 0.3 * number),
            tick_phase_s=0.013 * index + 0.031 * number,
        )
        for index in range(gpus)
    )
    return PretendHost(name=name, devices=devices, offset_s=HOURS_S[name] if offset_s is None else offset_s, drift_ppm=drift_ppm)


class Session:
    """A run directory and sessions of its run on one pretended cluster."""

    def __init__(self, folder: Path, *hosts: PretendHost) -> None:
        self.folder, self.cluster = folder, PretendCluster(hosts)
        self.boots = list(hosts)
        self.rundir = RunDirectory.create(folder, "pretended-00000000")
        self.progress = Silent()

    def run(self, text: str = SWEEP) -> RunResult:
        path = self.folder / "sweep.yaml"
        path.write_text(text)
        plan = make_plan(load_sweep(path), gpus_available=4)
        options = RunOptions(begin_ns=time.monotonic_ns(), cache_dir=str(self.folder))
        self.begin_ns = options.begin_ns
        result = RunDriver(plan, self.rundir, self.cluster, options, self.progress).run()
        self.end_ns = time.monotonic_ns()
        return result

    def rows(self, table: Any = "trials") -> list[dict[str, Any]]:
        return read_table(self.rundir.path, table).to_pylist()

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.rundir.journal_path.read_text().splitlines()]

    def add(self, host: PretendHost) -> None:
        """A host boots and joins."""
        self.boots.append(host)
        self.cluster.add(host)

    def nodes(self) -> dict[str, str]:
        """Host -> node id, of nodes that are alive."""
        return {node.hostname: node.node_id for node in self.cluster.nodes()}

    def when_trial(self, number: int, act: Callable[[tuple[str, ...]], None]) -> None:
        """Do something 0.1 s into the session's trial of that number, which waits for it; it is told the gang's node ids."""
        seen: list[str] = []

        def on_trial(order: TrialOrder, nodes: tuple[str, ...]) -> None:
            seen.append(order.trial_id)
            if len(seen) == number:
                time.sleep(0.1)
                act(nodes)

        self.cluster.on_trial = on_trial


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path, host("north"), host("east"), host("west"))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the lost and the silent waits a second or two, not a minute."""
    for module, name, value_s in (
        (bookkeeper, "PATIENCE_S", 3.0),
        (bookkeeper, "SILENT_PATIENCE_S", 3.0),
        (dispatch, "GRACE_S", 1.0),
        (fleet, "LOOK_S", 0.3),
        (fleet, "PING_S", 0.5),
        (meter, "FETCH_TIMEOUT_S", 1.0),
        (meter, "LAST_S", 1.0),
    ):
        monkeypatch.setattr(module, name, value_s, raising=False)


def windows(session: Session) -> list[tuple[int, int, dict[str, Any]]]:
    """Begin and end of every completed window on our clock, in order, with its row."""
    hosts = {one.hostname: session.cluster.host_of(one.node_id) for one in session.cluster.nodes()}
    found = [
        (hosts[row["node"]].to_ours(row["begin_ns"]), hosts[row["node"]].to_ours(row["end_ns"]), row)
        for row in session.rows()
        if row["status"] == "completed"
    ]
    return sorted(found, key=lambda one: one[0])


def true_j(session: Session, row: dict[str, Any], uuids: set[str]) -> float:
    """What devices of any hosts spent in the row's window."""
    nodes = session.nodes()
    lead = session.cluster.host_of(nodes[row["node"]])
    ours = [lead.to_ours(stamp) / 1e9 for stamp in (row["begin_ns"], row["end_ns"])]
    everything = [device for node in nodes.values() for device in session.cluster.host_of(node).devices]
    return sum(device.load.energy_j(*ours) for device in everything if device.uuid in uuids)


def assert_true(row: dict[str, Any], energy_j: float) -> None:
    """The error is what the row says it may be, and that is little."""
    assert row["energy_u_j"] <= 0.02 * energy_j
    assert abs(row["total_energy_j"] - energy_j) <= 4 * row["energy_u_j"], row


def by_host(row: dict[str, Any]) -> dict[str, set[str]]:
    """Host -> UUIDs that the gang held there."""
    return {worker["node"]: set(worker["gpu_uuids"]) for worker in row["workers"]}


def overlapping(session: Session) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of windows that were open at the same time."""
    found = windows(session)
    return [(a, b) for i, (_, end, a) in enumerate(found) for begin, _, b in found[i + 1 :] if begin < end]


def assert_each_done_once(session: Session, trials: int) -> None:
    completed = [row["trial_id"] for row in session.rows() if row["status"] in {"completed", "partial"}]
    assert len(completed) == len(set(completed)) == trials
    assert session.events().count("done") == trials


def test_groups_run_at_once_on_nodes_of_their_own_and_each_joule_is_where_it_belongs(session: Session) -> None:
    assert session.run().completed == 6
    assert_each_done_once(session, 6)
    pairs = overlapping(session)
    assert pairs
    assert all(a["node"] != b["node"] for a, b in pairs)
    for row in session.rows():
        leased = set().union(*by_host(row).values())
        assert len(leased) == 1
        assert_true(row, true_j(session, row, leased))
        assert not row["flags"] or "shared_node" not in row["flags"]
        assert row["power_valid"]


def test_under_cluster_one_gang_runs_at_a_time(session: Session) -> None:
    session.run(SWEEP.replace("measure: {", "measure: {exclusive: cluster, "))
    assert_each_done_once(session, 6)
    assert not overlapping(session)


def test_under_none_gangs_share_a_node_and_both_say_so(tmp_path: Path) -> None:
    session = Session(tmp_path, host("north"))
    text = SWEEP.replace("[1, 2, 3]", "[1, 2]").replace("measure: {", "measure: {exclusive: none, ")
    session.run(text)
    assert_each_done_once(session, 4)
    pairs = overlapping(session)
    assert pairs
    for pair in pairs:
        held = [by_host(row)["north"] for row in pair]
        assert not held[0] & held[1]
        for row, uuids in zip(pair, held, strict=True):
            assert "shared_node" in row["flags"]
            assert_true(row, true_j(session, row, uuids))


def test_a_gang_on_two_nodes_whose_clocks_are_hours_apart(tmp_path: Path) -> None:
    session = Session(tmp_path, host("north", drift_ppm=60.0), host("east", drift_ppm=-60.0), host("west"))
    session.run(TWO_NODES)
    assert_each_done_once(session, 2)
    everything = {device.uuid for node in session.nodes().values() for device in session.cluster.host_of(node).devices}
    for row in session.rows():
        leased = set().union(*by_host(row).values())
        assert len({worker["node"] for worker in row["workers"]}) == len(leased) == 2
        assert row["total_gpu_energy_j"] == row["total_energy_j"]
        assert_true(row, true_j(session, row, leased))
        assert 0 < row["clock_delta_s"] < 0.01
        assert [entry["role"] for entry in row["gang_nodes"]] == ["lead", "worker"]
        assert [entry["leased_gpus"] for entry in row["gang_nodes"]] == [1, 1]
        assert all(entry["reported"] for entry in row["gang_nodes"])
        assert (row["nodes_expected"], row["nodes_reported"]) == (2, 2)
        assert (row["other_nodes_expected"], row["other_nodes_reported"]) == (1, 1)
        parts = [row["total_gpu_energy_j"], row["unleased_gpu_energy_j"], row["other_nodes_gpu_energy_j"]]
        assert row["cluster_gpu_energy_j"] == pytest.approx(sum(parts))
        others = {uuid for uuid in everything if uuid.startswith(f"GPU-{({*HOURS_S} - {*by_host(row)}).pop()}")}
        tick_j = 0.1 * true_j(session, row, others) / row["window_s"]  # by plain counter difference: good to a tick
        assert row["cluster_gpu_energy_j"] == pytest.approx(true_j(session, row, everything), abs=tick_j)


@pytest.mark.usefixtures("hasty")
def test_a_node_that_dies_in_a_trial_costs_that_attempt_only(session: Session) -> None:
    session.when_trial(2, lambda nodes: session.cluster.kill(nodes[0]))
    result = session.run()
    assert (result.completed, result.left, result.failed) == (6, 0, 0)
    assert_each_done_once(session, 6)
    (failed,) = [row for row in session.rows() if row["status"] == "failed"]
    assert failed["failure_kind"] == "node_died"
    assert failed["total_energy_j"] is None
    assert failed["waste_energy_j"] is not None or failed["energy_reason"]
    again = next(row for row in session.rows() if row["trial_id"] == failed["trial_id"] and row["status"] == "completed")
    assert again["attempt"] == failed["attempt"] + 1
    assert again["node"] != failed["node"]


def test_when_everything_that_was_started_is_gone_the_run_ends_at_once_and_can_be_resumed(tmp_path: Path) -> None:
    session = Session(tmp_path, host("north"))
    session.when_trial(2, lambda _: setattr(session.cluster, "gone", True))
    with pytest.raises(PlacementError, match="has ended"):
        session.run(ONE_GROUP)
    assert {row["failure_kind"] for row in session.rows()} == {"interrupted"}, "the window's last samples did not come any more"
    session.cluster.gone = False
    assert session.run(ONE_GROUP).completed == 2
    assert_each_done_once(session, 2)
    assert all(row["power_valid"] for row in session.rows() if row["status"] == "completed")


@pytest.mark.usefixtures("hasty")
def test_with_no_node_left_the_run_stops_and_can_be_resumed(tmp_path: Path) -> None:
    session = Session(tmp_path, host("north"))
    session.when_trial(2, lambda nodes: session.cluster.kill(nodes[0]))
    stopped = session.run(ONE_GROUP)
    assert stopped.stopped is not None
    assert "needs 1 GPU; there are no nodes" in stopped.stopped
    assert (stopped.completed, stopped.left, stopped.failed) == (1, 1, 0)
    session.add(host("west"))
    assert session.run(ONE_GROUP).left == 0
    assert_each_done_once(session, 2)


def test_what_can_never_be_placed_is_refused_with_what_there_is(session: Session) -> None:
    with pytest.raises(PlacementError, match=r"needs 3 GPUs on one node; the largest node has 2"):
        session.run(ONE_GROUP.replace("gpus: 1", "gpus: 3, nodes: 1, tensor_parallel: 3"))
    assert "measuring" not in session.events()


def large_model(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(LLAMA_3_70B))
    fake = "model: {config: llama-tiny}\n  engine: {backend: fake, device: cpu, gpus: 1}"
    assert fake in ONE_GROUP
    large = ONE_GROUP.replace(fake, "model: {config: config.json}\n  engine: {backend: transformers}")
    return large.replace("  engine.engine_args.load_ms: [1]\n", "")


def with_memory(name: str, memory_bytes: int) -> PretendHost:
    one = host(name)
    return replace(one, devices=tuple(replace(device, memory_bytes=memory_bytes) for device in one.devices))


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ("[GPU-north-0, GPU-west-0]", "the engine runs on GPU-west-0, which its gang does not hold"),
        ("[GPU-north-1, GPU-north-1]", "ranks 0 and 1 of the engine all run on GPU-north-1; nobody runs on GPU-north-0"),
    ],
)
def test_what_the_workers_see_must_be_what_was_placed(tmp_path: Path, seen: str, said: str) -> None:
    session = Session(tmp_path, host("north"))
    engine = f"gpus: 2, tensor_parallel: 2, engine_args: {{gpu_uuids: {seen}}}"
    with pytest.raises(PlacementError, match=re.escape(said)):
        session.run(ONE_GROUP.replace("gpus: 1", engine))
    assert "measuring" not in session.events()


def test_gpus_that_somebody_else_holds_are_waited_for_until_the_deadline(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.cluster.add(host("north"), elsewhere=2, uptime_s=60.0)
    with pytest.raises(PlacementError, match=r"no room for the gang for llama-tiny within 1 s: it needs 1 GPUs; free: 0 of 2 on"):
        session.run(ONE_GROUP.replace("measure: {", "measure: {placement_timeout_s: 1, "))


def test_a_place_that_is_not_granted_within_its_deadline(tmp_path: Path) -> None:
    session = Session(tmp_path, host("north"))
    (node,) = session.nodes().values()
    for uuid in gpus("north"):  # the scheduler's books differ from what it told
        session.cluster.quarantine(node, uuid)
    with pytest.raises(PlacementError, match=f"did not grant a gang its place within 1 s: 1 GPUs on node {node[:12]}"):
        session.run(ONE_GROUP.replace("measure: {", "measure: {placement_timeout_s: 1, "))


def test_a_model_that_fits_nowhere_is_refused_before_any_gang(tmp_path: Path) -> None:
    session = Session(tmp_path, with_memory("north", 80 * 10**9), with_memory("east", 96 * 10**9))
    with pytest.raises(PlacementError, match=r"needs at least 141 GB on each GPU, which has 96 GB"):
        session.run(large_model(tmp_path))
    assert "measuring" not in session.events()


def test_a_model_that_does_not_fit_where_it_is_placed_is_not_loaded(tmp_path: Path) -> None:
    session = Session(tmp_path, with_memory("north", 80 * 10**9))
    result = session.run(large_model(tmp_path).replace("measure: {", "measure: {wait_for_nodes_s: 60, "))
    assert (result.completed, result.failed) == (0, 2)
    assert {row["failure_kind"] for row in session.rows()} == {"out_of_memory"}
    assert "70,553,706,496 parameters x 2 B" in session.rows()[0]["failure_message"]


def test_a_node_that_is_waited_for_and_comes(tmp_path: Path) -> None:
    session = Session(tmp_path, host("north", gpus=0))
    threading.Timer(2.5, session.add, [host("west")]).start()
    assert session.run(ONE_GROUP.replace("measure: {", "measure: {wait_for_nodes_s: 60, ")).completed == 2
    assert len(session.cluster.asked) == 1
    assert {row["node"] for row in session.rows()} == {"west"}


def test_a_node_that_is_waited_for_in_vain(tmp_path: Path) -> None:
    session = Session(tmp_path, host("north", gpus=0))
    with pytest.raises(PlacementError, match="needs 1 GPU; no node has any"):
        session.run(ONE_GROUP.replace("measure: {", "measure: {wait_for_nodes_s: 1, "))
    assert any("waiting up to 1 s" in message for message in session.progress.messages)


@pytest.mark.usefixtures("hasty")
def test_a_node_whose_sampler_falls_silent_leaves_the_sum_unknown_and_its_parts_shown(tmp_path: Path) -> None:
    session = Session(tmp_path, host("north"), host("east"))
    session.when_trial(1, lambda nodes: session.cluster.silence(nodes[1]))
    text = TWO_NODES.replace("[4, 8]", "[4]").replace("min_window_s: 0.4", "min_window_s: 3")
    session.run(text)
    (row,) = session.rows()
    assert row["status"] == "partial"
    assert not row["power_valid"]
    assert row["total_energy_j"] is None
    assert row["joules_per_output_token"] is None
    assert "node_missing" in row["invalid_reasons"]
    assert (row["nodes_expected"], row["nodes_reported"]) == (2, 1)
    lead, worker = row["gang_nodes"]
    leads = set(row["workers"][0]["gpu_uuids"])
    assert lead["leased_energy_j"] == pytest.approx(true_j(session, row, leads), rel=0.02)
    assert (worker["reported"], worker["leased_energy_j"]) == (False, None)
    assert worker["reason"]


@pytest.mark.usefixtures("hasty")
def test_a_node_that_joins_late_gets_a_sampler_and_a_gang(tmp_path: Path) -> None:
    session = Session(tmp_path, host("north"))
    session.when_trial(1, lambda _nodes: session.add(host("east")))
    session.run(SWEEP.replace("min_window_s: 0.4", "min_window_s: 1.5"))
    assert_each_done_once(session, 6)
    assert {row["node"] for row in session.rows("nodes")} == {"north", "east"}
    late = [row for row in session.rows() if row["node"] == "east"]
    assert late
    for row in late:
        leased = set().union(*by_host(row).values())
        assert_true(row, true_j(session, row, leased))


def test_a_host_with_another_release_of_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "__version__", "0.0.9")
    session = Session(tmp_path, host("north"))
    with pytest.raises(PlacementError, match=f"north has llem-ray 0.0.9, here is {re.escape(__version__)}"):
        session.run()


def test_one_gpu_on_two_hosts_is_refused(tmp_path: Path) -> None:
    north = host("north")
    twin = replace(host("east"), devices=north.devices)
    session = Session(tmp_path, north, twin)
    with pytest.raises(PlacementError, match="GPU-north-0 is reported by north and by east"):
        session.run()


def test_devices_of_two_nodes_of_one_host_count_once(tmp_path: Path) -> None:
    north = host("north")
    session = Session(tmp_path, north)
    session.cluster.add(north, gpus=0, uptime_s=60.0)
    session.run(ONE_GROUP)
    assert_each_done_once(session, 2)
    for row in session.rows():
        assert row["cluster_gpu_energy_j"] == pytest.approx(true_j(session, row, gpus("north")), rel=0.02)
        assert row["other_nodes_expected"] == 0
    assert_tiled(session, gpus("north"))


def assert_tiled(session: Session, uuids: set[str]) -> None:
    """Every device's phases cover the run from its begin to its end once and wholly, boot after boot on the host's clock."""
    rows = session.rows("phases")
    assert {row["device_uuid"] for row in rows} == uuids
    for uuid in uuids:
        pieces = []
        for boot in session.boots:
            mine = [row for row in rows if (row["node"], row["device_uuid"]) == (boot.name, uuid) and is_of(session, boot, row)]
            spans = [PhaseSpan(phase=row["phase"], begin_ns=row["begin_ns"], end_ns=row["end_ns"]) for row in mine]
            if spans:
                begin_ns, end_ns = min(span.begin_ns for span in spans), max(span.end_ns for span in spans)
                check_tiling(spans, begin_ns, end_ns)
                pieces.append((boot.to_ours(begin_ns), boot.to_ours(end_ns)))
            rows = [row for row in rows if row not in mine]
        assert pieces[0][0] == pytest.approx(session.begin_ns, abs=5e6)
        assert session.end_ns - 10e9 < pieces[-1][1] < session.end_ns + 5e6  # the last files are written after it
        assert all(abs(after[0] - before[1]) <= 5e6 for before, after in pairwise(pieces))
    assert not rows


def is_of(session: Session, boot: PretendHost, row: dict[str, Any]) -> bool:
    """The row's times are of the boot's clock: no two clocks here are less than an hour apart."""
    return session.begin_ns - 1e9 < boot.to_ours(row["begin_ns"]) < session.end_ns + 1e9


def gpus(*names: str) -> set[str]:
    return {f"GPU-{name}-{index}" for name in names for index in range(2)}


def test_ledgers_tile_the_run_with_several_lanes(session: Session) -> None:
    session.run(SWEEP.replace("[1, 2, 3]", "[1, 2, 3, 4, 5]"))
    assert_tiled(session, gpus(*HOURS_S))


@pytest.mark.usefixtures("hasty")
def test_ledgers_tile_the_run_when_a_node_dies(session: Session) -> None:
    """Nobody knows what it spends from then on: its phases go on without an energy."""
    session.when_trial(2, lambda nodes: session.cluster.kill(nodes[0]))
    session.run()
    assert_tiled(session, gpus(*HOURS_S))
    (dead,) = [boot for boot in session.boots if boot.name not in session.nodes()]
    rows = [row for row in session.rows("phases") if row["node"] == dead.name]
    for row in rows:
        if row["energy_j"] is not None:
            error_j = row["energy_j"] - dead.true_j(row["device_uuid"], row["begin_ns"], row["end_ns"])
            assert abs(error_j) <= 4 * row["u_j"], row
    after = [row for row in rows if row["phase"] == "finalise"]
    assert after
    assert all(row["energy_j"] is None and row["reason"] for row in after)


@pytest.mark.usefixtures("hasty")
def test_a_host_that_comes_back_with_another_clock_is_accounted_for_on_both(tmp_path: Path) -> None:
    """Its devices' counters and its clock begin anew; what is measured there afterwards is right."""
    session = Session(tmp_path, host("north"), host("east"))

    def restart(nodes: tuple[str, ...]) -> None:
        old = session.cluster.host_of(nodes[0])
        session.cluster.kill(nodes[0])
        fresh = tuple(replace(device, base_mj=1e9) for device in old.devices)
        booted = PretendHost(name=old.name, devices=fresh, offset_s=old.offset_s - 500_000.0)
        # What was measured before is accounted for by then: a boot takes longer.
        threading.Timer(4.5, session.add, [booted]).start()

    session.when_trial(3, restart)
    text = SWEEP.replace("[1, 2, 3]", "[1, 2, 3, 4, 5, 6]").replace("min_window_s: 0.4", "min_window_s: 0.6")
    assert session.run(text).left == 0
    assert_each_done_once(session, 12)
    *_, again = session.boots
    old = next(boot for boot in session.boots if boot.name == again.name)
    done = [row for row in session.rows() if row["status"] == "completed" and row["node"] == again.name]
    for boot in (old, again):
        mine = [row for row in done if is_of(session, boot, row)]
        assert mine
        for row in mine:
            (leased,) = by_host(row).values()
            if row["total_energy_j"] is None:
                assert boot is old
                assert row["energy_reason"]
            else:
                truth_j = sum(boot.true_j(uuid, row["begin_ns"], row["end_ns"]) for uuid in leased)
                assert_true(row, truth_j)
    assert_tiled(session, gpus("north", "east"))


REPEATED = (
    ONE_GROUP.replace("repeats: 1", "repeats: 8\nstopping: {half_width_rel: 0.9, metric: output_throughput_tok_s}")
    .replace("min_window_s: 0.4", "min_window_s: 0.2")
    .replace("load_ms: [1]", "load_ms: [1]\n  engine.engine_args.decode_ms: [20]")
)


def test_cells_that_reached_the_target_get_no_more_repeats_also_after_a_resume(session: Session) -> None:
    session.when_trial(7, lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert session.run(REPEATED).interrupted
    assert session.run(REPEATED).left == 0
    assert_each_done_once(session, 10)
    assert session.events().count("not_needed") == 6
    assert {row["repeat"] for row in session.rows()} == {0, 1, 2, 3, 4}


def test_who_waits_for_results_starts_nothing_after_a_stop(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def ask(stopping: Stopping, trial: Trial) -> str:
        if trial.repeat < 1:
            return "run"
        if not begun:
            begun.append(session.events().count("measuring"))
            os.kill(os.getpid(), signal.SIGINT)
        return "wait"

    monkeypatch.setattr(Stopping, "ask", ask)
    assert session.run(REPEATED).interrupted
    assert session.events().count("measuring") == begun[0]
