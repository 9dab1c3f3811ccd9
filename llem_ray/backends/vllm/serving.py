"""One offline batch through a vLLM engine: every step with its exact tokens, every token with its time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from llem_ray.core.backend import FinishReason, Request, RequestRecord, StepEvent, StepKind
from llem_ray.core.errors import GenerationError
from llem_ray.core.spec import SamplingSpec

FINISH_REASONS: Final[Mapping[str, FinishReason]] = {"length": "length", "stop": "stop", "abort": "abort"}

_run_ids = itertools.count()


class StepRecorder:
    """Stands in for vLLM's own loggers: keeps the scheduler's statistics of the last step and writes nothing."""

    def __init__(self) -> None:
        self._last: Any = None

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:  # noqa: ARG002
        """Called by the engine inside ``step``, by these names."""
        self._last = scheduler_stats

    def log(self) -> None:
        """Called by the engine every few seconds."""

    def take(self) -> Any:
        """Statistics of the step that has just ended, or None; forgets them."""
        last, self._last = self._last, None
        return last


@dataclass(slots=True)
class _Row:
    request: Request
    sent_ns: int
    token_ids: list[int] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)
    finish_reason: str | None = None


def serve_batch(
    engine: Any, recorder: StepRecorder, requests: Sequence[Request], sampling: SamplingSpec, workers: int
) -> Iterator[StepEvent | RequestRecord]:
    """Serve the requests together: a StepEvent after each step of the engine, then a RequestRecord for each request.

    Args:
        engine: vLLM's LLMEngine.
        recorder: Its logger.
        requests: Valid ones, within the context.
        sampling: How tokens are chosen.
        workers: GPUs or processes over which vLLM counts FLOPs and bytes as equal shares.

    Raises:
        GenerationError: A fixed-length request ended early.
    """
    run_id = next(_run_ids)
    rows: dict[str, _Row] = {}
    begin_ns = time.monotonic_ns()
    try:
        for index, request in enumerate(requests):
            # A name of our own: ids may repeat from batch to batch, and late outputs of an abandoned one must not fit.
            name = f"{run_id}-{index}"
            rows[name] = _Row(request=request, sent_ns=time.monotonic_ns())
            engine.add_request(
                name, {"prompt_token_ids": list(request.prompt_token_ids)}, sampling_params(request, sampling, index)
            )
        while any(row.finish_reason is None for row in rows.values()):
            outputs = engine.step()
            end_ns = time.monotonic_ns()
            produced = _collect(rows, outputs, end_ns)
            event = _step_event(recorder.take(), produced, begin_ns, end_ns, workers)
            if event is not None:
                yield event
                begin_ns = time.monotonic_ns()
    finally:
        open_names = [name for name, row in rows.items() if row.finish_reason is None]
        if open_names:
            engine.abort_request(open_names)
    for row in rows.values():
        yield _record(row)


def sampling_params(request: Request, sampling: SamplingSpec, row: int) -> SamplingParams:
    """VLLM's words for ours. Each row draws from a seed of its own, as rows of one batch of the other engines do."""
    greedy = sampling.temperature == 0
    return SamplingParams(
        max_tokens=request.max_new_tokens,
        ignore_eos=request.ignore_eos,
        temperature=float(sampling.temperature),
        top_k=0 if greedy or sampling.top_k is None else sampling.top_k,
        top_p=1.0 if greedy else float(sampling.top_p),
        seed=None if greedy else sampling.seed * 1_000_003 + row,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _collect(rows: Mapping[str, _Row], outputs: Sequence[Any], end_ns: int) -> int:
    produced = 0
    for output in outputs:
        row = rows.get(output.request_id)
        if row is None:
            continue
        completion = output.outputs[0]
        ids = [int(token) for token in completion.token_ids]
        row.token_ids += ids
        row.times_ns += [end_ns] * len(ids)
        produced += len(ids)
        if output.finished:
            row.finish_reason = str(completion.finish_reason)
    return produced


def _step_event(stats: Any, produced: int, begin_ns: int, end_ns: int, workers: int) -> StepEvent | None:
    """None for a step that computed nothing: the scheduler only sent work ahead, or swept up."""
    details = getattr(stats, "iteration_details", None)
    if details is None or details.is_dummy:
        if produced:
            raise GenerationError("vLLM returned tokens without the details of their step", "llem-ray supports vLLM 0.32")
        return None
    prefill, generation = int(details.num_ctx_tokens), int(details.num_generation_tokens)
    kind: StepKind = "decode" if not prefill else "mixed" if generation else "prefill"
    performance = stats.perf_stats
    return StepEvent(
        begin_ns=begin_ns,
        end_ns=end_ns,
        kind=kind,
        prefill_tokens=prefill,
        decode_tokens=produced,
        computed_tokens=prefill + generation,
        flops=float(performance.num_flops_per_gpu * workers) if performance is not None else None,
        read_bytes=float(performance.num_read_bytes_per_gpu * workers) if performance is not None else None,
    )


def _record(row: _Row) -> RequestRecord:
    request = row.request
    reason = FINISH_REASONS.get(row.finish_reason or "")
    wrong_length = request.ignore_eos and len(row.token_ids) != request.max_new_tokens
    if reason is None or reason == "abort" or wrong_length or not row.token_ids:
        raise GenerationError(
            f"request {request.request_id} ended with {len(row.token_ids)} of {request.max_new_tokens} tokens"
            f" (finish reason {row.finish_reason!r})"
        )
    return RequestRecord(
        request_id=request.request_id,
        prompt_tokens=len(request.prompt_token_ids),
        padded_tokens=len(request.prompt_token_ids),
        output_token_ids=tuple(row.token_ids),
        finish_reason=reason,
        scheduled_ns=row.sent_ns,
        queued_ns=row.sent_ns,
        sent_ns=row.sent_ns,
        token_times_ns=tuple(row.times_ns),
    )
