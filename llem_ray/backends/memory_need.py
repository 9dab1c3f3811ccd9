"""How much memory a load group needs on each device, from its model's config and before anything is loaded.

A refusal rests on a lower bound against all the memory the device has: what would fit is never refused. The estimate beside
it counts what is not certain, too, and is good for a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Final, Literal

from llem_ray.backends.batch_memory import batch_memory, size_text
from llem_ray.backends.checkpoint_files import StoredWeights
from llem_ray.backends.model_shape import ModelShape, read_shape
from llem_ray.backends.quantized_bits import weight_bits
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import DeviceMemoryError
from llem_ray.core.spec import Experiment, ModelSpec
from llem_ray.core.workload_spec import WorkloadSpec

ENGINES: Final = ("transformers", "vllm", "tensorrt")
"""Engines whose use of memory is known here."""

CUDA_CONTEXT_BYTES: Final = 500_000_000
"""What a process takes of a GPU before it allocates anything; 0.3 to 0.6 GB on recent drivers."""
VLLM_SHARE: Final = 0.92
"""Default of vLLM 0.32's `gpu_memory_utilization`."""
STEP_TOKENS: Final = 8192
"""Tokens that a scheduler computes in one step at most, where `max_num_batched_tokens` or `max_num_tokens` does not say."""

_DTYPE_BYTES: Final[Mapping[str, int]] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "half": 2, "float": 4}
_UNCLEAR_ARGUMENTS: Final = (
    "offload",
    "device_map",
    "hf_overrides",
    "hf_config_path",
    "model_kwargs",
    "model_weights",
    "model_class_overrides",
    "quantization_config",
    "context_parallel",
)
"""Parts of the names of arguments that move weights or the cache elsewhere, or change the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedPart:
    """One term of the need."""

    name: str
    lower_bytes: int
    """Certainly needed; 0 where nothing is certain."""
    estimate_bytes: int | None
    """None where nothing is known."""
    arithmetic: str
    """The term with its factors, and what it rests on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeed:
    """What one device of a gang must hold: a GPU, or the memory of a host."""

    device: Literal["GPU", "host"]
    share: float
    """Part of the device's memory that the engine takes."""
    parts: tuple[NeedPart, ...]

    @property
    def lower_bytes(self) -> int:
        """What is needed at least."""
        return sum(part.lower_bytes for part in self.parts)

    @property
    def estimate_bytes(self) -> int | None:
        """What is probably needed; None where a part is unknown."""
        known = [part.estimate_bytes for part in self.parts if part.estimate_bytes is not None]
        return sum(known) if len(known) == len(self.parts) else None

    @property
    def arithmetic(self) -> str:
        """All terms."""
        return "; ".join(f"{part.name}: {part.arithmetic}" for part in self.parts)

    def refusal(self, memory_bytes: int) -> str | None:
        """Why it cannot fit on a device of so much memory; None where it may."""
        if self.lower_bytes <= self.share * memory_bytes:
            return None
        certain = [part for part in self.parts if part.lower_bytes]
        terms = " + ".join(f"{part.name} at least {size_text(part.lower_bytes)} ({part.arithmetic})" for part in certain)
        left_out = ", ".join(part.name for part in self.parts if not part.lower_bytes)
        return (
            f"needs at least {size_text(self.lower_bytes)} on each {self.device}, which has {self._limit(memory_bytes)}: {terms}"
            + (f"; not counted: {left_out}" if left_out else "")
        )

    def remedy(self, hosts: int = 1) -> str:
        """What to do about a refusal.

        Args:
            hosts: How many the gang may be spread over. Ranks on one host share its memory, so more of them help nothing there.
        """
        if self.device == "GPU":
            return "raise engine.tensor_parallel or engine.pipeline_parallel, take a smaller dtype or a quantised checkpoint"
        spread = " spread it over more hosts by engine.nodes," if hosts > 1 else ""
        return f"take a smaller model.dtype or a quantised checkpoint,{spread} or run it where there is more memory"

    def doubt(self, memory_bytes: int) -> str | None:
        """Why it may not fit; None where it should, where it cannot, or where nothing is known."""
        estimate = self.estimate_bytes
        if estimate is None or estimate <= self.share * memory_bytes or self.refusal(memory_bytes) is not None:
            return None
        return (
            f"may not fit: about {size_text(estimate)} on each {self.device}, which has {self._limit(memory_bytes)}: "
            f"{self.arithmetic}"
        )

    def _limit(self, memory_bytes: int) -> str:
        if self.share == 1.0:
            return size_text(memory_bytes)
        return f"{self.share:g} x {size_text(memory_bytes)} = {size_text(self.share * memory_bytes)} for the engine"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        parts = [
            {"name": part.name, "lower_bytes": part.lower_bytes, "estimate_bytes": part.estimate_bytes, "why": part.arithmetic}
            for part in self.parts
        ]
        return {
            "device": self.device,
            "share": self.share,
            "lower_bytes": self.lower_bytes,
            "estimate_bytes": self.estimate_bytes,
            "parts": parts,
        }


def estimate_need(
    config: Mapping[str, Any],
    shape: ModelShape,
    stored: StoredWeights | None,
    experiments: Sequence[Experiment],
    *,
    on_gpu: bool,
    random: bool,
    unquantised: bool = False,
) -> MemoryNeed:
    """The need of a load group on each of its devices.

    Tensor and pipeline parallel ranks share weights and cache; that they share them evenly is the lower bound for the fullest
    rank. On the CPU the ranks of a host are added up.

    Args:
        config: The model's config.json.
        shape: Read from it.
        stored: What its checkpoint holds; None where that is not known, or where weights are random.
        experiments: Those of the group; they agree in model and engine.
        on_gpu: The gang runs on GPUs.
        random: Weights are drawn, not read.
        unquantised: A checkpoint without a word on quantisation in its config has none elsewhere either. Where neither that nor
            the checkpoint is known, its weights have no lower bound: vLLM and TensorRT-LLM read `hf_quant_config.json`, too.
    """
    certain = unquantised or random or experiments[0].engine.backend == "transformers"
    group = _Group(config, shape, stored, tuple(experiments), on_gpu, random, certain)
    parts = [group.weights(), group.cache(), group.activations()]
    if on_gpu:
        text = f"about {size_text(CUDA_CONTEXT_BYTES)}"
        parts.append(NeedPart(name="CUDA context", lower_bytes=0, estimate_bytes=CUDA_CONTEXT_BYTES, arithmetic=text))
    return MemoryNeed(device="GPU" if on_gpu else "host", share=group.share, parts=tuple(parts))


def require_fit(config: BackendConfig, values: Mapping[str, Any], memory_bytes: int, *, random: bool) -> None:
    """Refuse a model that cannot fit, where its engine has read the config and loads the weights next.

    Not to be asked for a checkpoint that is quantised by anything but the config's word.

    Args:
        config: Of the engine.
        values: The model's config.json.
        memory_bytes: Of the device, all of it.
        random: Weights are drawn, not read.

    Raises:
        DeviceMemoryError: It cannot fit; the message shows the arithmetic.
    """
    shape = read_shape(values)
    if shape is None:
        return
    experiment = Experiment(model=config.model, engine=config.engine, workload=WorkloadSpec(input_tokens=1, output_tokens=1))
    on_gpu = config.device == "cuda"
    need = estimate_need(values, shape, None, [experiment], on_gpu=on_gpu, random=random, unquantised=True)
    if reason := need.refusal(memory_bytes):
        raise DeviceMemoryError(f"{model_name(config.model)} {reason}", need.remedy())


def model_name(model: ModelSpec) -> str:
    """For messages."""
    return str(model.id or model.config)


def element_bytes(config: Mapping[str, Any], model: ModelSpec, *, on_gpu: bool, random: bool) -> int | None:
    """Size of a weight by the rule of ``ModelSpec.dtype``; None where nothing names a number format."""
    if model.dtype != "auto":
        return _DTYPE_BYTES[model.dtype]
    if random:
        return 2 if on_gpu else 4
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, Mapping) else {}):
        for name in ("dtype", "torch_dtype"):
            named = str(values.get(name)).removeprefix("torch.")
            if named in _DTYPE_BYTES:
                return _DTYPE_BYTES[named]
    return None


@dataclass(frozen=True, slots=True)
class _Group:
    config: Mapping[str, Any]
    shape: ModelShape
    stored: StoredWeights | None
    experiments: tuple[Experiment, ...]
    on_gpu: bool
    random: bool
    unquantised: bool

    @property
    def share(self) -> float:
        """All of the device; vLLM keeps to a part of a GPU, unless the size of its cache is given."""
        args = self._args
        if self._backend != "vllm" or not self.on_gpu or args.get("kv_cache_memory_bytes") is not None:
            return 1.0
        named = args.get("gpu_memory_utilization", VLLM_SHARE)
        return float(named) if isinstance(named, int | float) and 0 < named <= 1 else 1.0

    @property
    def _backend(self) -> str:
        return self.experiments[0].engine.backend

    @property
    def _args(self) -> Mapping[str, Any]:
        return self.experiments[0].engine.engine_args

    @property
    def _unclear(self) -> str | None:
        named = [name for name in self._args if any(part in name for part in _UNCLEAR_ARGUMENTS)]
        return ", ".join(named) or None

    @property
    def _element_bytes(self) -> int | None:
        model = self.experiments[0].model
        return element_bytes(self.config, model, on_gpu=self.on_gpu, random=self.random)

    @property
    def _parts(self) -> tuple[float, str]:
        """Into how many parts a device's share of the model is one, and in words."""
        engine = self.experiments[0].engine
        if not self.on_gpu:
            per_host = engine.data_parallel / (engine.nodes or 1)
            return 1 / per_host, "" if per_host == 1 else f" x {engine.data_parallel} replicas / {engine.nodes or 1} hosts"
        ranks = engine.tensor_parallel * engine.pipeline_parallel
        return ranks, f" / {ranks} GPUs" if ranks > 1 else ""

    def weights(self) -> NeedPart:
        """Weights of one device."""
        total, exact, text = self._all_weights()
        parts, share = self._parts
        if total is None:
            return NeedPart(name="weights", lower_bytes=0, estimate_bytes=None, arithmetic=text)
        estimate = ceil(total / parts)
        lower = estimate if exact else 0
        if self._unclear is not None:
            lower, text = 0, f"{text}, no bound with {self._unclear}"
        return NeedPart(
            name="weights", lower_bytes=lower, estimate_bytes=estimate, arithmetic=f"{text}{share} = {size_text(estimate)}"
        )

    def _all_weights(self) -> tuple[int | None, bool, str]:
        """Bytes of all weights, whether that is a bound, and how they come about."""
        size, count = self._element_bytes, self.shape.parameters
        method, bits = weight_bits(self.config, self.experiments[0].model)
        if method is not None and (self.stored is None or not self.stored.packed_bytes):
            return self._quantised_weights(method, bits)
        if self.stored is not None and (size is None or count is None or self.stored.packed_bytes):
            stored = self.stored.loaded_bytes(size)
            return stored, True, f"{size_text(stored)} in the checkpoint's tensors"
        if count is None:
            return None, False, f"not known for {self.shape.model_type} before it is loaded"
        if size is None:
            return 2 * count, False, f"{count:,} parameters x 2 B (nothing names their format)"
        if size == 4 and self._backend == "tensorrt":
            size = 2  # it computes in 16 bits at most
        certain = self.unquantised or self.stored is not None
        return (
            count * size,
            certain,
            f"{count:,} parameters x {size} B{'' if certain else ', unless the checkpoint is quantised'}",
        )

    def _quantised_weights(self, method: str, bits: int | None) -> tuple[int | None, bool, str]:
        count = self.shape.parameters
        if bits is None or count is None:
            return None, False, f"not known for {f'quantisation {method}' if bits is None else self.shape.model_type}"
        return count * bits // 8, True, f"{count:,} parameters x {bits} bit ({method}; scales and wider layers not counted)"

    def cache(self) -> NeedPart:
        """KV cache of one device: at least the smallest cell's, or one sequence; likely the largest's."""
        engine = self.experiments[0].engine
        size, exact = self._cache_bytes()
        cells = [self._sequences(experiment) for experiment in self.experiments]
        cells.sort(key=lambda cell: cell[0] * self.shape.cache_numbers(cell[1]))
        smallest, largest = cells[0], cells[-1]
        if self._backend == "vllm":  # it refuses to start unless one sequence of the whole context fits
            longest = self._args.get("max_model_len")
            if isinstance(longest, int) and longest > 0:
                smallest = largest = (1, longest)
            elif longest is None and self.shape.context_tokens:
                largest = (1, max(largest[1], self.shape.context_tokens))
        ranks = engine.tensor_parallel if self.on_gpu else 1
        stages = engine.pipeline_parallel if self.on_gpu else 1
        lower, estimate = (
            ceil(rows * self.shape.cache_numbers(tokens, ranks) * size / stages) for rows, tokens in (smallest, largest)
        )
        terms = self.shape.cache_terms(largest[1], ranks)
        terms = f"({terms})" if " + " in terms else terms
        stage = f" / {stages} stages" if stages > 1 else ""
        text = f"{terms} x {_counted(largest[0], 'sequence')} x {size:g} B{stage} = {size_text(estimate)}"
        if smallest != largest:
            text += f", of the smallest cell {smallest[1]} tokens x {_counted(smallest[0], 'sequence')} = {size_text(lower)}"
        if self.shape.parameters is None:
            text += f", a guess for {self.shape.model_type}"
        known = exact and self.shape.parameters is not None and self._unclear is None
        return NeedPart(name="KV cache", lower_bytes=lower if known else 0, estimate_bytes=estimate, arithmetic=text)

    def _sequences(self, experiment: Experiment) -> tuple[int, int]:
        """Sequences that are in the cache together, and tokens that each keeps: the last one is not fed back."""
        workload = experiment.workload
        tokens = _fixed(workload.input_tokens) + (_fixed(workload.output_tokens) - 1 if workload.ignore_eos else 0)
        if workload.load.pattern == "trace":
            tokens = 1  # the trace tells the lengths
        if self._backend != "transformers" or workload.load.pattern != "batch":
            return 1, tokens  # a scheduler lets the others wait
        rows = min(workload.batch_size, workload.whole_conversations or workload.batch_size)
        return ceil(rows / experiment.engine.data_parallel), tokens

    def _cache_bytes(self) -> tuple[float, bool]:
        """Size of a number in the cache, and whether that is a bound."""
        size = self._element_bytes or 2
        packed = self.stored is not None and self.stored.packed_bytes > 0
        if packed or weight_bits(self.config, self.experiments[0].model)[0] is not None:
            return min(size, 1), True  # a quantised checkpoint may ask for an 8-bit cache
        if not self.unquantised and self.stored is None:
            return size, False
        named = self._args.get("kv_cache_dtype", "auto")
        inner = self._args.get("kv_cache_config")
        if self._backend == "tensorrt" and isinstance(inner, Mapping):
            named = inner.get("dtype", "auto")
        if named == "auto":
            return min(size, 2) if self._backend == "tensorrt" else size, self._element_bytes is not None
        if named in _DTYPE_BYTES:
            return _DTYPE_BYTES[named], True
        return 1, str(named).startswith("fp8")

    def activations(self) -> NeedPart:
        """Intermediate results of one step: nothing is certain, for kernels differ."""
        size = self._element_bytes or 2
        sizes = []
        for experiment in self.experiments:
            rows, tokens = self._sequences(experiment)
            prompt = _fixed(experiment.workload.input_tokens)
            if self._backend != "transformers":
                limit = self._args.get("max_num_batched_tokens", self._args.get("max_num_tokens", STEP_TOKENS))
                rows, prompt = 1, limit if isinstance(limit, int) else STEP_TOKENS
            batch = batch_memory(
                self.shape, rows=rows, prompt_tokens=prompt, new_tokens=max(1, tokens - prompt), element_bytes=size, eager=False
            )
            sizes.append(batch.activation_bytes + batch.logits_bytes)
        text = f"about {size_text(max(sizes))} of the widest step"
        return NeedPart(name="activations and logits", lower_bytes=0, estimate_bytes=max(sizes), arithmetic=text)


def _fixed(tokens: Any) -> int:
    """A length that is the same for all requests; 1 where it is not."""
    return tokens if isinstance(tokens, int) else 1


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
