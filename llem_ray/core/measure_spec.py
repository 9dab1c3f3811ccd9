"""How it is measured: gates, warm-up, windows, objectives, repeats, and the inputs of carbon and cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Annotated, Any, ClassVar, Final, Literal

from llem_ray.core.spec_fields import ADDED, STRICT, Ge, Gt, Le, Lt, MinLen
from llem_ray.core.workload_spec import LoadSpec, TimeSpec, WorkloadSpec

Exclusive = Literal["node", "cluster", "none"]
SloPreset = Literal[
    "mlperf-llama2-70b",
    "mlperf-llama2-70b-interactive",
    "mlperf-llama3.1-405b",
    "mlperf-llama3.1-405b-interactive",
    "mlperf-llama3.1-8b",
    "mlperf-llama3.1-8b-interactive",
    "mlperf-deepseek-r1",
    "mlperf-deepseek-r1-interactive",
]
WindowRule = Literal["auto", "total", "steady_state", "mlperf", "interval"]

MLPERF_MIN_S: Final = 600.0
"""Shortest run of MLPerf Inference (``min_duration`` of its load generator)."""

CV_BATCHES: Final = 5
"""Warm-up batches whose step times are compared, and stretches of them whose power is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSpec:
    """Thresholds beyond which a window's energy is invalid, or flagged."""

    __pydantic_config__: ClassVar[Any] = STRICT

    min_coverage: Annotated[float, Gt(0), Le(1)] = 0.9
    """Share of the expected samples that must have arrived inside the window."""
    max_cross_check_rel: Annotated[float, Gt(0)] = 0.03
    """Largest relative disagreement of counter and averaged power, windows of 5 s and longer."""
    max_cross_check_rel_short: Annotated[float, Gt(0)] = 0.08
    """The same for windows of 1 to 5 s."""
    max_sent_rate_rel: Annotated[float, Gt(0)] = field(default=0.02, metadata=ADDED)
    """Open loops: largest relative difference of the rate at which requests were sent from the one asked for."""
    min_rate_rel: Annotated[float, Gt(0), Le(1)] = field(default=0.9, metadata=ADDED)
    """Open loops: share of the asked rate that answers must reach; below it the window is flagged."""
    max_drift_rel: Annotated[float, Gt(0)] = field(default=0.05, metadata=ADDED)
    """Largest relative change of power or throughput from one half of a window to the other, where there is a trend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupSpec:
    """What runs before a window and is never part of it."""

    __pydantic_config__: ClassVar[Any] = STRICT

    batches: Annotated[int, Ge(0)] = 1
    """Batches run before each trial's window. Under an online load a batch is `concurrency` requests at once, 8 where the load
    names none."""
    min_s: Annotated[float, Ge(0)] = field(default=0.0, metadata=ADDED)
    """Batches go on for at least so long, so that devices come up to temperature."""
    until_cv: Annotated[float, Gt(0)] | None = field(default=None, metadata=ADDED)
    """Go on until step time and, where it is measured, the gang's power vary by at most this: standard deviation over mean of the
    last 5 batches' step times, and of the power of the last 5 stretches of whole batches of at least 0.5 s."""
    max_batches: Annotated[int, Ge(1)] = field(default=50, metadata=ADDED)
    """Where `until_cv` gives up, and flags the trial; where power is looked at not before 2.5 s of it are known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSpec:
    """Which part of an online run is the measured window. The whole run is kept beside it."""

    __pydantic_config__: ClassVar[Any] = STRICT

    rule: WindowRule = "auto"
    """`total` is the whole run. `steady_state` (saturated and closed loads) is ML.ENERGY's: from when as many requests as run
    together have given a first token, until that many and one more are left. `mlperf` is a whole run of at least 600 s.
    `interval` is `length_s` from `start_s` on. `auto` is `steady_state` for saturated loads, else `total`."""
    start_s: Annotated[float, Ge(0)] | None = None
    """Begin of the interval, after the begin of the run."""
    length_s: Annotated[float, Gt(0)] | None = None
    """Length of the interval."""

    def resolved(self, load: LoadSpec) -> WindowRule:
        """The rule that ``auto`` stands for under this load."""
        if self.rule != "auto":
            return self.rule
        return "steady_state" if load.pattern == "saturated" else "total"


@dataclass(frozen=True, kw_only=True, slots=True)
class SloSpec:
    """Service level objectives: what a request must keep to count in `goodput_req_s`. Without any there is no goodput."""

    __pydantic_config__: ClassVar[Any] = STRICT

    preset: SloPreset | None = None
    """Limits of MLPerf Inference on the time to first token and the time per output token."""
    ttft_ms: Annotated[float, Gt(0)] | None = None
    """Longest time to first token."""
    tpot_ms: Annotated[float, Gt(0)] | None = None
    """Longest time per output token after the first."""
    e2e_ms: Annotated[float, Gt(0)] | None = None
    """Longest end-to-end latency."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureSpec:
    """How it is measured. Part of the run's identity, not of a cell's."""

    __pydantic_config__: ClassVar[Any] = STRICT

    sources: Annotated[tuple[str, ...], MinLen(1)] | Literal["auto"] = "auto"
    """Power sources; `auto` takes every measuring source of the host, and the estimate where none measures the CPU."""
    sample_hz: Annotated[float, Gt(0), Le(200)] = 20.0
    """Polls per second of counters and instant power."""
    warmup: WarmupSpec = WarmupSpec()
    """What runs before each window."""
    idle_baseline_s: Annotated[float, Ge(0)] = 10.0
    """Length of the idle baselines, before the model is loaded and after; 0 turns them off and net energy is null."""
    min_window_s: Annotated[float, Gt(0)] = 10.0
    """A batch is repeated until the window is at least this long; an online window that is shorter is flagged or invalid."""
    window: WindowSpec = field(default=WindowSpec(), metadata=ADDED)
    """Which part of an online run is measured."""
    edge_guard_s: Annotated[float, Ge(0)] | Literal["auto"] = "auto"
    """Quiet time on both sides of a window; `auto` is 3 counter ticks of the slowest leased device, 0 without a counter."""
    cooldown_s: Annotated[float, Ge(0)] = 0.0
    """Rest after each trial."""
    cooldown_until_c: Annotated[float, Gt(0)] | None = field(default=None, metadata=ADDED)
    """Rest before each trial until no leased device is hotter than this, where temperatures can be read."""
    cooldown_limit_s: Annotated[float, Gt(0)] = field(default=300.0, metadata=ADDED)
    """Where `cooldown_until_c` gives up; the trial then runs, and is flagged."""
    record_steps: bool = field(default=True, metadata=ADDED)
    """Keep every step of a window in the table `steps`."""
    record_token_times: bool = field(default=True, metadata=ADDED)
    """Keep when each token of a request was delivered, in `requests.token_times_ns`."""
    trial_timeout_s: Annotated[float, Gt(0)] = 1800.0
    """Deadline of one trial."""
    load_timeout_s: Annotated[float, Gt(0)] = 1800.0
    """Deadline of one model load."""
    max_attempts: Annotated[int, Ge(1)] = 2
    """Attempts at a trial whose engine died; failures of the trial itself (memory, numerics) are not retried."""
    max_consecutive_failures: Annotated[int, Ge(1)] = 10
    """A sweep that fails this often in a row stops."""
    exclusive: Exclusive = "node"
    """What a gang has to itself: its nodes, the whole cluster, or only its GPUs. Neighbours on a node share CPU, fans and
    power supply: under `none` such windows are flagged."""
    placement_timeout_s: Annotated[float, Gt(0)] = 300.0
    """Deadline for the cluster to grant a gang its GPUs."""
    wait_for_nodes_s: Annotated[float, Ge(0)] = 0.0
    """How long an autoscaler may take to add nodes that the sweep needs and the cluster lacks; 0 refuses such a sweep at once."""
    gates: GateSpec = GateSpec()
    """When a window's energy is invalid, or flagged."""
    slo: SloSpec = field(default=SloSpec(), metadata=ADDED)
    """What a request must keep to be a good one."""

    @property
    def shortest_window_s(self) -> float:
        """How long a window must be at least, s."""
        return max(self.min_window_s, MLPERF_MIN_S) if self.window.rule == "mlperf" else self.min_window_s

    def least_run_s(self, workload: WorkloadSpec) -> float:
        """How long a trial of the workload runs at least, s: arrivals of an open loop take their time, and so does thinking."""
        load, many, think_s = workload.load, workload.whole_conversations or 0, workload.think_time_s
        if isinstance(think_s, TimeSpec):
            think_s = (think_s.mean if think_s.distribution == "fixed" else think_s.min) or 0.0
        arrivals_s = many / load.rate_per_s if load.rate_per_s else 0.0
        rounds = ceil(many / load.concurrency) if load.concurrency else 1
        return max(self.shortest_window_s, arrivals_s + rounds * (workload.least_turns - 1) * think_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppingSpec:
    """When a cell has enough repeats. Without `half_width_rel` every cell gets `repeats`; with it, `repeats` at most."""

    __pydantic_config__: ClassVar[Any] = STRICT

    half_width_rel: Annotated[float, Gt(0), Lt(1)] | None = None
    """Target: half of the interval's width, as a share of the mean. 0.02 asks for +-2 %."""
    confidence: Annotated[float, Gt(0.5), Lt(1)] = 0.95
    """Confidence level of the interval."""
    first: Annotated[int, Ge(5)] = 5
    """Repeats that every cell gets; their spread tells how many it needs (Stein's two-stage rule)."""
    metric: Literal["joules_per_output_token", "joules_per_total_token", "output_throughput_tok_s"] = "joules_per_output_token"
    """What the target is about."""
    budget_s: Annotated[float, Gt(0)] | None = None
    """Measured time that a cell may take, all its windows together; default: no limit but `repeats`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FootprintSpec:
    """What a kWh emits and costs where the sweep runs. Part of no identity; what is not given makes nulls, never 0."""

    __pydantic_config__: ClassVar[Any] = STRICT

    grid_gco2_per_kwh: Annotated[float, Ge(0)] | None = None
    """Emissions of the grid, g CO2 equivalent per kWh."""
    country: str | None = None
    """Instead of `grid_gco2_per_kwh`: ISO 3166 code of three letters (`FRA`), looked up in codecarbon's tables."""
    pue: Annotated[float, Ge(1)] = 1.0
    """Power usage effectiveness: what the building draws over what its computers do. 1 counts what is measured alone."""
    price_per_kwh: Annotated[float, Ge(0)] | None = None
    """Price of a kWh."""
    currency: str | None = None
    """Currency of the price, ISO 4217 (`EUR`)."""
    as_of: str | None = None
    """Date of these numbers, `YYYY-MM-DD`; required with `grid_gco2_per_kwh` and `price_per_kwh`."""
