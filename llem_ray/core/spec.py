"""What is measured: the words of a sweep file, validated by ``config`` and planned by ``planning``.

These dataclasses are the single definition of the sweep file's fields: ``config`` validates straight into them and the
JSON Schema and the reference page come from their annotations and docstrings. They import nothing heavy, so an engine in
another interpreter can use them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

try:
    from annotated_types import Ge, Gt, Le, Lt, MinLen
except ModuleNotFoundError:  # an engine's own interpreter: bounds were checked where the sweep file was read
    Ge = Gt = Le = Lt = MinLen = lambda bound: bound  # type: ignore[assignment, misc, return-value]

_STRICT: Mapping[str, Any] = {"extra": "forbid", "use_attribute_docstrings": True}

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Order = Literal["interleaved", "shuffled", "sequential"]
Exclusive = Literal["node", "cluster", "none"]


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

    source: Literal["builtin", "file", "synthetic"] = "builtin"
    """`builtin` is the set shipped with llem-ray; `file` reads JSON Lines; `synthetic` draws random token ids."""
    path: str | None = None
    """JSON Lines file (`source: file`), relative to the sweep file. Each line an object, or a string."""
    column: str = "prompt"
    """Key of the prompt text in each line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadSpec:
    """What is asked of the engine in one window."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    prompts: PromptSpec = PromptSpec()
    """Where prompts come from."""
    input_tokens: Annotated[int, Ge(1)] | None = None
    """Exact prompt length in tokens: longer prompts are cut, shorter ones continued with the next. None keeps natural lengths."""
    output_tokens: Annotated[int, Ge(1)] = 32
    """Tokens to generate for each request."""
    batch_size: Annotated[int, Ge(1)] = 1
    """Requests that run together."""
    requests: Annotated[int, Ge(1)] | None = None
    """Distinct requests of one pass; default: one batch. The pass is repeated until `measure.min_window_s` is reached."""
    ignore_eos: bool = True
    """Generate exactly `output_tokens`, whatever the model says: rows stay comparable."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the choice and order of prompts."""


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
    """Thresholds beyond which a window's energy is invalid."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    min_coverage: Annotated[float, Gt(0), Le(1)] = 0.9
    """Share of the expected samples that must have arrived inside the window."""
    max_cross_check_rel: Annotated[float, Gt(0)] = 0.03
    """Largest relative disagreement of counter and averaged power, windows of 5 s and longer."""
    max_cross_check_rel_short: Annotated[float, Gt(0)] = 0.08
    """The same for windows of 1 to 5 s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupSpec:
    """What runs before a window and is never part of it."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    batches: Annotated[int, Ge(0)] = 1
    """Batches run before each trial's window."""


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
    """A batch is repeated until the window is at least this long."""
    edge_guard_s: Annotated[float, Ge(0)] | Literal["auto"] = "auto"
    """Quiet time on both sides of a window; `auto` is 3 counter ticks of the slowest leased device, 0 without a counter."""
    cooldown_s: Annotated[float, Ge(0)] = 0.0
    """Rest after each trial."""
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
    """When a window's energy is invalid."""


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
    base_dir: str = "."
    """Folder that relative paths of the sweep file start from."""
