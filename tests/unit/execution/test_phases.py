"""A trial's phases, requests and FLOP, from samples and steps to columns."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_samplers import FakeCluster, FakeSampler, gpu
from served_loads import BEGIN_S, END_S, Served, batches, mixing

from llem_ray.config.sweep import load_sweep
from llem_ray.core.backend import LoadReport, RequestRecord, StepEvent
from llem_ray.core.energy import Window
from llem_ray.core.flops import FlopModel
from llem_ray.core.measure_spec import FootprintSpec
from llem_ray.core.outcome import Completed, OnlineRun
from llem_ray.core.plan import Plan
from llem_ray.core.power import SampleBatch
from llem_ray.core.spec import EngineSpec
from llem_ray.core.step_log import StepLog
from llem_ray.core.units import NS_PER_S
from llem_ray.energy.peak_flops import PEAKS, peak_flops_per_s
from llem_ray.energy.phase_energy import sum_splits
from llem_ray.energy.phase_split import PhaseSplit, TickErrors, shares_inside, split_phases
from llem_ray.energy.ticks import find_ticks
from llem_ray.execution.accounting import Accounts
from llem_ray.execution.calls import Leased, Loaded
from llem_ray.execution.computing import count_flops
from llem_ray.execution.footprint import look_up_footprint
from llem_ray.execution.meter import Meter
from llem_ray.execution.records import AttemptEnded, GangRecord, HostDevice
from llem_ray.execution.rows import request_energies
from llem_ray.execution.window_tokens import request_parts
from llem_ray.planning.plan import make_plan
from llem_ray.testing.clock import VirtualClock
from llem_ray.testing.loads import Segment, SegmentLoad
from llem_ray.testing.sensor import SensorModel, simulate_trace

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
OFFSET_S = {"h1": 0.0, "h2": 7200.0}
"""Each host's clock less the run driver's."""
START_S = 1000.0
"""What the run driver's clock shows at time 0 of a load."""
REQUESTS = tuple(
    RequestRecord(
        request_id=f"0-{n}", prompt_tokens=100 * (n + 1), padded_tokens=800, output_token_ids=tuple(range(8)),
        finish_reason="length", scheduled_ns=1, queued_ns=1, sent_ns=1, token_times_ns=tuple(range(8)), requested_tokens=8,
    )
    for n in range(8)
)  # fmt: skip
REPORT = LoadReport(
    import_s=0.0, construct_s=0.0, compile_s=None, warm_s=None, context_tokens=1, vocab_size=1, parameters=1000,
    weight_bytes=None, dtype="bfloat16", device="cuda", model_commit=None, random_weights=False,
)  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return make_plan(load_sweep(tmp_path / "sweep.yaml"), past_run=None, gpus_available=2)


def metered(*loads: Served) -> Meter:
    """Two hosts, each with a GPU that draws what its load says."""
    clock = VirtualClock()
    cluster = FakeCluster(clock)
    samplers = [cluster.sampler(f"h{n}", f"G{n}", offset_s=OFFSET_S[f"h{n}"]) for n in (1, 2)]
    for n, sampler in enumerate(samplers, 1):
        cluster.add(f"n{n}", sampler, gpus=1)
    meter = cluster.meter()
    meter.open(cluster.nodes())
    for n, (sampler, served) in enumerate(zip(samplers, loads, strict=True)):
        _fill(sampler, served, seed=n)
    clock.sleep_until_ns(round((START_S + END_S + 4) * NS_PER_S))
    meter.pump(hurry=True)
    return meter


def _fill(sampler: FakeSampler, served: Served, seed: int) -> None:
    trace = simulate_trace(served.load, BEGIN_S - 4, END_S + 4, seed=seed, model=SensorModel())
    sampler.batches.append(
        SampleBatch(
            node=sampler.host_id,
            epoch=sampler.epoch,
            seq=1,
            devices=sampler.uuids,
            device=np.zeros(len(trace.t_ns), np.int32),
            t_ns=trace.t_ns + round((START_S + sampler.offset_s) * NS_PER_S),
            hw_ns=trace.hw_ns,
            power_mw=trace.power_mw,
            power_avg_mw=trace.power_avg_mw,
            energy_mj=trace.energy_mj,
            states=(),
        )
    )


def step_log(served: Served, flops: float | None = None) -> StepLog:
    """On the leading host's clock, which is the run driver's."""
    log, steps = StepLog(), served.steps
    for begin_s, end_s, prefill, decode, mixed in zip(
        steps.begin_s, steps.end_s, steps.prefill_tokens, steps.decode_tokens, steps.mixed, strict=True
    ):
        log.add(
            StepEvent(
                begin_ns=round((START_S + begin_s) * NS_PER_S),
                end_ns=round((START_S + end_s) * NS_PER_S),
                kind="mixed" if mixed else "prefill" if prefill else "decode",
                prefill_tokens=int(prefill),
                decode_tokens=int(decode),
                computed_tokens=int(prefill + decode),
                flops=flops,
            )
        )
    return log


def steps_inside(served: Served) -> float:
    """The last step goes on beyond the window."""
    return float(shares_inside(served.steps.begin_s, served.steps.end_s, BEGIN_S, END_S).sum())


def completed(log: StepLog | None) -> Completed:
    begin_ns, end_ns = (round((START_S + t_s) * NS_PER_S) for t_s in (BEGIN_S, END_S))
    window = Window(node="h1", begin_ns=begin_ns, end_ns=end_ns)
    return Completed(window=window, spans=(), requests=REQUESTS, steps=1, passes=1, step_log=log)


def columns(plan: Plan, meter: Meter, done: Completed, report: LoadReport = REPORT, **accounts: Any) -> dict[str, Any]:
    group = plan.groups[0]
    workers = tuple(
        Leased(node=f"h{n}", hostname=f"h{n}", pid=n, gpu_ids=("0",), gpu_uuids=(f"G{n}",), rank=n - 1, node_id=f"n{n}")
        for n in (1, 2)
    )
    devices = tuple(HostDevice(host=f"h{n}", device=replace(gpu(f"G{n}"), name="NVIDIA H200")) for n in (1, 2))
    gang = GangRecord(name="gang-1", group=group, workers=workers, devices=devices, context=(), reason=None)
    gang.loaded = Loaded(report=report, ranks=())
    ended = AttemptEnded(
        gang=gang, group=group, trial=group.trials[0], attempt=1, outcome=done, begin_ns=done.window.begin_ns,
        end_ns=done.window.end_ns, started_utc=datetime.now(UTC), gap_s=None, final=False,
    )  # fmt: skip
    return Accounts(plan.measure, meter, **accounts).energy_columns(ended)


@pytest.fixture(params=[(batches, "phase_time_regression"), (mixing, "phase_token_regression")], ids=["batches", "mixing"])
def known(request: pytest.FixtureRequest) -> tuple[Served, str]:
    make, method = request.param
    return make(3), method


def test_known_phases_of_gpus_on_two_hosts_are_recovered_within_the_interval(plan: Plan, known: tuple[Served, str]) -> None:
    served, method = known
    row = columns(plan, metered(served, served), completed(step_log(served)))
    assert row["power_valid"], row
    assert (row["phase_method"], row.get("phase_reason")) == (method, None)
    for name, one_j in (("prefill", served.prefill_j), ("decode", served.decode_j)):
        found_j, u_j = row[f"{name}_energy_j"], row[f"{name}_energy_u_j"]
        assert abs(found_j - 2 * one_j) <= 3 * u_j
        assert found_j == pytest.approx(2 * one_j, rel=0.03)
        assert row[f"{name}_gpu_energy_j"] == found_j
    parts_j = row["prefill_energy_j"] + row["decode_energy_j"] + row["phase_rest_energy_j"]
    assert parts_j == pytest.approx(row["total_energy_j"])
    assert 0 < row["phase_residual_rel"] < 0.1


def test_one_gpu_that_tells_nothing_makes_the_gangs_phases_null(plan: Plan) -> None:
    served, rng = batches(3), np.random.default_rng(0)
    wild = SegmentLoad([Segment(5.0 + 0.05 * i, rng.uniform(0, 700)) for i in range(900)])
    row = columns(plan, metered(served, replace(served, load=wild)), completed(step_log(served)))
    assert row["power_valid"], row
    assert row.get("prefill_energy_j") is None
    assert row["phase_reason"].startswith("G2: ")
    assert row["request_energy_rule"] == "total_tokens"


def device_split(rng: np.random.Generator, begin_s: float, prefill_u_j: float, decode_u_j: float) -> PhaseSplit:
    added_j = rng.normal(size=(300, 2)) * np.array([prefill_u_j, decode_u_j]) / 300**0.5
    return PhaseSplit(
        method="phase_time_regression", prefill_j=10.0, prefill_u_j=prefill_u_j, decode_j=20.0, decode_u_j=decode_u_j, rest_j=5.0,
        residual_rel=0.01 * prefill_u_j, ticks=301, errors=TickErrors(begin_s + 0.1 * np.arange(301), added_j),
    )  # fmt: skip


def test_errors_of_devices_that_have_nothing_in_common_add_in_quadrature() -> None:
    total = sum_splits([device_split(np.random.default_rng(seed), 0.01 * seed, 3.0, 0.5) for seed in range(4)])
    assert (total.prefill_j, total.decode_j, total.rest_j) == (40.0, 80.0, 20.0)
    assert total.residual_rel == 0.03
    assert 5.999 <= total.prefill_u_j <= 1.25 * 6.0
    assert 0.999 <= total.decode_u_j <= 1.25 * 1.0
    apart = [device_split(np.random.default_rng(seed), 0.0, seed, 1.0) for seed in (3, 4)]
    assert sum_splits(apart[:1]).prefill_u_j == 3.0
    assert 4.999 <= sum_splits(apart).prefill_u_j <= 1.25 * 5.0


def test_errors_of_devices_that_err_together_add_up() -> None:
    total = sum_splits([device_split(np.random.default_rng(7), 0.0, 3.0, 0.5) for _ in range(8)])
    assert 0.85 * 24.0 <= total.prefill_u_j <= 24.0
    assert 0.85 * 4.0 <= total.decode_u_j <= 4.0


def test_of_gpus_that_run_the_same_steps_truth_lies_in_the_interval() -> None:
    """A step that draws more than its like does so on each of them, so that more GPUs do not make it known better."""
    inside = []
    for seed in range(20):
        served, model = mixing(seed), SensorModel()
        splits = []
        for rank in range(6):
            trace = simulate_trace(served.load, BEGIN_S - 3, END_S + 3, seed=100 * seed + rank, model=model)
            ticks = find_ticks(trace, model.calibration("GPU-sim"), sample_period_s=model.poll_s, origin_ns=round(BEGIN_S * 1e9))
            steps = replace(served.steps, begin_s=served.steps.begin_s - BEGIN_S, end_s=served.steps.end_s - BEGIN_S)
            found = split_phases(ticks, steps, 0.0, END_S - BEGIN_S, served.load.energy_j(BEGIN_S, END_S))
            assert isinstance(found, PhaseSplit), found
            splits.append(found)
        total = sum_splits(splits)
        inside.append(abs(total.prefill_j - 6 * served.prefill_j) <= 2 * total.prefill_u_j)
        inside.append(abs(total.decode_j - 6 * served.decode_j) <= 2 * total.decode_u_j)
    assert np.mean(inside) >= 0.85


def test_requests_share_the_windows_energy_by_phase(plan: Plan) -> None:
    served = batches(3)
    done = completed(step_log(served))
    row = columns(plan, metered(served, served), done)
    energies_j = request_energies(row, done)
    assert row["request_energy_rule"] == "phases"
    assert fsum(energies_j) == row["total_energy_j"]
    more_j = energies_j[1] - energies_j[0]  # 100 prompt tokens more, and as many output tokens
    per_token_j = row["prefill_energy_j"] / 3600 + row["phase_rest_energy_j"] / 3664
    assert more_j == pytest.approx(100 * per_token_j)


def test_without_steps_there_is_a_reason_and_requests_go_by_all_tokens(plan: Plan) -> None:
    served = batches(3)
    done = completed(None)
    row = columns(plan, metered(served, served), done)
    assert row["phase_reason"] == "steps are not kept (measure.record_steps)"
    assert row["request_energy_rule"] == "total_tokens"
    assert request_energies(row, done)[0] == pytest.approx(row["total_energy_j"] * 108 / 3664)


def test_invalid_energy_is_not_given_to_phases_or_requests(plan: Plan) -> None:
    served = batches(3)
    done = completed(step_log(served))
    short = replace(done, requests=tuple(replace(record, output_token_ids=(1,)) for record in REQUESTS))
    row = columns(plan, metered(served, served), short)
    assert row["invalid_reasons"] == ["token_count_mismatch"]
    assert row["phase_reason"] == "the energy is invalid"
    assert request_energies(row, short) == [None] * 8
    assert row["joules_per_flop"] is None
    assert row["carbon_g"] is None


def test_of_an_online_run_only_what_lies_in_the_window_counts() -> None:
    times = ((1, 2, 3, 4), (5, 6, 11, 12), (11, 12, 13, 30), (25, 26, 27, 28))
    records = tuple(replace(REQUESTS[0], output_token_ids=(1,) * 4, prompt_tokens=100, token_times_ns=stamps) for stamps in times)
    window, whole = Window(node="h1", begin_ns=10, end_ns=20), Window(node="h1", begin_ns=0, end_ns=40)
    online = OnlineRun(whole=whole, rule="interval", concurrency=4, missed=None)
    done = replace(completed(None), window=window, requests=records, online=online)
    parts = [(part.prompt_tokens, part.tokens_before, part.output_tokens) for part in request_parts(done)]
    assert parts == [(0, 4, 0), (0, 2, 2), (100, 0, 3), (0, 0, 0)]
    model = TestFlops.MODEL
    flops, _, _ = count_flops(done, replace(REPORT, flop_model=model))
    assert flops == model.decode(100, 2, 4) + model.prefill(100) + model.decode(100, 1, 3)
    row = {"request_energy_rule": "total_tokens", "total_energy_j": 105.0}
    assert request_energies(row, done) == [None, pytest.approx(2.0), pytest.approx(103.0), None]


class TestFlops:
    MODEL = FlopModel(per_token=10.0, per_output=1.0, per_pair=0.5)

    def test_the_engines_own_count_comes_first(self) -> None:
        served = batches(3)
        done = completed(step_log(served, flops=2e9))
        found = count_flops(done, replace(REPORT, flop_model=self.MODEL))
        assert found == (pytest.approx(2e9 * steps_inside(served)), "engine", None)

    def test_then_the_architecture(self) -> None:
        flops, method, _ = count_flops(completed(None), replace(REPORT, flop_model=self.MODEL))
        assert method == "architecture"
        assert flops == sum(self.MODEL.request(record.prompt_tokens, 8) for record in REQUESTS)

    def test_then_two_for_each_parameter_and_token(self) -> None:
        assert count_flops(completed(None), REPORT) == (2 * 1000 * (3600 + 7 * 8), "parameters", None)

    def test_or_nothing(self) -> None:
        flops, method, reason = count_flops(completed(None), replace(REPORT, parameters=None))
        assert (flops, method) == (None, None)
        assert reason == "the engine tells neither FLOP nor the model's size"

    def test_cached_prompts_are_not_counted_as_computed(self) -> None:
        log = StepLog()
        log.add(StepEvent(begin_ns=1, end_ns=2, kind="prefill", prefill_tokens=5, decode_tokens=1, computed_tokens=5))
        flops, _, reason = count_flops(completed(log), REPORT)
        assert flops is None
        assert reason == "the engine computed 5 of 3600 prompt tokens, the others were cached"

    def test_nor_are_those_that_only_the_requests_tell_of(self) -> None:
        """Without a step log (measure.record_steps)."""
        done = completed(None)
        cached = replace(done, requests=(replace(done.requests[0], cached_tokens=64), *done.requests[1:]))
        flops, _, reason = count_flops(cached, REPORT)
        assert flops is None
        assert reason == "64 of 3600 prompt tokens were cached"
        none = replace(done, requests=tuple(replace(record, cached_tokens=0) for record in done.requests))
        assert count_flops(none, REPORT) == count_flops(done, REPORT)

    def test_utilisation_is_that_of_all_gpus(self, plan: Plan) -> None:
        served = batches(3)
        row = columns(plan, metered(served, served), completed(step_log(served, flops=1e12)))
        assert row["flops"] == pytest.approx(1e12 * steps_inside(served))
        assert row["peak_flops_per_s"] == 2 * 989e12
        assert row["mfu"] == pytest.approx(row["flops"] / (30 * 2 * 989e12))
        assert row["joules_per_flop"] == pytest.approx(row["total_energy_j"] / row["flops"])
        assert "mfu" not in (row["null_reasons"] or {})

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"device": "cpu"}, "the model did not run on GPUs"),
            ({"dtype": "int4"}, "no peak FLOP/s is listed for int4 on NVIDIA H200 (table of 2026-11-26)"),
        ],
    )
    def test_no_utilisation_without_a_peak(self, plan: Plan, change: dict[str, str], reason: str) -> None:
        served = batches(3)
        row = columns(plan, metered(served, served), completed(None), replace(REPORT, **change))
        assert row["mfu"] is None
        assert row["null_reasons"]["mfu"] == reason

    @pytest.mark.parametrize("engine_args", [{"quantization": "fp8"}, {"load_in_8bit": True}])
    def test_no_utilisation_of_quantised_products(self, plan: Plan, engine_args: dict[str, Any]) -> None:
        served = batches(3)
        group = plan.groups[0]
        trial = group.trials[0]
        experiment = replace(trial.experiment, engine=replace(trial.experiment.engine, engine_args=engine_args))
        assert isinstance(experiment.engine, EngineSpec)
        trials = (replace(trial, cell=replace(trial.cell, experiment=experiment)),)
        changed = replace(plan, groups=(replace(group, trials=trials),))
        row = columns(changed, metered(served, served), completed(None))
        assert "quantised" in row["null_reasons"]["mfu"]

    def test_nor_of_a_checkpoint_that_is_quantised_already(self, plan: Plan) -> None:
        served = batches(3)
        report = replace(REPORT, notes={**REPORT.notes, "quantization": "fp8"})
        row = columns(plan, metered(served, served), completed(None), report)
        assert row["mfu"] is None
        assert "quantised" in row["null_reasons"]["mfu"]

    def test_peaks_are_named_with_their_source(self) -> None:
        assert all(peak.source.startswith("https://www.nvidia.com/") for peak in PEAKS.values())
        assert all(peak.checked for peak in PEAKS.values())
        assert peak_flops_per_s("NVIDIA A100 80GB PCIe", "bfloat16") == 312e12
        assert "listed for bfloat16 on Tesla T4" in str(peak_flops_per_s("Tesla T4", "bfloat16"))
        assert "listed for NVIDIA Z" in str(peak_flops_per_s("NVIDIA Z", "float16"))


def test_carbon_and_cost_are_products_with_their_inputs_beside_them(plan: Plan) -> None:
    served = batches(3)
    spec = FootprintSpec(grid_gco2_per_kwh=400.0, pue=1.25, price_per_kwh=0.2, currency="EUR", as_of="2026-01-31")
    row = columns(plan, metered(served, served), completed(None), footprint=look_up_footprint(spec))
    kwh = row["total_energy_j"] / 3.6e6
    assert row["carbon_g"] == pytest.approx(kwh * 1.25 * 400)
    assert row["energy_cost"] == pytest.approx(kwh * 1.25 * 0.2)
    assert (row["grid_source"], row["pue"], row["currency"]) == ("footprint.grid_gco2_per_kwh", 1.25, "EUR")
    assert row["footprint_as_of"] == "2026-01-31"


def test_without_inputs_carbon_and_cost_are_null(plan: Plan) -> None:
    served = batches(3)
    row = columns(plan, metered(served, served), completed(None))
    assert [row[name] for name in ("carbon_g", "energy_cost", "grid_gco2_per_kwh", "pue", "price_per_kwh")] == [None] * 5
