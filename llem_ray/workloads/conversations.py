"""Requests of one turn or several: who follows whom, and what each prompt begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llem_ray.core.backend import Request
from llem_ray.core.spec import WorkloadSpec
from llem_ray.core.units import ns_from_s
from llem_ray.workloads.chats import Ids
from llem_ray.workloads.token_sources import RandomIds, TokenSource


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands among the conversations of a pass."""

    conversation: int
    turn: int
    """From 0."""
    former: int | None
    """Index of the request of the turn before."""


def places_of(workload: WorkloadSpec, count: int) -> list[Place]:
    """The place of each request, by its index.

    Batches hold one turn of each of ``batch_size`` conversations, and the next batch their next turn. Under an online load the
    turns of a conversation come one after the other.
    """
    turns = workload.turns
    if workload.load.online:
        return [Place(index // turns, index % turns, index - 1 if index % turns else None) for index in range(count)]
    size, places = workload.batch_size, list[Place]()
    for index in range(count):
        block, within = divmod(index, size * turns)
        turn, number = divmod(within, size)
        if turns == 1:
            places.append(Place(index, 0, None))
        else:
            places.append(Place(block * size + number, turn, index - size if turn else None))
    return places


def make_requests(
    workload: WorkloadSpec,
    places: Sequence[Place],
    bodies: Sequence[Ids],
    outputs: Sequence[int],
    source: TokenSource,
    random_ids: RandomIds,
    shared_in_bodies: Sequence[int],
) -> tuple[Request, ...]:
    """Requests whose prompts are the prefix or the turns before with their answers, and what is new.

    Args:
        workload: Prefixes, turns and what their answers are.
        places: Of each request.
        bodies: What is new in each.
        outputs: Tokens that each generates.
        source: Where prefixes come from.
        random_ids: Where answers come from that are known in advance, or stand for those to come.
        shared_in_bodies: Leading tokens of each body that an earlier one has too.
    """
    groups, tokens = workload.prefix_groups, workload.shared_prefix_tokens
    prefixes = [source.prefix(group, tokens) for group in range(groups)] if tokens else [()] * groups
    requests: list[Request] = []
    for index, (place, body) in enumerate(zip(places, bodies, strict=True)):
        if place.former is None:
            head = prefixes[place.conversation % groups]
            shared = shared_in_bodies[index] + (len(head) if place.conversation >= groups else 0)
        else:
            former = requests[place.former].prompt_token_ids
            head = former + random_ids.draw(f"{workload.seed}/answer/{place.former}", outputs[place.former])
            shared = len(former)
        later = place.former is not None
        requests.append(
            Request(
                request_id=str(index),
                prompt_token_ids=head + body,
                max_new_tokens=outputs[index],
                ignore_eos=workload.ignore_eos,
                follows=str(place.former) if later else None,
                think_ns=ns_from_s(workload.think_time_s) if later else 0,
                new_prompt_tokens=len(body) if later and workload.generated_answers else None,
                conversation=place.conversation if workload.turns > 1 else None,
                turn=place.turn if workload.turns > 1 else None,
                shared_prompt_tokens=shared,
            )
        )
    return tuple(requests)
