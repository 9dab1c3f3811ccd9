"""What a plan is expected to cost."""

from __future__ import annotations

from typing import Any

import pytest

from llem_ray.core.identity import cell_id
from llem_ray.core.measure_spec import MeasureSpec
from llem_ray.core.plan import Estimate
from llem_ray.core.spec import Cell, EngineSpec, Experiment, ModelSpec, Rates, Sweep
from llem_ray.core.workload_spec import LoadSpec, WorkloadSpec
from llem_ray.planning import PastRun, make_plan

MEASURE = MeasureSpec(idle_baseline_s=5.0, min_window_s=10.0, edge_guard_s=0.5, cooldown_s=4.0)


def estimate(rates: Rates, past_run: PastRun | None = None, *, models: int = 1, **engine: Any) -> Estimate:
    """Of two batch sizes on each model, three repeats."""
    experiments = [
        Experiment(model=ModelSpec(id=f"m{number}"), engine=EngineSpec(**engine), workload=WorkloadSpec(batch_size=size))
        for number in range(models)
        for size in (1, 2)
    ]
    cells = tuple(Cell(cell_id=cell_id(one), experiment=one, settings={}) for one in experiments)
    sweep = Sweep(
        name="s",
        schema_version=1,
        cells=cells,
        dropped=(),
        repeats=3,
        order="interleaved",
        seed=0,
        measure=MEASURE,
        rates=rates,
    )
    return make_plan(sweep, past_run=past_run).estimate


def test_nothing_known() -> None:
    unknown = estimate(Rates(watts_per_gpu=300.0))
    assert (unknown.duration_s, unknown.energy_kwh, unknown.basis) == (None, None, "nothing")
    assert "rates.seconds_per_load" in unknown.unknown["duration_s"]
    assert "rates.seconds_per_load" in unknown.unknown["energy_kwh"]


def test_configured_rates() -> None:
    made = estimate(Rates(seconds_per_load=60.0, watts_per_gpu=300.0), models=2, device="cuda", tensor_parallel=2)
    per_load_s = 60 + 2 * 5 + 6 * (10 + 2 * 0.5 + 4)
    assert made.duration_s == pytest.approx(2 * per_load_s)
    assert made.energy_kwh == pytest.approx(2 * per_load_s * 2 * 300 / 3.6e6)
    assert made.unknown == {}
    assert "warm-up" in made.basis


def test_power_unknown() -> None:
    made = estimate(Rates(seconds_per_load=60.0))
    assert made.duration_s is not None
    assert made.energy_kwh is None
    assert "rates.watts_per_gpu" in made.unknown["energy_kwh"]
    on_cpu = estimate(Rates(seconds_per_load=60.0, watts_per_gpu=300.0), device="cpu")
    assert on_cpu.energy_kwh is None
    assert "CPU" in on_cpu.unknown["energy_kwh"]


def test_a_past_run_goes_before_rates() -> None:
    past = PastRun(name="s-1", seconds_per_load=20.0, seconds_per_trial=13.0, mean_power_w=800.0, gpus=2)
    made = estimate(Rates(seconds_per_load=60.0, watts_per_gpu=300.0), past, device="cuda")
    assert made.duration_s == pytest.approx(20 + 10 + 6 * 13)
    assert made.energy_kwh == pytest.approx((20 + 10 + 6 * 13) * 400 / 3.6e6)
    assert made.basis == "past run s-1"


def test_a_past_run_on_the_cpu_says_nothing_of_gpus() -> None:
    past = PastRun(name="s-1", seconds_per_load=20.0, seconds_per_trial=13.0, mean_power_w=65.0)
    assert estimate(Rates(), past, device="cpu").energy_kwh == pytest.approx(108 * 65 / 3.6e6)
    assert estimate(Rates(), past, device="cuda").energy_kwh is None
    assert estimate(Rates(watts_per_gpu=100.0), past, device="cuda").energy_kwh == pytest.approx(108 * 100 / 3.6e6)


def test_known_cells_have_their_own_time() -> None:
    experiment = Experiment(model=ModelSpec(id="m0"), workload=WorkloadSpec(batch_size=2))
    past = PastRun(name="s-1", seconds_per_load=20.0, seconds_per_trial=13.0, cell_seconds={cell_id(experiment): 30.0})
    assert estimate(Rates(), past).duration_s == pytest.approx(20 + 10 + 3 * 13 + 3 * 30)
    assert estimate(Rates(), PastRun(name="s-1", seconds_per_load=20.0)).duration_s == pytest.approx(20 + 10 + 6 * 15)


def test_an_open_loop_lasts_as_long_as_its_arrivals() -> None:
    """100 requests at 2/s: 50 s; 10 at 2/s: the minimum window."""
    load = LoadSpec(pattern="constant", rate_per_s=2.0)
    lasting_s = [MEASURE.least_run_s(WorkloadSpec(requests=many, load=load)) for many in (100, 10)]
    assert lasting_s == [50.0, 10.0]
