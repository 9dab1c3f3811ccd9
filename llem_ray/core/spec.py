"""What is measured: the words of a sweep file, validated by ``config`` and planned by ``planning``.

These dataclasses are the single definition of the sweep file's fields: ``config`` validates straight into them and the
JSON Schema and the reference page come from their annotations and docstrings. They import nothing heavy, so an engine in
another interpreter can use them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from llem_ray.core.measure_spec import FootprintSpec, MeasureSpec, StoppingSpec
from llem_ray.core.spec_fields import STRICT, Ge, Gt, Le
from llem_ray.core.workload_spec import WorkloadSpec

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Order = Literal["interleaved", "shuffled", "sequential"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Which model, and with which weights. Exactly one of ``id`` and ``config``."""

    __pydantic_config__: ClassVar[Any] = STRICT

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

    __pydantic_config__: ClassVar[Any] = STRICT

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
class SamplingSpec:
    """How the next token is chosen. Temperature 0 is greedy."""

    __pydantic_config__: ClassVar[Any] = STRICT

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

    __pydantic_config__: ClassVar[Any] = STRICT

    model: ModelSpec
    """Which model."""
    engine: EngineSpec = EngineSpec()
    """Which engine."""
    workload: WorkloadSpec = WorkloadSpec()
    """What is asked of it."""
    sampling: SamplingSpec = SamplingSpec()
    """How tokens are chosen."""


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

    __pydantic_config__: ClassVar[Any] = STRICT

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
