"""Conversations of several turns: what a later prompt is made of, and what a record tells of its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from llem_ray.core.backend import Request, RequestRecord


class Histories:
    """What was said so far in the conversations of a run. Not locked: its owner asks and answers one after the other.

    Args:
        requests: All of the run.
    """

    def __init__(self, requests: Iterable[Request]) -> None:
        self._awaited = {request.follows for request in requests if request.new_prompt_tokens is not None}
        self._said: dict[str, tuple[int, ...]] = {}

    def ask(self, request: Request) -> Request:
        """The request as it is sent: with the real answers of the turns before in its prompt, where it wants these."""
        if request.new_prompt_tokens is not None and request.follows is not None:
            said = self._said.pop(request.follows)
            request = replace(request, prompt_token_ids=said + request.prompt_token_ids[-request.new_prompt_tokens :])
        if request.request_id in self._awaited:
            self._said[request.request_id] = request.prompt_token_ids
        return request

    def answer(self, request_id: str, output_token_ids: Sequence[int]) -> None:
        """A request was answered."""
        if request_id in self._awaited:
            self._said[request_id] += tuple(output_token_ids)


def completed_record(record: RequestRecord, request: Request, number_of_pass: int, *, last_turn: bool = True) -> RequestRecord:
    """An engine's record with what only the maker of the request knows.

    Args:
        record: From the engine.
        request: As it was made.
        number_of_pass: From 0; it goes before the id, so that ids of a trial differ.
        last_turn: No request follows it.
    """
    shared = request.shared_prompt_tokens
    if request.new_prompt_tokens is not None:
        shared = record.prompt_tokens - request.new_prompt_tokens
    return replace(
        record,
        request_id=f"{number_of_pass}-{request.request_id}",
        requested_tokens=request.max_new_tokens,
        conversation=request.conversation,
        turn=request.turn,
        last_turn=last_turn,
        shared_prompt_tokens=shared,
    )
