"""What every engine refuses before it computes anything."""

from __future__ import annotations

from collections.abc import Sequence

from llem_ray.core.backend import LoadSchedule, Request
from llem_ray.core.errors import GenerationError


def require_batch(schedule: LoadSchedule | None, engine: str) -> None:
    """Refuse a schedule.

    Raises:
        GenerationError: There is one.
    """
    if schedule is not None:
        raise GenerationError(f"the {engine} engine serves batches only", "leave out workload.load")


def require_valid(requests: Sequence[Request], *, vocab_size: int, context_tokens: int) -> None:
    """Refuse a batch that the model cannot serve in full.

    Raises:
        GenerationError: It is empty, or a request asks for nothing, for unknown ids or for more tokens than the context.
    """
    if not requests:
        raise GenerationError("there are no requests")
    for request in requests:
        name, ids = f"request {request.request_id}", request.prompt_token_ids
        if not ids or request.max_new_tokens < 1:
            raise GenerationError(f"{name} asks for {request.max_new_tokens} tokens after a prompt of {len(ids)}")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise GenerationError(f"{name} has token ids from {min(ids)} to {max(ids)}, the model knows 0 to {vocab_size - 1}")
        needed = len(request.prompt_token_ids) + request.max_new_tokens
        if needed > context_tokens:
            raise GenerationError(
                f"request {request.request_id}: {len(request.prompt_token_ids)} prompt + {request.max_new_tokens} new tokens"
                f" = {needed} exceed the model's context of {context_tokens}"
            )
