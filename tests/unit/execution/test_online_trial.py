"""An online trial from its order to its row, on an engine whose token times are scripted, with energies worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fake_samplers import FakeCluster, gpu
from scripted import answered, pairs

from llem_ray.config.sweep import load_sweep
from llem_ray.core.backend import LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.energy import Window
from llem_ray.core.measure_spec import WarmupSpec, WindowSpec
from llem_ray.core.outcome import Completed, OnlineRun, WarmupReport
from llem_ray.core.plan import Plan
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.execution import engines
from llem_ray.execution.accounting import Accounts
from llem_ray.execution.calls import Leased, TrialOrder
from llem_ray.execution.engine_host import EngineHost
from llem_ray.execution.load_rows import load_flags
from llem_ray.execution.meter import Meter
from llem_ray.execution.records import AttemptEnded, GangRecord, HostDevice
from llem_ray.execution.rows import attempt_row, request_rows
from llem_ray.planning.plan import make_plan
from llem_ray.testing.backend import FakeBackend
from llem_ray.testing.clock import VirtualClock
from llem_ray.workloads.pacing import pacing

SWEEP = """
schema_version: 1
name: online
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, gpus: 1}
  workload: {input_tokens: 10, output_tokens: 2, requests: 10, load: {pattern: saturated}}
repeats: 1
measure: {sources: [nvml], min_window_s: 5}
"""
BEGIN_S = 1000.0


class Scripted(FakeBackend):
    """Gives the answers of ``pairs``, and a step each second."""

    clock: VirtualClock
    served: list[tuple[int, LoadSchedule | None]]

    def run(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule | None = None
    ) -> Iterator[StepEvent | RequestRecord]:
        self.served.append((len(requests), schedule))
        begin_ns = self.clock.monotonic_ns()
        for second in range(10):
            self.clock.advance_ns(NS_PER_S)
            end_ns = self.clock.monotonic_ns()
            yield StepEvent(
                begin_ns=end_ns - NS_PER_S, end_ns=end_ns, kind="decode", prefill_tokens=0, decode_tokens=2, computed_tokens=2
            )
            if second % 2:
                for record in pairs(begin_ns / NS_PER_S)[second - 1 : second + 1]:
                    yield replace(record, request_id=record.request_id.removeprefix("0-"))
        self.clock.advance_ns(NS_PER_S // 2)


def plan_of(tmp_path: Path, *overrides: str) -> Plan:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return make_plan(load_sweep(tmp_path / "sweep.yaml", overrides=overrides), gpus_available=1)


def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Plan) -> Completed:
    """The plan's only trial on the scripted engine, begun at ``BEGIN_S``."""
    Scripted.clock, Scripted.served = VirtualClock(ns_from_s(BEGIN_S)), []
    monkeypatch.setattr(engines, "load_plugin", lambda group, name: Scripted)
    experiment = plan.trials[0].experiment
    host = EngineHost(experiment.model, experiment.engine, 0, str(tmp_path), str(tmp_path), Scripted.clock, online=True)
    host.load()
    order = TrialOrder(
        trial_id="t-r0",
        attempt=1,
        experiment=experiment,
        guard_s=0.0,
        warmup=WarmupSpec(batches=0),
        min_window_s=plan.measure.min_window_s,
        cooldown_s=0.0,
        window=plan.measure.window,
    )
    outcome = host.run(order)
    assert isinstance(outcome, Completed), outcome
    return outcome


def row_of(plan: Plan, outcome: Completed, unseen_s: tuple[float, float] = (0.0, 0.0)) -> dict[str, Any]:
    """The trial's row; its GPU draws 100 W until 1001 s, 300 W until 1008 s, then 50 W. It is not read within ``unseen_s``."""
    clock = VirtualClock()
    cluster = FakeCluster(clock)
    sampler = cluster.sampler("h1", "G1")
    cluster.add("n1", sampler, gpus=1)
    meter = cluster.meter()
    meter.open(cluster.nodes())
    for number, (begin, end, power_w) in enumerate(((999.0, 1001.0, 100.0), (1001.0, 1008.0, 300.0), (1008.0, 1012.0, 50.0))):
        times_s = [begin + 0.05 * (step + 0.5) for step in range(round((end - begin) / 0.05))]
        seen_s = [time_s for time_s in times_s if not unseen_s[0] <= time_s <= unseen_s[1]]
        sampler.sample(number + 1, seen_s, power_w=power_w)
    clock.sleep_until_ns(1013 * NS_PER_S)
    meter.pump(hurry=True)
    return accounted(plan, outcome, meter)


def accounted(plan: Plan, outcome: Completed, meter: Meter) -> dict[str, Any]:
    ended = ended_of(plan, outcome)
    return attempt_row(ended) | Accounts(plan.measure, meter).energy_columns(ended)


def ended_of(plan: Plan, outcome: Completed) -> AttemptEnded:
    worker = Leased(node="h1", hostname="h1", pid=1, gpu_ids=("0",), gpu_uuids=("G1",), node_id="n1")
    held = (HostDevice(host="h1", device=gpu("G1")),)
    group = plan.groups[0]
    online = outcome.online
    if online is not None:
        outcome = replace(
            outcome, window=replace(outcome.window, node="h1"), online=replace(online, whole=replace(online.whole, node="h1"))
        )
    return AttemptEnded(
        gang=GangRecord(name="gang-1", group=group, workers=(worker,), devices=held, context=(), reason=None),
        group=group,
        trial=group.trials[0],
        attempt=1,
        outcome=outcome,
        begin_ns=ns_from_s(BEGIN_S),
        end_ns=ns_from_s(BEGIN_S + 12),
        started_utc=datetime.now(UTC),
        gap_s=None,
        final=False,
    )


def test_a_saturated_trial_against_hand_computed_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """t0 = 1001 s, t1 = 1008 s: 7 s at 300 W are 2100 J, for 14 tokens 150 J each.

    The whole run lasts 10.5 s: 1 s at 100 W, 7 s at 300 W, 2.5 s at 50 W are 2325 J, for 20 tokens 116.25 J each.
    """
    plan = plan_of(tmp_path)
    outcome = ran(tmp_path, monkeypatch, plan)
    assert Scripted.served == [(10, LoadSchedule())]
    (measured,) = (span for span in outcome.spans if span.phase == "measured")
    assert (measured.begin_ns, measured.end_ns) == (ns_from_s(1000.0), ns_from_s(1010.5))
    assert outcome.step_log is not None
    assert list(outcome.step_log.end_ns) == [ns_from_s(1001.0 + second) for second in range(10)]  # of the whole run
    row = row_of(plan, outcome)
    expected = {
        "window_rule": "steady_state", "begin_ns": ns_from_s(1001.0), "end_ns": ns_from_s(1008.0), "window_s": 7.0,
        "run_begin_ns": ns_from_s(1000.0), "run_end_ns": ns_from_s(1010.5), "run_s": 10.5, "realised_concurrency": 2,
        "output_tokens": 14, "prompt_tokens": 60, "requests": 8, "steps": 7, "passes": 1, "run_output_tokens": 20,
        "run_requests": 10, "run_prompt_tokens": 100, "batch_size": None, "load_pattern": "saturated", "serving_s": 7.0,
        "output_throughput_tok_s": 2.0, "request_throughput_req_s": 8 / 7, "power_valid": True, "asked_rate_per_s": None,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    assert row["total_energy_j"] == pytest.approx(2100.0, rel=0.01)
    assert row["run_energy_j"] == pytest.approx(2325.0, rel=0.01)
    assert row["joules_per_output_token"] == pytest.approx(150.0, rel=0.01)
    assert row["run_joules_per_output_token"] == pytest.approx(116.25, rel=0.01)
    assert row["joules_per_successful_query"] == pytest.approx(2100 / 8, rel=0.01)
    assert row["ttft_s_max"] == pytest.approx(7.0)  # the fourth pair; the fifth ended after the window


def test_a_run_that_was_not_seen_in_whole_has_no_energy_per_token_where_its_window_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path)
    row = row_of(plan, ran(tmp_path, monkeypatch, plan), unseen_s=(1008.7, 1010.2))
    assert row["power_valid"], row["reason_details"]
    assert row["joules_per_output_token"] == pytest.approx(150.0, rel=0.01)
    assert row["run_joules_per_output_token"] is None
    assert "run_joules_per_output_token" in row["null_reasons"]


def test_all_requests_of_the_run_are_kept_and_those_of_the_window_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path)
    rows = request_rows(ended_of(plan, ran(tmp_path, monkeypatch, plan)), {}, keep_token_times=True)
    assert [row["in_window"] for row in rows] == [True] * 8 + [False] * 2
    assert rows[-1]["token_times_ns"] == [ns_from_s(1009.0), ns_from_s(1010.0)]


@pytest.mark.parametrize(
    ("overrides", "window", "tokens", "energy_j"),
    [
        (["measure.window={rule: total}"], (1000.0, 1010.5), 20, 2325.0),
        (["measure.window={rule: interval, start_s: 2, length_s: 4}"], (1002.0, 1006.0), 8, 1200.0),
    ],
)
def test_other_windows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    window: tuple[float, float],
    tokens: int,
    energy_j: float,
) -> None:
    plan = plan_of(tmp_path, *overrides, "measure.min_window_s=1")
    row = row_of(plan, ran(tmp_path, monkeypatch, plan))
    assert (row["begin_ns"], row["end_ns"]) == tuple(map(ns_from_s, window))
    assert row["output_tokens"] == tokens
    assert row["total_energy_j"] == pytest.approx(energy_j, rel=0.01)
    assert row["run_energy_j"] == pytest.approx(2325.0, rel=0.01)


def test_a_window_that_is_not_reached_makes_the_row_invalid_and_keeps_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, "measure.min_window_s=8")
    row = row_of(plan, ran(tmp_path, monkeypatch, plan))
    assert row["invalid_reasons"] == ["window_not_reached"]
    assert row["reason_details"]["window_not_reached"] == "the steady state lasted 7.000 s, measure.min_window_s is 8 s"
    assert (row["window_s"], row["output_tokens"], row["joules_per_output_token"]) == (10.5, 20, None)
    assert row["total_energy_j"] == row["run_energy_j"] == pytest.approx(2325.0, rel=0.01)


def test_power_that_falls_within_a_window_is_flagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole 10.5 s the first half has 1 s of 100 W and 4.25 s of 300 W, the second 2.75 s of 300 W and 2.5 s of 50 W."""
    plan = plan_of(tmp_path, "measure.window={rule: total}")
    row = row_of(plan, ran(tmp_path, monkeypatch, plan))
    assert row["power_drift_rel"] == pytest.approx((2.75 * 300 + 2.5 * 50) / (100 + 4.25 * 300) - 1, abs=0.02)
    assert row["throughput_drift_rel"] is not None
    short = row_of(plan_of(tmp_path), ran(tmp_path, monkeypatch, plan_of(tmp_path)))
    assert (short["power_drift_rel"], short["power_trend_p"]) == (None, None)


def flags_of(
    tmp_path: Path, requests: Sequence[RequestRecord], *, warmup: WarmupReport | None = None, window_s: float = 100.0
) -> dict[str, str]:
    """Flags of a constant load of 1/s whose requests went so."""
    workload = "base.workload={requests: 10, load: {pattern: constant, rate_per_s: 1}}"
    plan = plan_of(tmp_path, workload)
    outcome = ran_so(requests, warmup, window_s)
    found = load_flags(outcome, plan.trials[0].experiment.workload.load, plan.measure)
    return {flag.code: flag.detail for flag in found}


def ran_so(requests: Sequence[RequestRecord], warmup: WarmupReport | None, window_s: float) -> Completed:
    window = Window(node="h1", begin_ns=0, end_ns=ns_from_s(window_s))
    online = OnlineRun(whole=window, rule="total", concurrency=1, missed=None)
    return Completed(window=window, spans=(), requests=tuple(requests), steps=0, passes=1, warmup=warmup, online=online)


def paced(late_s: float = 0.0, service_s: float = 0.5, slowdown_s: float = 0.0) -> list[RequestRecord]:
    """Ten requests due each second; each is later by ``late_s``, and answered later by ``slowdown_s``, than the one before."""
    return [
        answered(i, [i + service_s + i * (late_s + slowdown_s)], sent_s=i * (1 + late_s), scheduled_s=float(i)) for i in range(10)
    ]


MIXED = [
    answered("good", [2.0, 3.0], prompt_tokens=10),
    answered("cut", [4.0], prompt_tokens=20, finish_reason="abort"),
    answered("refused", [], sent_s=5.0, prompt_tokens=30, finish_reason="abort"),
]


def test_what_failed_requests_count_in(tmp_path: Path) -> None:
    """Energy was spent on their prompts: tokens and shares have them; rates are of successful requests alone."""
    plan = plan_of(tmp_path)
    whole = ran_so(MIXED, None, 10.0)
    part = replace(whole, window=Window(node="h1", begin_ns=NS_PER_S, end_ns=9 * NS_PER_S))
    for outcome in (whole, part):
        row = attempt_row(ended_of(plan, outcome))
        assert (row["requests"], row["failed_requests"]) == (3, 2)
        assert (row["prompt_tokens"], row["failed_prompt_tokens"], row["output_tokens"], row["total_tokens"]) == (60, 50, 3, 63)
        assert row["run_prompt_tokens"] == 60
        assert row["total_token_throughput_tok_s"] * row["serving_s"] == pytest.approx(12)
        assert row["output_throughput_tok_s"] * row["serving_s"] == pytest.approx(2)
        measured = {"total_energy_j": 126.0, "request_energy_rule": "total_tokens"}
        shares = request_rows(ended_of(plan, outcome), row | measured, keep_token_times=False)
        assert [share["energy_j"] for share in shares] == pytest.approx([24.0, 42.0, 60.0])
    early = replace(whole, window=Window(node="h1", begin_ns=NS_PER_S, end_ns=ns_from_s(4.5)))
    row = attempt_row(ended_of(plan, early))
    assert (row["prompt_tokens"], row["failed_prompt_tokens"], row["failed_requests"]) == (30, 20, 1)


def talking(late_s: float = 0.0, slowdown_s: float = 0.0) -> list[RequestRecord]:
    """Ten conversations of two turns, begun each second; the second turn is due whenever the first has ended."""
    records = []
    for number in range(10):
        sent_s = number * (1 + late_s)
        ended_s = sent_s + 0.5 + number * slowdown_s
        first = answered(f"{number}a", [ended_s], sent_s=sent_s, scheduled_s=float(number))
        second = answered(f"{number}b", [ended_s + 0.5 + number * slowdown_s], sent_s=ended_s)
        records += [replace(first, conversation=number, turn=0, last_turn=False), replace(second, conversation=number, turn=1)]
    return records


def test_the_gates_on_pace_are_those_of_conversations(tmp_path: Path) -> None:
    assert flags_of(tmp_path, talking()) == {}
    flags = flags_of(tmp_path, talking(slowdown_s=0.125))
    assert flags == {"rate_not_reached": "answered at 0.8/s, asked for 1/s, the gate is 90%"}
    flags = flags_of(tmp_path, talking(late_s=0.03))
    assert flags == {"rate_not_sent": "sent at 0.9709/s, asked for 1/s, the gate is +-2%"}


def test_a_rate_that_is_kept_is_not_flagged(tmp_path: Path) -> None:
    assert flags_of(tmp_path, paced()) == {}


def test_long_answers_are_no_overload(tmp_path: Path) -> None:
    assert flags_of(tmp_path, paced(service_s=30.0)) == {}


def test_answers_of_many_lengths_are_no_overload(tmp_path: Path) -> None:
    """The last answers of a run may be long ones: that the engine is still busy then does not mean that it fell behind."""
    draws = Random(5)
    requests = [answered(i, [i + draws.expovariate(0.05)], sent_s=float(i), scheduled_s=float(i)) for i in range(400)]
    assert max(record.token_times_ns[-1] for record in requests) > ns_from_s(450.0)
    assert flags_of(tmp_path, requests) == {}


def test_requests_without_an_answer_are_missing_in_the_rate_of_answers() -> None:
    requests = [*paced(), answered(10, [], sent_s=10.0, scheduled_s=10.0), answered(11, [], sent_s=11.0, scheduled_s=11.0)]
    assert pacing(requests).achieved_rate_per_s == pytest.approx(10 / 12)


def test_of_requests_that_are_due_at_once_the_rate_of_answers_is_that_between_the_first_and_the_last() -> None:
    requests = [answered(i, [2.0 + i], sent_s=0.0) for i in range(5)]
    assert (pacing(requests).asked_rate_per_s, pacing(requests).achieved_rate_per_s) == (None, pytest.approx(1.0))
    assert pacing(requests[:1]).achieved_rate_per_s is None


def test_a_rate_that_cannot_be_reached_is_flagged(tmp_path: Path) -> None:
    flags = flags_of(tmp_path, paced(slowdown_s=0.25))
    assert flags == {"rate_not_reached": "answered at 0.8/s, asked for 1/s, the gate is 90%"}


def test_requests_that_were_not_sent_in_time_are_invalid(tmp_path: Path) -> None:
    flags = flags_of(tmp_path, paced(late_s=0.03))
    assert flags == {"rate_not_sent": "sent at 0.9709/s, asked for 1/s, the gate is +-2%"}


def test_a_short_run_and_a_restless_warm_up_are_flagged(tmp_path: Path) -> None:
    restless = WarmupReport(batches=50, end="limit", step_cv=0.2, power_cv=0.031)
    flags = flags_of(tmp_path, paced(), warmup=restless, window_s=4.0)
    assert flags == {
        "warmup_not_steady": "step times vary by 20.00%, power by 3.10% after 50 batches",
        "below_min_window": "4.000 s, measure.min_window_s is 5 s",
    }


def test_a_warm_up_without_power_is_noted(tmp_path: Path) -> None:
    steady = WarmupReport(batches=5, end="steady", step_cv=0.01, no_power="nothing measures")
    assert flags_of(tmp_path, paced(), warmup=steady) == {"warmup_without_power": "nothing measures"}
    flags = flags_of(tmp_path, paced(), warmup=replace(steady, end="limit"))
    assert flags["warmup_not_steady"] == "step times vary by 1.00% after 5 batches"


def test_few_requests_for_their_concurrency_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """N = 10 is 5 B: enough; of B = 3 it is not."""
    plan = plan_of(tmp_path)
    outcome = ran(tmp_path, monkeypatch, plan)
    load = plan.trials[0].experiment.workload.load
    assert list(load_flags(outcome, load, plan.measure)) == []
    assert outcome.online is not None
    wider = replace(outcome, online=replace(outcome.online, concurrency=3))
    assert [(flag.code, flag.detail) for flag in load_flags(wider, load, plan.measure)] == [
        ("few_requests", "10 requests with 3 at once")
    ]


def test_token_counts_of_an_online_trial_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, "base.workload.output_tokens=3")
    row = row_of(plan, ran(tmp_path, monkeypatch, plan))
    assert row["invalid_reasons"] == ["token_count_mismatch"]
    assert row["reason_details"]["token_count_mismatch"] == "10 of 10 requests, the first gave 2 tokens instead of 3"


def test_the_fake_engine_serves_a_poisson_load(tmp_path: Path) -> None:
    """In real time, with a real load generator: 20 requests at 200/s."""
    plan = plan_of(
        tmp_path, "base.workload={input_tokens: 4, output_tokens: 2, requests: 20, load: {pattern: poisson, rate_per_s: 200}}"
    )
    model = ModelSpec(config="llama-tiny", weights="random")
    host = EngineHost(model, EngineSpec(backend="fake", device="cpu"), 0, str(tmp_path), str(tmp_path), online=True)
    host.load()
    order = TrialOrder(
        trial_id="t-r0",
        attempt=1,
        experiment=plan.trials[0].experiment,
        guard_s=0.0,
        warmup=WarmupSpec(batches=1),
        min_window_s=0.05,
        cooldown_s=0.0,
        window=WindowSpec(),
    )
    outcome = host.run(order)
    host.close()
    assert isinstance(outcome, Completed), outcome
    assert [span.phase for span in outcome.spans] == ["warmup", "guard", "measured", "guard"]
    assert outcome.online is not None
    assert outcome.online.rule == "total"
    assert outcome.window == outcome.online.whole
    assert len(outcome.requests) == 20
    last_ns = max(record.scheduled_ns for record in outcome.requests)
    assert last_ns - outcome.window.begin_ns == pytest.approx(0.1 * NS_PER_S, rel=0.2)
