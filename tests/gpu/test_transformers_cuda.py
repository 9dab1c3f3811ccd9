"""The transformers engine on an NVIDIA GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.core.backend import BackendConfig, LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.errors import DeviceMemoryError
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec

torch = pytest.importorskip("torch", reason="torch is not installed")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

os.environ["HF_HUB_OFFLINE"] = "1"


def backend_of(
    folder: Path, dtype: Any = "auto", quantization: str | None = None, serving: bool = False, **args: Any
) -> TransformersBackend:
    model = ModelSpec(config="llama-10m", initializer_range=0.1, dtype=dtype, quantization=quantization)
    return TransformersBackend(
        BackendConfig(
            model=model,
            engine=EngineSpec(engine_args=args),
            device="cuda",
            host="h",
            base_dir=str(folder),
            cache_dir=str(folder / "cache"),
            online=serving,
        )
    )


def outputs_of(backend: TransformersBackend, schedule: LoadSchedule | None = None) -> dict[str, tuple[int, ...]]:
    events = backend.run(requests_of([7, 5, 30], 16), SamplingSpec(), schedule)
    return {event.request_id: event.output_token_ids for event in events if isinstance(event, RequestRecord)}


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersBackend]:
    loaded = backend_of(tmp_path_factory.mktemp("cuda"), "float32")
    loaded.load()
    yield loaded
    loaded.close()


def requests_of(lengths: list[int], new_tokens: int) -> list[Request]:
    return [
        Request(request_id=str(row), prompt_token_ids=tuple(range(10 + row, 10 + row + length)), max_new_tokens=new_tokens)
        for row, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [3, 40, 12]], ids=str)
def test_greedy_tokens_equal_generate(backend: TransformersBackend, lengths: list[int]) -> None:
    requests = requests_of(lengths, 32)
    records = [event for event in backend.run(requests, SamplingSpec()) if isinstance(event, RequestRecord)]
    padded = max(lengths)
    rows = [[0] * (padded - len(r.prompt_token_ids)) + list(r.prompt_token_ids) for r in requests]
    mask = [[0] * (padded - length) + [1] * length for length in lengths]
    model = backend._engine._model  # type: ignore[union-attr]
    expected = model.generate(
        torch.tensor(rows, device="cuda"),
        attention_mask=torch.tensor(mask, device="cuda"),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert [list(record.output_token_ids) for record in records] == expected[:, padded:].tolist()


def test_step_times_cover_the_work_of_the_device(backend: TransformersBackend) -> None:
    requests = requests_of([64] * 8, 16)
    list(backend.run(requests, SamplingSpec()))
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    steps = [event for event in backend.run(requests, SamplingSpec()) if isinstance(event, StepEvent)]
    end.record()
    torch.cuda.synchronize()
    told_s = sum(step.end_ns - step.begin_ns for step in steps) / 1e9
    assert told_s == pytest.approx(begin.elapsed_time(end) / 1e3, rel=0.1)


def test_uuid_is_that_of_nvml(backend: TransformersBackend) -> None:
    pynvml = pytest.importorskip("pynvml")
    (rank,) = backend.identity()
    assert re.fullmatch(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", str(rank.gpu_uuid))
    pynvml.nvmlInit()
    try:
        uuids = [pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()
    assert rank.gpu_uuid in uuids


def test_batch_beyond_the_memory_fails_and_the_next_works(backend: TransformersBackend) -> None:
    rows = int(torch.cuda.get_device_properties(0).total_memory / (2 * 10 * 4 * 32 * 4 * 4000)) * 2
    with pytest.raises(DeviceMemoryError, match="KV cache"):
        list(backend.run([*requests_of([2000], 2000)] * rows, SamplingSpec()))
    records = [event for event in backend.run(requests_of([4], 3), SamplingSpec()) if isinstance(event, RequestRecord)]
    assert records[0].output_tokens == 3


def test_close_gives_the_memory_back(tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated()
    backend = backend_of(tmp_path)
    assert backend.load().dtype == "bfloat16"
    assert torch.cuda.memory_allocated() > before
    list(backend.run(requests_of([4], 3), SamplingSpec()))
    backend.close()
    assert torch.cuda.memory_allocated() == before


def test_continuous_batching_chooses_the_tokens_of_a_batch(tmp_path: Path) -> None:
    backend = backend_of(tmp_path, "float32", serving=True, online={"num_blocks": 64, "max_batch_tokens": 256})
    backend.load()
    try:
        online = outputs_of(backend, LoadSchedule(max_in_flight=2))
        assert online == outputs_of(backend)
    finally:
        backend.close()


@pytest.mark.parametrize("args", [{"cache_implementation": "static"}, {"compile": {"mode": "reduce-overhead"}}], ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_fixed_caches_and_compiled_steps_change_no_token(
    backend: TransformersBackend, tmp_path: Path, args: dict[str, Any]
) -> None:
    other = backend_of(tmp_path, "float32", **args)
    other.load()
    try:
        outputs_of(other)
        assert outputs_of(other) == outputs_of(backend)
    finally:
        other.close()


@pytest.mark.parametrize("quantization", ["bitsandbytes-8bit", "bitsandbytes-4bit"])
def test_quantised_weights_are_smaller(tmp_path: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    backend = backend_of(tmp_path, "float16", quantization)
    report = backend.load()
    try:
        assert report.weight_bytes is not None
        assert report.weight_bytes < 0.9 * 2 * 9_966_848
        assert all(len(tokens) == 16 for tokens in outputs_of(backend).values())
    finally:
        backend.close()


def test_a_device_map_uses_every_gpu(tmp_path: Path) -> None:
    backend = backend_of(tmp_path, "float32", device_map="balanced")
    backend.load()
    try:
        ranks = backend.identity()
        assert len({rank.gpu_uuid for rank in ranks}) == torch.cuda.device_count()
        assert all(len(tokens) == 16 for tokens in outputs_of(backend).values())
    finally:
        backend.close()
