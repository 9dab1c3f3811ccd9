"""What every executor must do: inline, Ray, and the one that tests pretend a cluster with."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from submission import RECORDING

from llem_ray.core.errors import ConfigError, EngineDied, LoadError
from llem_ray.core.identity import cell_id
from llem_ray.core.measure_spec import WarmupSpec
from llem_ray.core.outcome import Completed, Failed
from llem_ray.core.plan import LoadGroup, Trial
from llem_ray.core.spec import Cell, EngineSpec, Experiment, ModelSpec
from llem_ray.core.workload_spec import WorkloadSpec
from llem_ray.execution.calls import Executor, Gang, PowerSeen, SamplerSettings, TrialOrder, WarmupProgress
from llem_ray.execution.inline import InlineExecutor
from llem_ray.execution.ray.executor import EmbeddedRayExecutor
from llem_ray.planning.packing import Seat
from llem_ray.testing.cluster import PretendCluster
from llem_ray.testing.nodes import PretendDevice, PretendHost, swinging

DEADLINE_S = 90.0


@pytest.fixture(scope="module", params=["inline", "pretend", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])])
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    recording = tmp_path_factory.mktemp("power") / "recording.csv"
    recording.write_text(RECORDING)
    before = dict(os.environ)
    os.environ.update(LLEM_RAY_REPLAY=str(recording), LLEM_RAY_REPLAY_LOOP="1")
    made = make_executor(request.param)
    made.start()
    yield made
    made.close()
    os.environ.clear()
    os.environ.update(before)


def make_executor(name: str) -> Executor:
    if name == "pretend":
        cpu = PretendDevice(uuid="cpu-0", scope="cpu_package", source="replay", load=swinging(50, 5, 1))
        return PretendCluster([PretendHost(name="pretend", devices=(cpu,))])
    return InlineExecutor() if name == "inline" else EmbeddedRayExecutor()


def group(**engine_args: object) -> LoadGroup:
    experiment = Experiment(
        model=ModelSpec(config="llama-tiny", weights="random"),
        engine=EngineSpec(backend="fake", device="cpu", engine_args=engine_args),
        workload=WorkloadSpec(output_tokens=4, batch_size=2),
    )
    cell = Cell(cell_id=cell_id(experiment), experiment=experiment, settings={})
    return LoadGroup(load_key="key", trials=(Trial(trial_id="t-r0", cell=cell, repeat=0),), gpus=0)


def order(of: LoadGroup, **changes: object) -> TrialOrder:
    settings = {"guard_s": 0.05, "warmup": WarmupSpec(batches=1), "min_window_s": 0.05, "cooldown_s": 0.02, **changes}
    return TrialOrder(trial_id="t-r0", attempt=1, experiment=of.experiment, **settings)


def open_gang(executor: Executor, of: LoadGroup, tmp_path: Path) -> Gang:
    return executor.open_gang(of, [Seat(node=executor.nodes()[0].node_id, gpus=of.gpus)], str(tmp_path), str(tmp_path))


def test_a_trial_from_lease_to_close(executor: Executor, tmp_path: Path) -> None:
    fake = group()
    gang = open_gang(executor, fake, tmp_path)
    (leased,) = gang.lease().result(DEADLINE_S)
    assert leased.gpu_ids == ()
    loaded = gang.load().result(DEADLINE_S)
    assert [rank.pid for rank in loaded.ranks] == [leased.pid]
    before_ns = time.monotonic_ns()
    outcome = gang.run(order(fake)).result(DEADLINE_S)
    assert isinstance(outcome, Completed)
    assert outcome.window.node == leased.node
    assert outcome.window.duration_s >= 0.05
    assert before_ns < outcome.window.begin_ns < outcome.window.end_ns < time.monotonic_ns()
    assert [span.phase for span in outcome.spans] == ["warmup", "guard", "measured", "guard", "cooldown"]
    assert all(a.end_ns == b.begin_ns for a, b in pairwise(outcome.spans))
    assert len(outcome.requests) == 2 * outcome.passes
    assert {record.output_tokens for record in outcome.requests} == {4}
    assert len({record.request_id for record in outcome.requests}) == len(outcome.requests)
    gang.close(5.0)


def test_what_goes_wrong_in_a_trial_comes_back_and_the_engine_lives_on(executor: Executor, tmp_path: Path) -> None:
    fake = group(fail={"kind": "nan", "at_run": 1})
    gang = open_gang(executor, fake, tmp_path)
    gang.load().result(DEADLINE_S)
    failed = gang.run(order(fake)).result(DEADLINE_S)
    assert isinstance(failed, Failed)
    assert failed.kind == "numerics"
    assert failed.traceback
    assert isinstance(gang.run(order(fake)).result(DEADLINE_S), Completed)
    gang.close(5.0)


@pytest.mark.parametrize(
    ("engine_args", "error"), [({"fail": {"kind": "load"}}, LoadError), ({"prefil_ms": 3}, ConfigError)], ids=["load", "typo"]
)
def test_load_raises_the_engine_s_own_error(
    executor: Executor, tmp_path: Path, engine_args: dict[str, object], error: type[Exception]
) -> None:
    gang = open_gang(executor, group(**engine_args), tmp_path)
    with pytest.raises(error):
        gang.load().result(DEADLINE_S)
    gang.close(5.0)


def test_a_busy_engine_keeps_its_caller_waiting_but_not_its_phase(executor: Executor, tmp_path: Path) -> None:
    fake = group()
    gang = open_gang(executor, fake, tmp_path)
    gang.load().result(DEADLINE_S)
    call = gang.run(order(fake, min_window_s=1.0))
    with pytest.raises(TimeoutError):
        call.result(0.05)
    seen = set()
    while True:
        seen.add(gang.phase())
        try:
            assert isinstance(call.result(0.05), Completed)
            break
        except TimeoutError:
            continue
    assert "measured" in seen
    gang.close(5.0)


def test_a_warm_up_goes_on_until_it_is_told_that_power_is_steady(executor: Executor, tmp_path: Path) -> None:
    fake = group(decode_ms=20)
    gang = open_gang(executor, fake, tmp_path)
    gang.load().result(DEADLINE_S)
    assert gang.tell_warmup("t-r0", 1, None).result(DEADLINE_S) == WarmupProgress()
    asked = order(fake, warmup=WarmupSpec(until_cv=5.0, max_batches=10_000), no_power=None)
    call = gang.run(asked)
    progress, seen, deadline = WarmupProgress(), None, time.monotonic() + DEADLINE_S
    while not progress.over and time.monotonic() < deadline:
        progress = gang.tell_warmup("t-r0", 1, seen).result(DEADLINE_S)
        assert seen is not None or not progress.over
        if progress.marks and progress.marks[-1][0] > 12:
            seen = PowerSeen(batches=progress.marks[-1][0], cv=0.25)
        time.sleep(0.02)
    outcome = call.result(DEADLINE_S)
    assert isinstance(outcome, Completed)
    assert outcome.warmup is not None
    assert (outcome.warmup.end, outcome.warmup.power_cv) == ("steady", 0.25)
    assert outcome.warmup.batches > 12
    warmup = next(span for span in outcome.spans if span.phase == "warmup")
    assert warmup.begin_ns <= progress.marks[0][1] < progress.marks[-1][1] <= warmup.end_ns
    gang.close(5.0)


def test_a_hanging_engine_can_be_closed_by_force(executor: Executor, tmp_path: Path) -> None:
    fake = group(fail={"kind": "hang"})
    gang = open_gang(executor, fake, tmp_path)
    gang.load().result(DEADLINE_S)
    call = gang.run(order(fake))
    with pytest.raises(TimeoutError):
        call.result(0.3)
    gang.close(0.0)
    if not isinstance(executor, InlineExecutor):
        with pytest.raises(EngineDied):
            call.result(DEADLINE_S)


def test_a_dead_engine_is_named_and_its_last_words_kept(executor: Executor, tmp_path: Path) -> None:
    if not isinstance(executor, EmbeddedRayExecutor):
        pytest.skip("an engine on a thread cannot die without this process")
    fake = group(fail={"kind": "die"})
    gang = open_gang(executor, fake, tmp_path)
    gang.lease().result(DEADLINE_S)
    gang.load().result(DEADLINE_S)
    with pytest.raises(EngineDied, match="t-r0"):
        gang.run(order(fake)).result(DEADLINE_S)
    gang.close(0.0)


def test_sampler_describes_and_hands_out_every_batch_once(executor: Executor) -> None:
    sampler = executor.open_sampler(executor.nodes()[0], SamplerSettings(run="run", sources=("replay",), sample_hz=20.0))
    host = sampler.host().result(DEADLINE_S)
    info = sampler.describe().result(DEADLINE_S)
    assert [device.uuid for device in info.devices] == ["cpu-0"]
    assert (info.epoch, info.node) == (1, host)
    before_ns = time.monotonic_ns()
    received_ns, replied_ns = sampler.probe().result(DEADLINE_S)
    assert before_ns <= received_ns <= replied_ns <= time.monotonic_ns()
    assert sampler.alive([os.getpid(), info.pid]).result(DEADLINE_S) == (os.getpid(), info.pid)
    rows, after = 0, 0
    deadline = time.monotonic() + DEADLINE_S
    while rows < 20 and time.monotonic() < deadline:
        fetched = sampler.fetch(after, info.epoch).result(DEADLINE_S)
        assert before_ns < fetched.received_ns <= fetched.replied_ns
        batches = fetched.batches
        assert [batch.seq for batch in batches] == list(range(after + 1, after + 1 + len(batches)))
        rows += sum(len(batch) for batch in batches)
        after += len(batches)
        time.sleep(0.1)
    assert rows >= 20
    sampler.close()


def test_sampler_that_cannot_work_says_why(executor: Executor) -> None:
    settings = SamplerSettings(run="run", sources=("no-such-source",), sample_hz=20.0)
    sampler = executor.open_sampler(executor.nodes()[0], settings)
    with pytest.raises(Exception, match="no-such-source"):
        sampler.describe().result(DEADLINE_S)
    sampler.close()


def test_facts_name_the_executor(executor: Executor) -> None:
    assert executor.facts()["executor"] in {"inline", "pretend", "ray-embedded"}
