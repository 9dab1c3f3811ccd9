"""What of each request was computed in a trial's window."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from llem_ray.core.backend import RequestRecord
from llem_ray.core.flops import FlopModel
from llem_ray.core.outcome import Completed
from llem_ray.workloads.windows import prefilled_ns


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestPart:
    """One request's part in a window."""

    prompt_length: int
    prompt_tokens: int
    """Its prompt, where its first token came in the window, or where it gave none and was sent in it; else 0."""
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
    """Each request's part, in the order of ``done.requests``, by when its tokens came; of a window that is a whole run, all."""
    if done.online is None or done.window == done.online.whole:
        return tuple(_part(record, record.prompt_tokens, 0, record.output_tokens) for record in done.requests)
    return tuple(_inside(record, done.window.begin_ns, done.window.end_ns) for record in done.requests)


def _inside(record: RequestRecord, begin_ns: int, end_ns: int) -> RequestPart:
    before = bisect_right(record.token_times_ns, begin_ns)
    until = bisect_right(record.token_times_ns, end_ns)
    counts = begin_ns < prefilled_ns(record) <= end_ns
    return _part(record, record.prompt_tokens if counts else 0, before, until - before)


def _part(record: RequestRecord, prompt_tokens: int, before: int, output_tokens: int) -> RequestPart:
    return RequestPart(
        prompt_length=record.prompt_tokens, prompt_tokens=prompt_tokens, tokens_before=before, output_tokens=output_tokens
    )
