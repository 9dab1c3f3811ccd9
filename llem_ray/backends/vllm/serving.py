"""What a request to vLLM is made of, and what becomes of its answers and steps: the same offline and online."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vllm import SamplingParams
from vllm.inputs import TokensInput, tokens_input
from vllm.sampling_params import RequestOutputKind

from llem_ray.backends.load_generator import Sent
from llem_ray.core.backend import FinishReason, Request, RequestRecord, StepEvent, StepKind
from llem_ray.core.errors import GenerationError
from llem_ray.core.spec import SamplingSpec

FINISH_REASONS: Final[Mapping[str, FinishReason]] = {"length": "length", "stop": "stop", "abort": "abort"}


@dataclass(slots=True)
class Answer:
    """What has come of one request so far."""

    request: Request
    row: int
    """Its place among the requests of the run."""
    sent: Sent | None = None
    token_ids: list[int] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cached_tokens: int | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None

    def take(self, output: Any, at_ns: int) -> None:
        """Add a chunk, whose tokens all came at one time.

        Args:
            output: vLLM's RequestOutput, of the kind DELTA.
            at_ns: When it was delivered.
        """
        self.times_ns += [at_ns] * len(output.outputs[0].token_ids)
        self.take_all(output)

    def take_all(self, output: Any) -> None:
        """Add tokens whose times are told apart.

        Args:
            output: vLLM's RequestOutput, of the kind DELTA, or the only one, FINAL_ONLY.
        """
        completion = output.outputs[0]
        self.token_ids += [int(token) for token in completion.token_ids]
        if output.num_cached_tokens is not None:
            self.cached_tokens = int(output.num_cached_tokens)
        if output.finished:
            self.finish_reason = str(completion.finish_reason)
            speculation = completion.spec_decode_metrics
            if speculation is not None:
                self.draft_tokens = int(speculation.num_draft_tokens)
                self.accepted_tokens = sum(accepted * steps for accepted, steps in enumerate(speculation.histogram))

    def record(self) -> RequestRecord:
        """The finished request.

        Raises:
            GenerationError: It was aborted, has fewer tokens than were asked for, or not all of them were in steps.
        """
        request = self.request
        reason = FINISH_REASONS.get(self.finish_reason or "")
        wrong_length = request.ignore_eos and len(self.token_ids) != request.max_new_tokens
        if reason is None or reason == "abort" or wrong_length or not self.token_ids:
            raise GenerationError(
                f"request {request.request_id} ended with {len(self.token_ids)} of {request.max_new_tokens} tokens"
                f" (finish reason {self.finish_reason!r})"
            )
        if len(self.times_ns) != len(self.token_ids):
            raise GenerationError(
                f"vLLM's steps told of {len(self.times_ns)} of the {len(self.token_ids)} tokens of request {request.request_id}",
                "llem-ray supports vLLM 0.32",
            )
        assert self.sent is not None
        return RequestRecord(
            request_id=request.request_id,
            prompt_tokens=len(request.prompt_token_ids),
            padded_tokens=len(request.prompt_token_ids),
            output_token_ids=tuple(self.token_ids),
            finish_reason=reason,
            scheduled_ns=self.sent.scheduled_ns,
            queued_ns=self.sent.queued_ns,
            sent_ns=self.sent.sent_ns,
            token_times_ns=tuple(self.times_ns),
            cached_tokens=self.cached_tokens,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
        )


def prompt_of(request: Request) -> TokensInput:
    """The prompt as vLLM's own renderer would hand it on: its ids, unchanged."""
    return tokens_input(list(request.prompt_token_ids))


def sampling_params(request: Request, sampling: SamplingSpec, row: int, output_kind: RequestOutputKind) -> SamplingParams:
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
        output_kind=output_kind,
    )


def told_by(stats: Any) -> tuple[Any, Any]:
    """Details of a step's tokens and its PerfStats, as vLLM's SchedulerStats tell them; None where they don't."""
    details = getattr(stats, "iteration_details", None)
    return None if details is None or details.is_dummy else details, getattr(stats, "perf_stats", None)


def step_event(details: Any, performance: Any, produced: int, begin_ns: int, end_ns: int, workers: int) -> StepEvent | None:
    """None for a step that computed nothing: the scheduler only sent work ahead, or swept up.

    Args:
        details: vLLM's account of prompt and output tokens that were scheduled, or None.
        performance: vLLM's PerfStats, or None.
        produced: Output tokens of this step.
        begin_ns: When it began.
        end_ns: When it ended.
        workers: GPUs or processes over which vLLM counts FLOPs and bytes as equal shares.

    Raises:
        GenerationError: There are tokens but no details of their step.
    """
    if details is None:
        if produced:
            raise GenerationError("vLLM returned tokens without the details of their step", "llem-ray supports vLLM 0.32")
        return None
    prefill, generation = int(details.num_ctx_tokens), int(details.num_generation_tokens)
    kind: StepKind = "decode" if not prefill else "mixed" if generation else "prefill"
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
