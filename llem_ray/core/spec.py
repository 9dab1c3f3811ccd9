"""What is measured: the words of a sweep file, validated by ``config`` and planned by ``planning``.

These dataclasses are the single definition of the sweep file's fields: ``config`` validates straight into them and the
JSON Schema and the reference page come from their annotations and docstrings. They import nothing heavy, so an engine in
another interpreter can use them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Annotated, Any, ClassVar, Final, Literal

try:
    from annotated_types import Ge, Gt, Le, Lt, MinLen
except ModuleNotFoundError:  # an engine's own interpreter: bounds were checked where the sweep file was read
    Ge = Gt = Le = Lt = MinLen = lambda bound: bound  # type: ignore[assignment, misc, return-value]

_STRICT: Mapping[str, Any] = {"extra": "forbid", "use_attribute_docstrings": True}

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Order = Literal["interleaved", "shuffled", "sequential"]
Exclusive = Literal["node", "cluster", "none"]
LoadPattern = Literal["batch", "saturated", "closed", "constant", "poisson", "gamma", "trace"]
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
TurnAnswers = Literal["auto", "known", "generated"]

OPEN_LOOPS: Final[frozenset[str]] = frozenset({"constant", "poisson", "gamma", "trace"})
"""Load patterns that send at times of their own, however many requests are in flight."""

MLPERF_MIN_S: Final = 600.0
"""Shortest run of MLPerf Inference (``min_duration`` of its load generator)."""

CV_BATCHES: Final = 5
"""Warm-up batches whose step times are compared, and stretches of them whose power is."""

HASHED_IF_SET: Final = "hashed_if_set"


_ADDED: Final[Mapping[str, Any]] = {HASHED_IF_SET: True}
"""Of a field that came later: at its default it is in no hash, so that cells and runs from before keep their ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Which model, and with which weights. Exactly one of ``id`` and ``config``."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    id: str | None = None
    """Hugging Face hub id (`meta-llama/Llama-3.2-1B`) or path of a local model folder."""
    config: str | None = None
    """Name of a built-in random-weight config (`llama-tiny`) or path of a config.json. Implies `weights: random`."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; default: the model's own, or one trained locally when it has none."""
    dtype: Dtype = "auto"
    """Number format of the weights. `auto` takes the checkpoint's (float32 for random weights on a CPU, bfloat16 on CUDA)."""
    quantization: str | None = None
    """Quantisation method, passed to the engine."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` builds the model from its config alone. Marked in every result: operand values change power."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of random weights."""
    initializer_range: Annotated[float, Gt(0)] | None = None
    """Standard deviation of random weights; default: the config's."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """Which inference engine serves the model, on what, and how it is parallelised."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    backend: str = "transformers"
    """Name of an installed inference engine: `transformers`, `vllm`, `tensorrt`, or a plug-in's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA when the gang is placed on GPUs, else the CPU."""
    tensor_parallel: Annotated[int, Ge(1)] = 1
    """GPUs that share each layer."""
    pipeline_parallel: Annotated[int, Ge(1)] = 1
    """Groups of layers, each on its own GPUs."""
    data_parallel: Annotated[int, Ge(1)] = 1
    """Replicas of the whole model."""
    python: str | None = None
    """Interpreter, or command, that runs the engine in a process of its own; default: this process."""
    gpus: Annotated[int, Ge(0)] | None = None
    """Whole GPUs the gang holds; default: tensor x pipeline x data parallel, 0 when `device` is `cpu`."""
    nodes: Annotated[int, Ge(1)] | None = None
    """Nodes the gang is spread over, evenly; default: as few as hold its GPUs."""
    gpu_type: str | None = None
    """GPU type the gang must run on, as Ray names it (`H100`, `A100`); default: any, the same on all its nodes."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the engine as they are; the engine validates them before it loads weights."""

    @property
    def world_size(self) -> int:
        """Workers of one gang: tensor x pipeline x data parallel."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSpec:
    """Where prompts come from."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    source: Literal["builtin", "file", "synthetic", "dataset"] = "builtin"
    """`builtin` is the set shipped with llem-ray; `file` reads JSON Lines or Parquet; `dataset` reads with the Hugging Face
    `datasets` library; `synthetic` draws random token ids."""
    path: str | None = None
    """File of `source: file`, relative to the sweep file: Parquet (`.parquet`), else JSON Lines or a JSON list, of objects or
    strings."""
    column: str = "prompt"
    """Column of the prompt text: a key of each line, or a column of the table."""
    answer_column: str | None = field(default=None, metadata=_ADDED)
    """Column of a known answer, for `output_tokens: {distribution: answer}`."""
    format: Literal["column", "sharegpt"] = field(default="column", metadata=_ADDED)
    """`sharegpt`: each entry has `conversations`, a list of `{from, value}`. The prompt is the first human turn, the known
    answer the turn that follows it; entries without a human turn are left out. `workload.turns: recorded` takes all turns."""
    dataset: str | None = field(default=None, metadata=_ADDED)
    """Data set of `source: dataset`: a hub id, or a local folder or file (JSON Lines, JSON, CSV, Parquet, text), relative to
    the sweep file."""
    config: str | None = field(default=None, metadata=_ADDED)
    """Configuration (subset) of the data set."""
    split: str = field(default="train", metadata=_ADDED)
    """Split of the data set; `train[:1000]` takes a part of it."""
    revision: str | None = field(default=None, metadata=_ADDED)
    """Branch, tag or commit of the data set's repository."""
    limit: Annotated[int, Ge(1)] | None = field(default=None, metadata=_ADDED)
    """Prompts that are read, from the start of the source; None reads all."""
    chat_template: bool = field(default=False, metadata=_ADDED)
    """Render each prompt as a user's message with the model's own chat template, up to where the answer begins. `input_tokens`
    then counts the template's tokens too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthSpec:
    """How many tokens each request has: numbers drawn from a distribution, by `workload.seed`."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    distribution: Literal["fixed", "uniform", "normal", "lognormal", "empirical", "answer"]
    """`fixed`: always `mean`. `uniform`: every whole number from `min` to `max` alike. `normal`, `lognormal`: `mean` and `std`,
    cut off at `min` and `max`. `empirical`: one of `values`, or of the lines of `path`. `answer` (output only): the length of
    the prompt's known answer, limited to `min` and `max`."""
    mean: Annotated[float, Gt(0)] | None = None
    """Mean length in tokens, before it is cut off."""
    std: Annotated[float, Ge(0)] | None = None
    """Standard deviation of the length in tokens (of the length itself, also for `lognormal`), before it is cut off."""
    min: Annotated[int, Ge(1)] | None = None
    """Smallest length; default 1."""
    max: Annotated[int, Ge(1)] | None = None
    """Largest length; default: no limit."""
    values: tuple[Annotated[int, Ge(1)], ...] | None = None
    """Lengths to draw from."""
    weights: tuple[Annotated[float, Ge(0)], ...] | None = None
    """How often each of `values` is drawn, relative to the others; default: all alike."""
    path: str | None = None
    """File of lengths to draw from, relative to the sweep file. Each line a number of tokens, or `tokens,weight`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeSpec:
    """How long each wait is: numbers drawn from a distribution, by `workload.seed`."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    distribution: Literal["fixed", "uniform", "exponential", "normal", "lognormal", "empirical"]
    """`fixed`: always `mean`. `uniform`: from `min` to `max`. `exponential`: `mean`; `normal`, `lognormal`: `mean` and `std`; all
    three cut off at `min` and `max`. `empirical`: one of `values`."""
    mean: Annotated[float, Gt(0)] | None = None
    """Mean, s, before it is cut off."""
    std: Annotated[float, Ge(0)] | None = None
    """Standard deviation of the wait itself, s, before it is cut off."""
    min: Annotated[float, Ge(0)] | None = None
    """Shortest wait, s; default 0."""
    max: Annotated[float, Gt(0)] | None = None
    """Longest wait, s; default: no limit."""
    values: tuple[Annotated[float, Ge(0)], ...] | None = None
    """Waits to draw from, s."""
    weights: tuple[Annotated[float, Ge(0)], ...] | None = None
    """How often each of `values` is drawn, relative to the others; default: all alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSpec:
    """How requests reach the engine."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    pattern: LoadPattern = "batch"
    """`batch` runs `batch_size` requests together, one batch after the other. All others send `requests` one by one to an
    engine that serves: `saturated` at once, or so that `concurrency` are in flight; `closed` so that `concurrency` are in flight;
    `constant`, `poisson` and `gamma` at `rate_per_s`, however many are in flight; `trace` at recorded times."""
    rate_per_s: Annotated[float, Gt(0)] | None = None
    """Requests per second (`constant`, `poisson`, `gamma`); with `turns`, conversations that begin per second."""
    burstiness: Annotated[float, Gt(0)] | None = None
    """Shape of the gamma distribution of gaps between arrivals (`gamma`): 1 is Poisson, less is burstier, more is steadier."""
    concurrency: Annotated[int, Ge(1)] | None = None
    """Requests in flight (`closed`, `saturated`); with `turns`, conversations that are open. Without it `saturated` leaves the
    limit to the engine."""
    trace: str | None = None
    """CSV or JSON Lines file of arrivals (`trace`), relative to the sweep file: `timestamp_s` with `input_tokens` and
    `output_tokens`, or the shape of Mooncake's or Azure's traces. Lengths in it go before those of the workload."""
    trace_speed: Annotated[float, Gt(0)] = 1.0
    """The trace is replayed this many times as fast."""
    trace_prefixes: bool = field(default=True, metadata=_ADDED)
    """Prompts share the blocks of 512 tokens that `hash_ids` of a Mooncake trace name; false makes each prompt its own."""
    trace_max_input_tokens: Annotated[int, Ge(1)] | None = field(default=None, metadata=_ADDED)
    """Longest prompt of the replay: where the trace has longer ones, all its prompts are shortened by one factor, and the
    blocks they share with them."""

    @property
    def online(self) -> bool:
        """Requests are sent one by one."""
        return self.pattern != "batch"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadSpec:
    """What is asked of the engine in one window."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    prompts: PromptSpec = PromptSpec()
    """Where prompts come from."""
    input_tokens: Annotated[int, Ge(1)] | LengthSpec | None = None
    """Prompt length in tokens, exact or drawn from a distribution: longer prompts are cut, shorter ones continued with the next.
    None keeps natural lengths."""
    output_tokens: Annotated[int, Ge(1)] | LengthSpec = 32
    """Tokens to generate for each request, exact or drawn from a distribution."""
    shared_prefix_tokens: Annotated[int, Ge(0)] = field(default=0, metadata=_ADDED)
    """Tokens that requests of one group have in common, before the prompt and on top of `input_tokens`."""
    prefix_groups: Annotated[int, Ge(1)] = field(default=1, metadata=_ADDED)
    """Groups of requests, each with a prefix of its own; requests are dealt to them in turn."""
    turns: Annotated[int, Ge(1)] | LengthSpec | Literal["recorded"] = field(default=1, metadata=_ADDED)
    """Turns of a conversation, each a request: its prompt is all that came before, answers included, and `input_tokens` new
    ones. A number, drawn from a distribution, or those of the conversations of a file (`recorded`, with `prompts.format:
    sharegpt`). Under an online load a turn is due when the one before is answered."""
    conversations: Annotated[int, Ge(1)] | None = field(default=None, metadata=_ADDED)
    """Conversations of one pass, in place of `requests`; default where `turns` vary: `batch_size` of them."""
    max_conversation_tokens: Annotated[int, Ge(1)] | None = field(default=None, metadata=_ADDED)
    """Recorded conversations end before the first turn whose prompt and answer are longer than this together; one whose first
    turn is longer is left out."""
    turn_answers: TurnAnswers = field(default="auto", metadata=_ADDED)
    """Answers in later prompts. `known`: those of recorded conversations, else random token ids, as many as the turn before
    generates; the same for every engine. `generated`: what the engine did answer. `auto` is `known` in batches and `generated`
    under an online load."""
    think_time_s: Annotated[float, Ge(0)] | TimeSpec = field(default=0.0, metadata=_ADDED)
    """How long after an answer the next turn of its conversation is due, s, or its distribution; online loads."""
    batch_size: Annotated[int, Ge(1)] = 1
    """Requests that run together."""
    requests: Annotated[int, Ge(1)] | None = None
    """Distinct requests of one pass, each turn one; default: one batch of each turn. Where `turns` vary, `conversations` says how
    many there are. The pass is repeated until
    `measure.min_window_s` is reached. Under an online load they are sent once; a trace's default is all of its arrivals."""
    ignore_eos: bool = True
    """Generate exactly `output_tokens`, whatever the model says: rows stay comparable."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of lengths, of the choice and order of prompts, and of arrival times."""
    load: LoadSpec = field(default=LoadSpec(), metadata=_ADDED)
    """How requests reach the engine."""

    @property
    def generated_answers(self) -> bool:
        """Later prompts hold what the engine did answer."""
        return self.turn_answers == "generated" or (self.turn_answers == "auto" and self.load.online)

    @property
    def recorded(self) -> bool:
        """Its conversations are those of a file."""
        return self.turns == "recorded"

    @property
    def least_turns(self) -> int:
        """Turns that each conversation has at least."""
        if isinstance(self.turns, int):
            return self.turns
        return 1 if self.turns == "recorded" else self.turns.min or 1

    @property
    def whole_conversations(self) -> int | None:
        """Conversations of one pass; None where no number is given. A request without turns is one."""
        if self.conversations is not None or self.requests is None:
            return self.conversations
        return self.requests // self.turns if isinstance(self.turns, int) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSpec:
    """How the next token is chosen. Temperature 0 is greedy."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    temperature: Annotated[float, Ge(0)] = 0.0
    """0 is greedy; otherwise logits are divided by it."""
    top_k: Annotated[int, Ge(1)] | None = None
    """Keep the k most likely tokens."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Keep the smallest set of tokens whose probability reaches p."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the draws."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """One cell of a sweep: everything that defines what is measured, and nothing else."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    model: ModelSpec
    """Which model."""
    engine: EngineSpec = EngineSpec()
    """Which engine."""
    workload: WorkloadSpec = WorkloadSpec()
    """What is asked of it."""
    sampling: SamplingSpec = SamplingSpec()
    """How tokens are chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSpec:
    """Thresholds beyond which a window's energy is invalid, or flagged."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    min_coverage: Annotated[float, Gt(0), Le(1)] = 0.9
    """Share of the expected samples that must have arrived inside the window."""
    max_cross_check_rel: Annotated[float, Gt(0)] = 0.03
    """Largest relative disagreement of counter and averaged power, windows of 5 s and longer."""
    max_cross_check_rel_short: Annotated[float, Gt(0)] = 0.08
    """The same for windows of 1 to 5 s."""
    max_sent_rate_rel: Annotated[float, Gt(0)] = field(default=0.02, metadata=_ADDED)
    """Open loops: largest relative difference of the rate at which requests were sent from the one asked for."""
    min_rate_rel: Annotated[float, Gt(0), Le(1)] = field(default=0.9, metadata=_ADDED)
    """Open loops: share of the asked rate that answers must reach; below it the window is flagged."""
    max_drift_rel: Annotated[float, Gt(0)] = field(default=0.05, metadata=_ADDED)
    """Largest relative change of power or throughput from one half of a window to the other, where there is a trend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupSpec:
    """What runs before a window and is never part of it."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    batches: Annotated[int, Ge(0)] = 1
    """Batches run before each trial's window. Under an online load a batch is `concurrency` requests at once, 8 where the load
    names none."""
    min_s: Annotated[float, Ge(0)] = field(default=0.0, metadata=_ADDED)
    """Batches go on for at least so long, so that devices come up to temperature."""
    until_cv: Annotated[float, Gt(0)] | None = field(default=None, metadata=_ADDED)
    """Go on until step time and, where it is measured, the gang's power vary by at most this: standard deviation over mean of the
    last 5 batches' step times, and of the power of the last 5 stretches of whole batches of at least 0.5 s."""
    max_batches: Annotated[int, Ge(1)] = field(default=50, metadata=_ADDED)
    """Where `until_cv` gives up, and flags the trial; where power is looked at not before 2.5 s of it are known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSpec:
    """Which part of an online run is the measured window. The whole run is kept beside it."""

    __pydantic_config__: ClassVar[Any] = _STRICT

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

    __pydantic_config__: ClassVar[Any] = _STRICT

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

    __pydantic_config__: ClassVar[Any] = _STRICT

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
    window: WindowSpec = field(default=WindowSpec(), metadata=_ADDED)
    """Which part of an online run is measured."""
    edge_guard_s: Annotated[float, Ge(0)] | Literal["auto"] = "auto"
    """Quiet time on both sides of a window; `auto` is 3 counter ticks of the slowest leased device, 0 without a counter."""
    cooldown_s: Annotated[float, Ge(0)] = 0.0
    """Rest after each trial."""
    cooldown_until_c: Annotated[float, Gt(0)] | None = field(default=None, metadata=_ADDED)
    """Rest before each trial until no leased device is hotter than this, where temperatures can be read."""
    cooldown_limit_s: Annotated[float, Gt(0)] = field(default=300.0, metadata=_ADDED)
    """Where `cooldown_until_c` gives up; the trial then runs, and is flagged."""
    record_steps: bool = field(default=True, metadata=_ADDED)
    """Keep every step of a window in the table `steps`."""
    record_token_times: bool = field(default=True, metadata=_ADDED)
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
    slo: SloSpec = field(default=SloSpec(), metadata=_ADDED)
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

    __pydantic_config__: ClassVar[Any] = _STRICT

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

    __pydantic_config__: ClassVar[Any] = _STRICT

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


@dataclass(frozen=True, kw_only=True, slots=True)
class DroppedCell:
    """A cell of the grid that will not run."""

    settings: Mapping[str, Any]
    """The axis values that make the cell, by dotted key."""
    reason: str
    """Why: the exclude rule that matched, or the cell it equals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One experiment of a sweep with the axis values that made it."""

    cell_id: str
    """Hash of the resolved experiment without secrets (16 hex digits)."""
    experiment: Experiment
    settings: Mapping[str, Any]
    """Axis values by dotted key, for display; empty for a single experiment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What the user says trials cost, for the plan's estimate; each may be unknown."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    seconds_per_load: Annotated[float, Ge(0)] | None = None
    """Time to load a model."""
    watts_per_gpu: Annotated[float, Ge(0)] | None = None
    """Mean power of one leased GPU while the sweep runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A sweep file, resolved: defaults filled in, axes expanded, equal cells merged."""

    name: str
    schema_version: int
    cells: tuple[Cell, ...]
    dropped: tuple[DroppedCell, ...]
    repeats: int
    order: Order
    seed: int
    measure: MeasureSpec
    rates: Rates = Rates()
    stopping: StoppingSpec = StoppingSpec()
    footprint: FootprintSpec = FootprintSpec()
    base_dir: str = "."
    """Folder that relative paths of the sweep file start from."""
