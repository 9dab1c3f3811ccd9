"""A gang of real processes: rank 0 in this one, the others as engine processes that follow."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from llem_ray.backends.process.proxy import ProcessBackend
from llem_ray.core.backend import BackendConfig, LoadReport, LoadSchedule, Rank, Rendezvous, Request, RequestRecord, StepEvent
from llem_ray.core.ports import reserve_port
from llem_ray.core.spec import SamplingSpec

TARGET = "llem_ray.backends.transformers.backend:TransformersBackend"
ADDRESS = "127.0.0.1"


def place(rank: int, world_size: int, port: int, hosts: tuple[str, ...] | None = None) -> Rendezvous:
    return Rendezvous(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        hosts=hosts or ("host-1",) * world_size,
        master_addr=ADDRESS,
        master_port=port,
        node_addr=ADDRESS,
    )


class FollowingRank:
    """A rank above 0 in a process of its own; a thread here loads it and leaves it in ``follow``."""

    def __init__(self, config: BackendConfig, log: Path | None = None, target: str = TARGET) -> None:
        self.backend = ProcessBackend(config, target, sys.executable, log)
        self.error: BaseException | None = None
        self._ranks: tuple[Rank, ...] = ()
        self._loaded = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def ranks(self) -> tuple[Rank, ...]:
        assert self._loaded.wait(150)
        return self._ranks

    def end(self, timeout_s: float = 60.0) -> bool:
        """Wait until it has stopped following by itself."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        self.backend.close()
        assert self.end()

    def _work(self) -> None:
        try:
            self.backend.load()
            self._ranks = self.backend.identity()
            self._loaded.set()
            self.backend.follow()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        finally:
            self._loaded.set()


class GangBackend:
    """The whole gang behind the seam of one engine: what an executor does with a backend for each process.

    Processes are as many as ranks, unless a number is given.
    """

    def __init__(
        self, config: BackendConfig, hosts: tuple[str, ...] | None = None, target: str = TARGET, processes: int | None = None
    ) -> None:
        self._config = config
        self._hosts = hosts
        self._target = target
        self._processes = processes or config.engine.world_size
        module, _, name = target.partition(":")
        self._factory = getattr(import_module(module), name)
        self.leader = self._factory(self._placed(0, 1))
        self.followers: list[FollowingRank] = []

    def check(self) -> None:
        self.leader.check()

    def load(self) -> LoadReport:
        self.close()
        port = reserve_port()
        self.leader = self._factory(self._placed(0, port))
        self.followers = [FollowingRank(self._placed(rank, port), target=self._target) for rank in range(1, self._processes)]
        try:
            return self.leader.load()
        except BaseException:
            self.close()
            raise

    def identity(self) -> tuple[Rank, ...]:
        return (*self.leader.identity(), *(rank for follower in self.followers for rank in follower.ranks))

    def encode(self, texts: Any) -> list[list[int]]:
        return self.leader.encode(texts)

    def encode_chats(self, chats: Any) -> list[list[int]]:
        return self.leader.encode_chats(chats)

    def run(
        self, requests: Any, sampling: SamplingSpec, schedule: LoadSchedule | None = None
    ) -> Iterator[StepEvent | RequestRecord]:
        return self.leader.run(requests, sampling, schedule)

    def reset(self) -> None:
        self.leader.reset()

    def close(self) -> None:
        self.leader.close()
        for follower in self.followers:
            follower.close()
        self.followers = []

    def _placed(self, rank: int, port: int) -> BackendConfig:
        return replace(self._config, rendezvous=place(rank, self._processes, port, self._hosts))


def tokens_of(backend: Any, requests: list[Request], sampling: SamplingSpec | None = None) -> list[tuple[int, ...]]:
    events = backend.run(requests, sampling or SamplingSpec())
    with contextlib.closing(events):
        return [event.output_token_ids for event in events if isinstance(event, RequestRecord)]
