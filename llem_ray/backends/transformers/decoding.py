"""One padded batch through the model, step by step, with the time of every step.

Token-identical to transformers' `generate`: dynamic cache, left padding, explicit positions, logits of the last position
only. Rows that have ended keep computing until the whole batch has, as in `generate`; the step events tell both counts.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from llem_ray.backends.transformers.forwarding import Forwarding
from llem_ray.backends.transformers.sampling import NOT_FINITE, TokenSelector
from llem_ray.core.backend import FinishReason, Request, RequestRecord, StepEvent
from llem_ray.core.errors import NumericsError
from llem_ray.core.spec import SamplingSpec


class Crew(Protocol):
    """Other ranks that share the model: each computes its part of every step."""

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """A batch begins, with its first step."""
        ...

    def tell(self, chosen: Sequence[int]) -> None:
        """Another step begins; these are the tokens that the last one chose."""
        ...


class PaddedBatch:
    """Prompts padded on the left to one length, and the cache of what was computed. One call of ``step`` is one forward.

    Args:
        model: On its device.
        prompts: Token ids of each row.
        max_new_tokens: Steps the batch may take.
        last_position: Largest position the model knows; rows that have ended stay there.
        forwarding: How steps are computed; default: over a growing cache, not compiled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        last_position: int,
        forwarding: Forwarding | None = None,
    ) -> None:
        device = model.device
        padded = max(map(len, prompts))
        padding = torch.tensor([[padded - len(prompt)] for prompt in prompts])
        rows = [[0] * (padded - len(prompt)) + list(prompt) for prompt in prompts]
        column = torch.arange(padded + max_new_tokens)
        self._device = device
        self._forwarding = forwarding or Forwarding(model)
        self._ids = torch.tensor(rows).to(device)
        self._positions = (column - padding).clamp(0, last_position).to(device)
        # Without padding no mask is passed: attention kernels are faster without one, and `generate` does the same.
        self._mask = (column >= padding).long().to(device) if bool(padding.any()) else None
        self._begin, self._end = 0, padded
        self._cache: Any = self._forwarding.cache(len(rows), padded + max_new_tokens)
        self._prefilled = False
        accepted = _argument_names(type(model).forward)
        self._options: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in accepted else {})
        self._takes_positions = "position_ids" in accepted

    @torch.inference_mode()
    def step(self, selector: TokenSelector) -> list[int]:
        """The next token of every row. Returns once the ids are on the host, so the clock read after it is true on CUDA."""
        self._ids, chosen = selector.pick(self.forward())
        return chosen

    def feed(self, chosen: Sequence[int]) -> None:
        """Go on with tokens that another rank chose."""
        self._ids = torch.tensor(chosen)[:, None].to(self._device)

    @torch.inference_mode()
    def forward(self) -> torch.Tensor:
        """Logits of the last position (rows, vocabulary), perhaps not computed yet on CUDA."""
        options = dict(self._options)
        if self._takes_positions:
            options["position_ids"] = self._positions[:, self._begin : self._end]
        mask = self._mask
        if mask is not None and not self._forwarding.static:
            mask = mask[:, : self._end]
        output = self._forwarding.compute(
            decode=self._prefilled, input_ids=self._ids, attention_mask=mask, past_key_values=self._cache, **options
        )
        self._prefilled = True
        self._cache = output.past_key_values
        self._begin, self._end = self._end, self._end + 1
        return output.logits[:, -1]


@functools.cache
def _argument_names(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def generate_batch(
    model: PreTrainedModel,
    requests: Sequence[Request],
    sampling: SamplingSpec,
    eos_token_ids: Set[int],
    last_position: int,
    crew: Crew | None = None,
    forwarding: Forwarding | None = None,
) -> Iterator[StepEvent | RequestRecord]:
    """Serve the requests together: a StepEvent after each step, then a RequestRecord for each request.

    Args:
        model: On its device.
        requests: Valid ones: ids in the vocabulary, within the context.
        sampling: How tokens are chosen.
        eos_token_ids: Ids that end a row, unless its request ignores them.
        last_position: Largest position the model knows.
        crew: The other ranks of the model, or None where this process has all of it.
        forwarding: How steps are computed; default: over a growing cache, not compiled.

    Raises:
        NumericsError: The logits of a row are NaN or Inf.
    """
    sent_ns = begin_ns = time.monotonic_ns()
    prompts = [request.prompt_token_ids for request in requests]
    limits = [request.max_new_tokens for request in requests]
    honours_eos = {row for row, request in enumerate(requests) if not request.ignore_eos and eos_token_ids}
    lengths = list(limits)  # a row's limit, or less once its end token has come
    shortest = min(lengths)
    selector = TokenSelector(sampling, model.device)
    batch = PaddedBatch(model, prompts, max(limits), last_position, forwarding)
    if crew is not None:
        crew.begin(prompts, max(limits))
    padded, prompt_tokens = max(map(len, prompts)), sum(map(len, prompts))
    tokens: list[list[int]] = []
    times_ns: list[int] = []
    while (step := len(times_ns)) < max(lengths):
        if crew is not None and step:
            crew.tell(tokens[-1])
        chosen = batch.step(selector)
        end_ns = time.monotonic_ns()
        if NOT_FINITE in chosen:
            request_id = requests[chosen.index(NOT_FINITE)].request_id
            raise NumericsError(
                f"the model produced NaN or Inf logits: request {request_id}, output token {step}",
                "try another `model.dtype`: float16 overflows where bfloat16 and float32 do not",
            )
        tokens.append(chosen)
        times_ns.append(end_ns)
        active = len(lengths) if step < shortest else sum(step < length for length in lengths)
        for row in honours_eos:
            if step < lengths[row] and chosen[row] in eos_token_ids:
                lengths[row] = step + 1
                shortest = min(shortest, step + 1)
        yield StepEvent(
            begin_ns=begin_ns,
            end_ns=end_ns,
            kind="decode" if step else "prefill",
            prefill_tokens=0 if step else prompt_tokens,
            decode_tokens=active,
            computed_tokens=len(requests) * (1 if step else padded),
        )
        begin_ns = time.monotonic_ns()
    for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        output = tuple(chosen[row] for chosen in tokens[:length])
        stopped = row in honours_eos and output[-1] in eos_token_ids
        finish_reason: FinishReason = "stop" if stopped else "length"
        yield RequestRecord(
            request_id=request.request_id,
            prompt_tokens=len(request.prompt_token_ids),
            padded_tokens=padded,
            output_token_ids=output,
            finish_reason=finish_reason,
            scheduled_ns=sent_ns,
            queued_ns=sent_ns,
            sent_ns=sent_ns,
            token_times_ns=tuple(times_ns[:length]),
        )
