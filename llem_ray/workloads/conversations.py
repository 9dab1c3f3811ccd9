"""Requests of one turn or several: who follows whom, and what each prompt begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from llem_ray.core.backend import Request
from llem_ray.core.units import ns_from_s
from llem_ray.core.workload_spec import WorkloadSpec
from llem_ray.workloads.chats import Ids
from llem_ray.workloads.lengths import draw_lengths
from llem_ray.workloads.think_times import draw_times_s


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands among the conversations of a pass."""

    conversation: int
    turn: int
    """From 0."""
    former: int | None
    """Index of the request of the turn before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """What the requests of a pass say, by their index."""

    places: Sequence[Place]
    bodies: Sequence[Ids]
    """What is new in each prompt."""
    outputs: Sequence[int]
    """Tokens that each generates."""
    answer: Callable[[int], Ids]
    """The answer to a request that stands in later prompts: the known one, or one in place of that to come."""
    name_of: Callable[[int], str]
    """What an error calls the prompt of a request."""


def together(workload: WorkloadSpec) -> int | None:
    """Conversations of a batch; None under an online load."""
    return None if workload.load.online else workload.batch_size


def turns_of(workload: WorkloadSpec) -> list[int]:
    """Turns of each conversation of a pass, which are not those of a file; a request without turns is one."""
    assert workload.turns != "recorded"
    many = workload.whole_conversations
    return draw_lengths(workload.turns, workload.batch_size if many is None else many, f"{workload.seed}/turns")


def places_of(turns: Sequence[int], together: int | None) -> list[Place]:
    """The place of each request, in the order they are made.

    Args:
        turns: Of each conversation.
        together: Conversations of a batch, which holds one turn of each; the next batch holds their next turns, and where one
            has ended the first turn of another. None: the turns of a conversation come one after the other.
    """
    waiting = iter(enumerate(turns))
    places: list[Place] = []
    seats = [(Place(number, 0, None), count) for number, count in islice(waiting, together or 1)]
    while seats:
        following = []
        for place, count in seats:
            places.append(place)
            if place.turn + 1 < count:
                following.append((Place(place.conversation, place.turn + 1, len(places) - 1), count))
            else:
                following += [(Place(number, 0, None), its_count) for number, its_count in islice(waiting, 1)]
        seats = following
    return places


def make_requests(
    workload: WorkloadSpec, script: Script, prefix: Callable[[int, int], Ids], shared_in_bodies: Sequence[int]
) -> tuple[Request, ...]:
    """Requests whose prompts are the prefix or the turns before with their answers, and what is new.

    Args:
        workload: Prefixes, turns, thinking, and what answers in later prompts are.
        script: What is said.
        prefix: The first tokens of all prompts of a group, by its number and how many.
        shared_in_bodies: Leading tokens of each body that an earlier one has too.
    """
    groups, tokens = workload.prefix_groups, workload.shared_prefix_tokens
    prefixes = [prefix(group, tokens) for group in range(groups)] if tokens else [()] * groups
    thinking_s = draw_times_s(workload.think_time_s, len(script.places), f"{workload.seed}/think_time")
    with_turns = workload.turns != 1
    requests: list[Request] = []
    for index, (place, body) in enumerate(zip(script.places, script.bodies, strict=True)):
        if place.former is None:
            head = prefixes[place.conversation % groups]
            shared = shared_in_bodies[index] + (len(head) if place.conversation >= groups else 0)
        else:
            former = requests[place.former].prompt_token_ids
            head = former + script.answer(place.former)
            shared = len(former)
        later = place.former is not None
        requests.append(
            Request(
                request_id=str(index),
                prompt_token_ids=head + body,
                max_new_tokens=script.outputs[index],
                ignore_eos=workload.ignore_eos,
                follows=str(place.former) if later else None,
                think_ns=ns_from_s(thinking_s[index]) if later else 0,
                new_prompt_tokens=len(body) if later and workload.generated_answers else None,
                conversation=place.conversation if with_turns else None,
                turn=place.turn if with_turns else None,
                shared_prompt_tokens=shared,
            )
        )
    return tuple(requests)
