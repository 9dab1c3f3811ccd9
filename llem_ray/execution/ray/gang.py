"""A gang as Ray actors: placed together, one or several on each node."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from llem_ray.core.backend import Rendezvous, Reservation
from llem_ray.core.errors import EngineDied
from llem_ray.core.outcome import Outcome
from llem_ray.execution.calls import Leased, Loaded, PowerSeen, TrialOrder, WarmupProgress
from llem_ray.execution.ray.runtime import RayCall, RayCalls, answer_of, import_ray

LOG_TAIL_BYTES: Final = 4000
PORT_TIMEOUT_S: Final = 30.0
FOLLOWERS_END_S: Final = 3.0
"""Followers that still serve so long after their leader closed are killed."""


class RayGang:
    """The processes of one gang.

    Args:
        actors: Its engine actors, by rank.
        group: Its placement group, or None on the CPU.
        logs: Folder with Ray's logs of this host, or None where the gang runs elsewhere.
        worker_share: Part of each bundle's GPU that is left to workers of the engine's own; None: it starts none by Ray.
    """

    def __init__(self, actors: Sequence[Any], group: Any, logs: Path | None, worker_share: float | None = None) -> None:
        self._actors = list(actors)
        self._group = group
        self._logs = logs
        self._worker_share = worker_share
        self._leased: tuple[Leased, ...] = ()
        self._following: list[Any] = []
        self.closed = False

    def lease(self) -> RayCalls[tuple[Leased, ...]]:
        """Answered once all actors run."""
        return RayCalls([actor.lease.remote() for actor in self._actors], "placement", self._remember)

    def _remember(self, leased: list[Leased]) -> tuple[Leased, ...]:
        self._leased = tuple(leased)
        return self._leased

    def load(self) -> RayCall[Loaded] | RayCalls[Loaded]:
        """Load the model; where there are several processes, they meet at the first one's address."""
        if len(self._actors) == 1:
            return RayCall(self._actors[0].load.remote(), "load")
        if not self._leased:
            self.lease().result(PORT_TIMEOUT_S)
        port = answer_of(self._actors[0].reserve_port.remote(), PORT_TIMEOUT_S, "rendezvous")
        meetings = rendezvous_of(self._leased, port, self._reservation())
        refs = [actor.meet.remote(meeting) for actor, meeting in zip(self._actors, meetings, strict=True)]
        return RayCalls(refs, "load", self._loaded)

    def _reservation(self) -> Reservation | None:
        if self._worker_share is None:
            return None
        ray = import_ray()
        uuids = tuple(uuid for leased in self._leased for uuid in leased.gpu_uuids)
        return Reservation(
            ray_version=str(ray.__version__),
            python_version=platform.python_version(),
            address=str(ray.get_runtime_context().gcs_address),
            group=self._group.id.hex(),
            gpu_share=self._worker_share,
            gpu_ids=tuple(gpu for leased in self._leased for gpu in leased.gpu_ids),
            gpu_uuids=uuids if len(uuids) == len(self._actors) else (),
        )

    def _loaded(self, answers: list[Loaded]) -> Loaded:
        if not self._following:
            self._following = [actor.follow.remote() for actor in self._actors[1:]]
        return replace(answers[0], ranks=tuple(rank for answer in answers for rank in answer.ranks))

    def run(self, order: TrialOrder) -> RayCall[Outcome]:
        """Run one attempt: the first process leads, the others follow over the engine's own network."""
        ref = self._actors[0].run.remote(order)
        return _Led(ref, f"trial {order.trial_id}", self._following, self._leased)

    def phase(self) -> str | None:
        """What the leading actor does now; asked on its second lane, so that a busy engine answers too."""
        ray = import_ray()
        try:
            answer: str | None = ray.get(self._actors[0].phase.options(concurrency_group="watch").remote(), timeout=0.5)
        except ray.exceptions.RayError:
            return None
        return answer

    def tell_warmup(self, trial_id: str, attempt: int, seen: PowerSeen | None) -> RayCall[WarmupProgress]:
        """Tell the leading actor, on its second lane."""
        method = self._actors[0].tell_warmup.options(concurrency_group="watch")
        return RayCall(method.remote(trial_id, attempt, seen), "warm-up")

    def close(self, timeout_s: float) -> None:
        """Unload, then kill the actors and give the GPUs back."""
        ray = import_ray()
        with contextlib.suppress(Exception):
            if timeout_s > 0:
                ray.get(self._actors[0].close.remote(), timeout=timeout_s)
                if self._worker_share is not None:  # the engine's workers are no processes of theirs: nothing tells them
                    for actor in self._actors[1:]:
                        actor.close.options(concurrency_group="watch").remote()
                if self._following:  # they learn of it over the engine's network, and unload
                    ray.wait(self._following, num_returns=len(self._following), timeout=min(timeout_s, FOLLOWERS_END_S))
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        if self._group is not None:
            with contextlib.suppress(Exception):
                ray.util.remove_placement_group(self._group)
        self.closed = True

    def last_words(self) -> str | None:
        """End of the actors' stderr, where this host has it."""
        if self._logs is None:
            return None
        told = []
        for leased in self._leased:
            for path in sorted(self._logs.glob(f"worker-*-{leased.pid}.err")):
                text = path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
                told += [text] if text else []
        return "\n".join(told) or None


class _Led(RayCall[Outcome]):
    """The leading actor's answer, unless a follower dies first: the leader would wait for it in vain."""

    def __init__(self, ref: Any, what: str, following: Sequence[Any], leased: Sequence[Leased]) -> None:
        super().__init__(ref, what)
        self._following, self._leased = list(following), tuple(leased)

    def result(self, timeout_s: float) -> Outcome:
        """The outcome.

        Raises:
            EngineDied: A process of the gang is gone.
        """
        if self._following:
            ray = import_ray()
            ready, _ = ray.wait([self.refs[0], *self._following], num_returns=1, timeout=timeout_s)
            if ready and ready[0] is not self.refs[0] and ready[0] != self.refs[0]:
                self._raise_if_dead(ready[0])
        answer: Outcome = super().result(timeout_s)
        return answer

    def _raise_if_dead(self, ref: Any) -> None:
        rank = self._following.index(ref) + 1
        where = self._leased[rank].hostname if rank < len(self._leased) else "its host"
        try:
            answer_of(ref, 0.1, f"{self._what} in the process of rank {rank} on {where}")
        except TimeoutError:
            return
        self._following.remove(ref)
        raise EngineDied(f"the process of rank {rank} on {where} ended while it was to follow")


def rendezvous_of(leased: Sequence[Leased], port: int, reservation: Reservation | None = None) -> list[Rendezvous]:
    """Where each process meets the others."""
    hosts = tuple(one.node for one in leased)
    return [
        Rendezvous(
            rank=rank,
            world_size=len(leased),
            local_rank=hosts[:rank].count(one.node),
            hosts=hosts,
            master_addr=leased[0].address,
            master_port=port,
            node_addr=one.address,
            reservation=reservation,
        )
        for rank, one in enumerate(leased)
    ]
