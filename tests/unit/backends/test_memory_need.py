"""What a load group needs, against arithmetic done by hand."""

import model_configs as models
import pytest

from llem_ray.backends.checkpoint_files import StoredWeights
from llem_ray.backends.memory_need import MemoryNeed, estimate_need, require_fit
from llem_ray.backends.model_shape import read_shape
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import DeviceMemoryError
from llem_ray.core.spec import EngineSpec, Experiment, ModelSpec
from llem_ray.core.workload_spec import WorkloadSpec

GB = 10**9
H100 = 85_520_809_984
"""What NVML shows of an H100 with 80 GB."""


def need_of(
    config: dict,
    *workloads: WorkloadSpec,
    stored: StoredWeights | None = None,
    model: ModelSpec | None = None,
    on_gpu: bool = True,
    unquantised: bool = True,
    **engine: object,
) -> MemoryNeed:
    shape = read_shape(config)
    assert shape is not None
    spec = EngineSpec(**({"backend": "transformers"} | engine))
    cells = [Experiment(model=model or ModelSpec(id="m"), engine=spec, workload=work) for work in workloads or (WorkloadSpec(),)]
    return estimate_need(config, shape, stored, cells, on_gpu=on_gpu, random=False, unquantised=unquantised)


def part(need: MemoryNeed, name: str) -> tuple[int, int | None]:
    found = next(part for part in need.parts if part.name == name)
    return found.lower_bytes, found.estimate_bytes


def test_weights_and_cache_by_hand() -> None:
    work = WorkloadSpec(input_tokens=1000, output_tokens=25, batch_size=16)
    need = need_of(models.LLAMA_3_8B, work)
    assert part(need, "weights") == (16_060_522_496, 16_060_522_496)
    # The last of 25 tokens is never fed back: 1024 tokens x 16 rows x 131,072 B.
    assert part(need, "KV cache") == (2_147_483_648, 2_147_483_648)
    assert need.lower_bytes == 16_060_522_496 + 2_147_483_648
    assert need.estimate_bytes is not None
    assert need.estimate_bytes > need.lower_bytes + 500_000_000
    assert need.refusal(H100) is None
    assert need.doubt(H100) is None


def test_llama_70b_does_not_fit_on_one_h100_but_on_two() -> None:
    work = WorkloadSpec(input_tokens=128, output_tokens=1)
    refusal = need_of(models.LLAMA_3_70B, work).refusal(H100)
    assert refusal is not None
    for told in (
        "needs at least 141 GB on each GPU, which has 85.5 GB",
        "70,553,706,496 parameters x 2 B = 141 GB",
        "2 x 80 layers x 8 heads x 128 x 128 tokens x 1 sequence x 2 B = 41.9 MB",
        "not counted: activations and logits, CUDA context",
    ):
        assert told in refusal
    two = need_of(models.LLAMA_3_70B, work, tensor_parallel=2)
    assert part(two, "weights")[0] == 70_553_706_496
    assert part(two, "KV cache")[0] == 2 * 80 * 4 * 128 * 128 * 2
    assert two.refusal(H100) is None
    assert part(need_of(models.LLAMA_3_70B, work, pipeline_parallel=4), "weights")[0] == 70_553_706_496 // 2
    assert part(need_of(models.LLAMA_3_70B, work, data_parallel=2), "weights")[0] == 141_107_412_992


def test_the_bound_is_exact_to_the_byte() -> None:
    need = need_of(models.MIXTRAL_8X7B, WorkloadSpec(input_tokens=1, output_tokens=1))
    assert need.lower_bytes == 46_702_792_704 * 2 + 131_072
    assert need.refusal(need.lower_bytes) is None
    assert need.refusal(need.lower_bytes - 1) is not None


def test_the_smallest_cell_bounds_and_the_largest_doubts() -> None:
    small, large = (
        WorkloadSpec(input_tokens=10, output_tokens=1),
        WorkloadSpec(input_tokens=8000, output_tokens=1, batch_size=128),
    )
    need = need_of(models.LLAMA_3_8B, large, small)
    assert part(need, "KV cache") == (131_072 * 10, 131_072 * 8000 * 128)
    assert need.refusal(H100) is None
    doubt = need.doubt(H100)
    assert doubt is not None
    assert "of the smallest cell 10 tokens x 1 sequence = 1.31 MB" in doubt


def test_fewer_requests_than_a_batch_and_replicas_that_share_it() -> None:
    work = WorkloadSpec(input_tokens=10, output_tokens=1, batch_size=64, requests=6)
    assert part(need_of(models.LLAMA_3_8B, work), "KV cache")[0] == 131_072 * 10 * 6
    assert part(need_of(models.LLAMA_3_8B, work, data_parallel=4), "KV cache")[0] == 131_072 * 10 * 2
    talks = WorkloadSpec(input_tokens=10, output_tokens=1, batch_size=64, turns=2, conversations=6)
    assert part(need_of(models.LLAMA_3_8B, talks), "KV cache")[0] == 131_072 * 10 * 6
    # Lengths that are not known, or may end early, count as one token.
    assert part(need_of(models.LLAMA_3_8B, WorkloadSpec(ignore_eos=False)), "KV cache")[0] == 131_072


def test_vllm_keeps_to_its_share_and_holds_one_sequence() -> None:
    work = WorkloadSpec(input_tokens=100, output_tokens=1, batch_size=64)
    need = need_of(models.LLAMA_3_8B, work, backend="vllm")
    assert need.share == 0.92
    assert part(need, "KV cache") == (131_072 * 100, 131_072 * 8192)
    named = {"max_model_len": 4096, "gpu_memory_utilization": 0.5}
    bounded = need_of(models.LLAMA_3_8B, work, backend="vllm", engine_args=named)
    assert part(bounded, "KV cache") == (131_072 * 4096, 131_072 * 4096)
    refusal = bounded.refusal(32 * GB)
    assert refusal is not None
    assert "0.5 x 32 GB = 16 GB for the engine" in refusal
    assert bounded.refusal(34 * GB) is None
    assert need_of(models.LLAMA_3_8B, backend="vllm", engine_args={"kv_cache_memory_bytes": 1}).share == 1.0
    half = need_of(models.LLAMA_3_8B, work, backend="vllm", engine_args=named | {"kv_cache_dtype": "fp8_e4m3"})
    assert part(half, "KV cache")[0] == 131_072 * 4096 // 2


@pytest.mark.parametrize(
    ("backend", "args"),
    [
        ("vllm", {"cpu_offload_gb": 100}),
        ("vllm", {"hf_overrides": {"num_hidden_layers": 2}}),
        ("vllm", {"quantization_config": {"linear": "fp8_per_tensor"}}),
        ("vllm", {"model_weights": "s3://elsewhere"}),
        ("transformers", {"device_map": "auto"}),
        ("tensorrt", {"model_kwargs": {"num_hidden_layers": 2}}),
    ],
)
def test_nothing_is_refused_where_weights_may_be_elsewhere(backend: str, args: dict) -> None:
    need = need_of(models.LLAMA_3_70B, backend=backend, engine_args=args)
    assert need.lower_bytes == 0
    assert need.refusal(1) is None
    assert need.doubt(H100) is not None


def test_quantised_weights() -> None:
    count = 8_030_261_248
    awq = need_of(models.LLAMA_3_8B, model=ModelSpec(id="m", quantization="awq"), backend="vllm")
    assert part(awq, "weights")[0] == count // 2
    eight = need_of(models.LLAMA_3_8B, model=ModelSpec(id="m", quantization="bitsandbytes-8bit"))
    assert part(eight, "weights")[0] == count
    unknown = need_of(models.LLAMA_3_8B, model=ModelSpec(id="m", quantization="of-tomorrow"), backend="vllm")
    assert part(unknown, "weights") == (0, None)
    assert unknown.estimate_bytes is None
    gptq = need_of(models.LLAMA_3_8B | {"quantization_config": {"quant_method": "gptq", "bits": 3}}, backend="vllm")
    assert part(gptq, "weights")[0] == count * 3 // 8
    packed = StoredWeights(float_numbers=10, float_bytes=40, packed_bytes=1000)
    stored = need_of(models.LLAMA_3_8B | {"quantization_config": {"quant_method": "gptq"}}, stored=packed, backend="vllm")
    assert part(stored, "weights")[0] == 1020
    deepseek = need_of(models.DEEPSEEK_V3, backend="vllm", tensor_parallel=8)
    assert part(deepseek, "weights")[0] == 671_026_404_352 // 8
    # The latent is on every rank, in 8 bits at least: 61 x 576 x 32 tokens.
    assert part(deepseek, "KV cache")[0] == 61 * 576 * 32


def test_a_checkpoint_that_may_be_quantised_has_no_bound_until_its_files_are_known() -> None:
    unseen = need_of(models.LLAMA_3_70B, backend="vllm", unquantised=False)
    assert part(unseen, "weights") == (0, 141_107_412_992)
    assert "unless the checkpoint is quantised" in (unseen.doubt(H100) or "")
    assert need_of(models.LLAMA_3_70B, unquantised=False).refusal(H100) is not None
    packed = StoredWeights(float_numbers=10**9, float_bytes=2 * 10**9, packed_bytes=35 * GB)
    seen = need_of(models.LLAMA_3_70B, stored=packed, backend="vllm", unquantised=False)
    assert part(seen, "weights") == (37 * GB, 37 * GB)
    plain = StoredWeights(float_numbers=70_553_706_496, float_bytes=141_107_412_992, packed_bytes=0)
    assert need_of(models.LLAMA_3_70B, stored=plain, backend="vllm", unquantised=False).refusal(H100) is not None


def test_an_unknown_architecture_is_bounded_by_its_checkpoint_alone() -> None:
    config = models.LLAMA_3_8B | {"model_type": "of-tomorrow"}
    assert need_of(config).lower_bytes == 0
    assert need_of(config).estimate_bytes is None
    need = need_of(config, stored=StoredWeights(float_numbers=10**9, float_bytes=4 * 10**9, packed_bytes=0))
    assert need.lower_bytes == 2 * 10**9
    assert "a guess for of-tomorrow" in need.arithmetic


def test_the_memory_of_a_host_holds_all_replicas() -> None:
    model = ModelSpec(id="m", dtype="float32")
    need = need_of(models.LLAMA_3_8B, model=model, on_gpu=False, tensor_parallel=2, data_parallel=2)
    assert need.device == "host"
    assert part(need, "weights")[0] == 2 * 4 * 8_030_261_248
    assert "CUDA" not in need.arithmetic
    spread = need_of(models.LLAMA_3_8B, model=model, on_gpu=False, data_parallel=2, nodes=2)
    assert part(spread, "weights")[0] == 4 * 8_030_261_248


def test_an_engine_refuses_what_it_is_about_to_load() -> None:
    config = BackendConfig(
        model=ModelSpec(id="org/large"), engine=EngineSpec(), device="cuda", host="h", base_dir=".", cache_dir="."
    )
    require_fit(config, models.LLAMA_3_8B, H100, random=False)
    with pytest.raises(DeviceMemoryError, match=r"org/large needs at least 141 GB on each GPU, which has 85\.5 GB"):
        require_fit(config, models.LLAMA_3_70B, H100, random=False)
    require_fit(config, {"model_type": "of-tomorrow"}, 1, random=False)
