"""How the ranks of a gang divide a model and its requests among themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from llem_ray.core.spec import EngineSpec

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where one rank stands. A replica of the model is a run of consecutive ranks: stage by stage, shard by shard.

    The first rank of a replica leads it. Rank 0, which leads the first, also leads the leaders of the others.
    """

    tensor: int
    pipeline: int
    data: int
    rank: int

    @classmethod
    def of(cls, engine: EngineSpec, rank: int) -> Layout:
        """The layout of ``engine`` as ``rank`` sees it."""
        return cls(tensor=engine.tensor_parallel, pipeline=engine.pipeline_parallel, data=engine.data_parallel, rank=rank)

    @property
    def world_size(self) -> int:
        """Ranks of the gang."""
        return self.replica_size * self.data

    @property
    def replica_size(self) -> int:
        """Ranks that share one replica of the model."""
        return self.tensor * self.pipeline

    @property
    def place(self) -> int:
        """Number of this rank within its replica."""
        return self.rank % self.replica_size

    @property
    def leader(self) -> int:
        """The rank that leads this rank's replica."""
        return self.rank - self.place

    @property
    def led(self) -> tuple[int, ...]:
        """The ranks that this one tells what to do: the rest of its replica, and for rank 0 the other leaders."""
        if self.place:
            return ()
        members = range(self.rank + 1, self.rank + self.replica_size)
        return (*members, *(range(self.replica_size, self.world_size, self.replica_size) if self.rank == 0 else ()))

    @property
    def text(self) -> str:
        """For people: ``tensor 2 x data 2``."""
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data}
        return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)


def deal(items: Sequence[T], replicas: int) -> list[list[T]]:
    """Deal a batch out, one item to each replica in turn; some get none of a small one."""
    return [list(items[replica::replicas]) for replica in range(replicas)]
