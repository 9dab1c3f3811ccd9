"""transformers' continuous batching, watched: what each of its steps did, and when that was done.

The library offers per-request times only, and no account of its steps. Its manager runs a loop in a thread of its own; the
subclass here looks at the batch after every turn of that loop, in its own words: requests, their query lengths, new tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from llem_ray.backends.transformers.sampling import NOT_FINITE, TokenSelector
from llem_ray.core.backend import StepEvent, StepKind
from llem_ray.core.errors import GenerationError, NumericsError
from llem_ray.core.spec import SamplingSpec


class NewToken(NamedTuple):
    """What a step made for one request."""

    request_id: str
    token: int
    last: bool
    """The request is answered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedStep:
    """One turn of the loop that computed something."""

    event: StepEvent
    tokens: tuple[NewToken, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopFailed:
    """The loop ended; nothing more will come."""

    error: Exception


Report = Callable[[ServedStep | LoopFailed], None]


class _Failures(OutputRouter):
    """Takes what the library would deliver and keeps the failures only: tokens are told by the steps.

    Args:
        report: Called in the loop's thread.
    """

    def __init__(self, report: Callable[[Exception], None]) -> None:
        super().__init__()
        self._report = report

    def deliver(self, output: GenerationOutput) -> None:
        """One result, or a failure."""
        if output.error is not None:
            self._report(GenerationError(f"request {output.request_id} failed: {output.error}"))

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Results of a step."""


class WatchedBatching(ContinuousBatchingManager):
    """A manager of continuous batching that reports every step and chooses tokens as our own loop does.

    Only synchronous batching without CUDA graphs is watched: there a step's tokens are on the host when it ends.

    Args:
        model: On its device.
        config: Of the library.
    """

    _generation_thread: Any
    _original_attn_impl: Any

    def __init__(self, model: Any, config: ContinuousBatchingConfig) -> None:
        super().__init__(
            model=model,
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=config,
        )
        self._report: Report = lambda _: None
        self.output_router = _Failures(lambda error: self._report(LoopFailed(error=error)))
        self._selector = TokenSelector(SamplingSpec(), model.device)

    def prepare(self) -> None:
        """Allocate the cache, which the loop would do otherwise when it starts."""
        self.batch_processor = self._create_batch_processor()

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache holds, of all requests together; 0 before it is allocated."""
        processor = self.batch_processor
        return 0 if processor is None else processor.cache.num_blocks * self.continuous_batching_config.page_size

    def begin(self, sampling: SamplingSpec, report: Report) -> None:
        """Start the loop where it stands still. Nothing may be in flight.

        Args:
            sampling: Of the requests that follow; draws are seeded anew.
            report: Called in the loop's thread; it must not block.
        """
        self._report, self._selector = report, TokenSelector(sampling, self.model.device)
        if not self.is_running():
            self.start()

    def start(self) -> None:
        """As the library does, but in a thread that does not outlive the process."""
        self.background_thread_status.clear()
        self._generation_thread = threading.Thread(target=self._run_generation_loop, name="llem-ray-batching", daemon=True)
        self._generation_thread.start()

    def end(self, timeout_s: float, *, drop: bool) -> bool:
        """Stop the loop, whatever is in flight; returns whether it stood still in time.

        Args:
            timeout_s: Longest wait for the step that runs.
            drop: Free the cache, too.
        """
        thread = self._generation_thread
        if thread is not None:
            status = self.background_thread_status
            status.request_stop(status.HARD_STOP, self.distributed_helper.global_rank)
            self._wake_up_loop.set()
            thread.join(timeout_s)
            if thread.is_alive():
                return False
            self._generation_thread = None
        if drop:
            self.batch_processor = None
        return True

    def restore_attention(self) -> None:
        """Give the model back the attention that it was loaded with."""
        if self._original_attn_impl is not None:
            self.model.set_attn_implementation(self._original_attn_impl)
            self._original_attn_impl = None

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        runner: Any = processor.model_runner
        runner._sample = self._choose
        return processor

    def _choose(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        chosen = self._selector.select(scores[0])
        output_ids[0, : chosen.size(0)].copy_(chosen)

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:
        begin_ns, before = time.monotonic_ns(), self.current_batch
        goes_on = super()._generation_loop_body(batch_processor, bootstrapping)
        if self.current_batch != before:
            inputs: Any = batch_processor.inputs_and_outputs
            step = _served(inputs.requests_in_batch, begin_ns, time.monotonic_ns())
            bad = next((new.request_id for new in step.tokens if new.token == NOT_FINITE), None)
            if bad is not None:
                raise NumericsError(
                    f"the model produced NaN or Inf logits: request {bad}",
                    "try another `model.dtype`: float16 overflows where bfloat16 and float32 do not",
                )
            self._report(step)
        return goes_on

    def _handle_critical_error(self, error: Exception, batch_processor: ContinuousBatchProcessor | None) -> None:
        self._report(LoopFailed(error=error))
        super()._handle_critical_error(error, batch_processor)


def _served(batch: list[Any], begin_ns: int, end_ns: int) -> ServedStep:
    """What a batch of the library's FutureRequestStates was, after its states took their tokens.

    A request is prefilled until it has its first token; the prompt of one that was put off for want of room includes what
    it had generated.
    """
    fresh = [part for part in batch if not part.has_new_token or part.state.generated_len() == 1]
    prefill_tokens = sum(part.query_length for part in fresh)
    tokens = tuple(
        NewToken(part.state.request_id, part.state.generated_tokens[-1], part.state.status is RequestStatus.FINISHED)
        for part in batch
        if part.has_new_token
    )
    kind: StepKind = "decode" if not fresh else "prefill" if len(fresh) == len(batch) else "mixed"
    event = StepEvent(
        begin_ns=begin_ns,
        end_ns=end_ns,
        kind=kind,
        prefill_tokens=prefill_tokens,
        decode_tokens=len(tokens),
        computed_tokens=sum(part.query_length for part in batch),
    )
    return ServedStep(event=event, tokens=tokens)
