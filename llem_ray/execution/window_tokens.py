"""What of each request was computed in a trial's window."""

from __future__ import annotations

from dataclasses import dataclass

from llem_ray.core.flops import FlopModel
from llem_ray.core.outcome import Completed


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestPart:
    """One request's part in a window."""

    prompt_length: int
    prompt_tokens: int
    """Its prompt, where its first token came in the window; else 0."""
    tokens_before: int
    """Output tokens that came before the window."""
    output_tokens: int
    """Output tokens that came in it."""

    def flops(self, model: FlopModel) -> float:
        """FLOP of the part."""
        if not self.output_tokens:
            return 0.0
        prefill = model.prefill(self.prompt_length) if self.prompt_tokens else 0.0
        until = self.tokens_before + self.output_tokens
        return prefill + model.decode(self.prompt_length, max(1, self.tokens_before), until)


def request_parts(done: Completed) -> tuple[RequestPart, ...]:
    """Each request's part, in the order of ``done.requests``: all of it, as a window of batches has whole requests."""
    return tuple(
        RequestPart(
            prompt_length=record.prompt_tokens,
            prompt_tokens=record.prompt_tokens,
            tokens_before=0,
            output_tokens=record.output_tokens,
        )
        for record in done.requests
    )
