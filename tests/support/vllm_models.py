"""What the tests of the vllm engine share: a small configuration, prompts, a way to serve them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from llem_ray.core.backend import BackendConfig, InferenceBackend, LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec

SMALL = {"max_num_seqs": 4, "max_model_len": 256}
PROMPTS = [tuple(3 + (41 * row + 13 * column) % 2000 for column in range(length)) for row, length in enumerate((24, 5, 60))]
NEW_TOKENS = 64

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 128, 352, 4, 4, 2, 32, 2048
MATMUL = LAYERS * (2 * HIDDEN * HEADS * HEAD_DIM + 2 * HIDDEN * KV_HEADS * HEAD_DIM + 3 * HIDDEN * MLP)
FLOAT_BYTES = 4


def config_of(
    folder: Path, model: ModelSpec, args: Mapping[str, Any] | None = None, online: bool = False, **engine: Any
) -> BackendConfig:
    spec = EngineSpec(backend="vllm", device="cpu", engine_args=SMALL if args is None else args, **engine)
    return BackendConfig(
        model=model,
        engine=spec,
        device="cpu",
        host="h",
        base_dir=str(folder),
        cache_dir=str(folder / "cache"),
        online=online,
    )


def requests_of(new_tokens: int = NEW_TOKENS, ignore_eos: bool = True) -> list[Request]:
    return [
        Request(request_id=f"r{row}", prompt_token_ids=ids, max_new_tokens=new_tokens, ignore_eos=ignore_eos)
        for row, ids in enumerate(PROMPTS)
    ]


def serve(
    backend: InferenceBackend, requests: list[Request], schedule: LoadSchedule | None = None
) -> tuple[list[StepEvent], list[RequestRecord]]:
    """Steps, and records in the order of the requests."""
    row = {request.request_id: index for index, request in enumerate(requests)}
    events = list(backend.run(requests, SamplingSpec(), schedule) if schedule else backend.run(requests, SamplingSpec()))
    events.sort(key=lambda event: row[event.request_id] if isinstance(event, RequestRecord) else -1)
    return [e for e in events if isinstance(e, StepEvent)], [e for e in events if isinstance(e, RequestRecord)]


def children() -> set[str]:
    names = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                names.add(f"{process.pid} {' '.join(process.cmdline())}")
        except psutil.NoSuchProcess:
            continue
    return {name for name in names if "resource_tracker" not in name}


def tokens_of(records: list[RequestRecord]) -> list[tuple[int, ...]]:
    return [record.output_token_ids for record in records]


def flops_of(tokens: int, context: int) -> int:
    """Every matrix product of one forward pass; the head only for the last token, attention over the whole context."""
    return 2 * MATMUL * tokens + 2 * VOCAB * HIDDEN + 4 * LAYERS * HEADS * HEAD_DIM * tokens * context


def read_bytes_of(tokens: int, context: int) -> int:
    """Every weight once, every input of a matrix product, and the keys and values of the context."""
    inputs = tokens * (2 * HIDDEN + 2 * HEADS * HEAD_DIM + 3 * MLP) + 2 * context * KV_HEADS * HEAD_DIM
    return FLOAT_BYTES * (MATMUL + VOCAB * HIDDEN + LAYERS * inputs + HIDDEN)
