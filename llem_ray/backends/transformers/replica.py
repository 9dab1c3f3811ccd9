"""One rank's part in a replica of the model: how it meets the others, loads its share, and leads or is led through a batch."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from llem_ray.backends.gang.layout import Layout
from llem_ray.backends.gang.links import Circle, Link, gather, meet
from llem_ray.backends.model_source import ModelSource
from llem_ray.backends.process.wire import error_body, pack, restored
from llem_ray.backends.transformers.arguments import TransformersArgs
from llem_ray.backends.transformers.loading import Split, build_model, random_folder, weight_bytes
from llem_ray.backends.transformers.pipeline import require_pipeline
from llem_ray.backends.transformers.process_group import ProcessGroup, require_device_type
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import (
    BackendError,
    ConfigError,
    DeviceMemoryError,
    EngineDied,
    HangError,
    NumericsError,
)

LOAD_S: Final = 6 * 3600.0
"""Longest wait for another rank that loads; the caller's own deadline is shorter."""
SETTLE_S: Final = 5.0
"""How long ranks may take to say how they are, after one of them failed in the middle of a step."""
CLOSE_S: Final = 10.0


class Replica:
    """This process among the ranks of its replica. In the rank that leads it, it is the ``Crew`` of every batch.

    Args:
        config: With a rendezvous.
        args: Of the engine.
        device: Of this rank.
    """

    def __init__(self, config: BackendConfig, args: TransformersArgs, device: torch.device) -> None:
        assert config.rendezvous is not None
        self.config = config
        self.layout = Layout.of(config.engine, config.rendezvous.rank)
        self.circle = Circle(leader=None)
        self.step_timeout_s = args.step_timeout_s
        self.weight_bytes = 0
        self._place = config.rendezvous
        self._meet_timeout_s = args.meet_timeout_s
        self._device = device
        self._broken: str | None = None
        self._call = 0
        self._group: ProcessGroup | None = None
        if self.layout.replica_size > 1:
            self._group = ProcessGroup(
                "nccl" if device.type == "cuda" else "gloo",
                self.layout.place,
                self.layout.replica_size,
                device,
                self._place.node_addr,
                args.step_timeout_s,
            )

    @property
    def backend(self) -> str | None:
        """What torch.distributed uses, or None where a replica is one rank."""
        return self._group.backend if self._group is not None else None

    @property
    def cpu_threads(self) -> int:
        """An equal share of this host's cores for each of the gang's ranks on it."""
        here = self._place.hosts.count(self._place.hosts[self._place.rank])
        return max(1, len(os.sched_getaffinity(0)) // here)

    def meet(self) -> None:
        """Connect to the others.

        Raises:
            LoadError: Not all of them came.
        """
        facts = repr((pack(self.config.model), replace(self.config.engine, python=None)))
        key = hashlib.sha256(facts.encode()).hexdigest()
        self.circle = meet(self._place, self.layout, key, self._meet_timeout_s)

    def build(self, source: ModelSource, args: TransformersArgs, model_config: Any) -> PreTrainedModel:
        """This rank's share of the model; comes back when every rank of the replica has its own.

        Raises:
            LlemRayError: This rank, or another one, cannot load it.
        """
        if self._group is None:
            model = build_model(self.config, source, args, model_config, self._device)
        else:
            model = self._build_share(source, args, model_config)
        self.weight_bytes = weight_bytes(model)
        if self.layout.place:
            self._leader.send(0, "ready", self.weight_bytes)
        else:
            ready = self._gather(self.circle.members, 0, LOAD_S, "loading")
            self.weight_bytes += sum(ready.values())
        if self._group is not None:
            self._group.watch(self.circle.members if self.circle.leader is None else (*self.circle.members, self._leader))
        return model

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Around a batch that this rank leads: however it ends, the others end it too.

        Raises:
            EngineDied: A rank is gone, or failed in a way that the others cannot follow.
        """
        self.require_usable()
        before = self._call
        try:
            yield
        except GeneratorExit:  # given up; the next batch says so if that did not work
            with contextlib.suppress(BackendError):
                self._end(before, None)
            raise
        except Exception as error:
            self._end(before, error)
            raise
        else:
            self._end(before, None)

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """See ``Crew``."""
        self._call += 1
        self._tell_members("batch", [prompts, max_new_tokens])

    def tell(self, chosen: Sequence[int]) -> None:
        """See ``Crew``."""
        self._tell_members("step", chosen)

    def order(self, links: Sequence[Link], kind: str, timeout_s: float) -> None:
        """Have others do something between batches, and wait until they have.

        Raises:
            EngineDied: One is gone.
            HangError: One did not answer.
            BackendError: One failed.
        """
        self.require_usable()
        self._call += 1
        for link in links:
            link.send(self._call, kind, None, timeout_s)
        self._gather(links, self._call, timeout_s, kind)

    def await_ready(self, links: Sequence[Link], timeout_s: float) -> None:
        """Wait for what others say at the end of their load. Raises as ``order``."""
        self._gather(links, 0, timeout_s, "loading")

    def notes(self) -> dict[str, str]:
        """Of the load report."""
        return {"parallelism": self.layout.text} | ({"collectives": self.backend} if self.backend else {})

    def next_call(self) -> int:
        """A number for a call to a deputy."""
        self._call += 1
        return self._call

    def require_usable(self) -> None:
        """Refuse to go on with a gang that was given up.

        Raises:
            EngineDied: It was.
        """
        if self._broken is not None:
            raise EngineDied(self._broken)

    def give_up(self, reason: str) -> None:
        """The gang is of no use any more: whoever waits for this rank is told by the end of its connections."""
        self._broken = self._broken or reason
        self.circle.close()

    def report_failure(self, error: BaseException) -> None:
        """Tell the rank that leads this one why it does not go on."""
        if self.circle.leader is not None:
            with contextlib.suppress(BackendError):
                self.circle.leader.send(0, "error", error_body(error), SETTLE_S)

    def expect_end(self) -> None:
        """The others are about to close: that they hang up is no failure any more."""
        if self._group is not None:
            self._group.watch(())

    def close(self) -> None:
        """Leave the others. The model must be gone: it holds on to the process group."""
        self.circle.close()
        if self._group is not None:
            self._group.close()

    @property
    def _leader(self) -> Link:
        assert self.circle.leader is not None
        return self.circle.leader

    def _build_share(self, source: ModelSource, args: TransformersArgs, model_config: Any) -> PreTrainedModel:
        assert self._group is not None
        require_device_type(self._device)
        require_plan(self.layout, model_config)
        location = random_folder(self.config, source, model_config) if source.random else None
        if self.layout.place:
            self._leader.send(0, "prepared", 0)
            _, kind, body = self._leader.receive(LOAD_S, "loading")
            if kind != "join":
                raise EngineDied(f"{self._leader.name} said {kind!r} while loading")
            address, port = body
        else:
            self._gather(self.circle.members, 0, LOAD_S, "loading")
            address, port = self._group.host()
            for link in self.circle.members:
                link.send(0, "join", [address, port], SETTLE_S)
        self._group.join(address, port)
        split = Split(tensor=self.layout.tensor, pipeline=self.layout.pipeline, location=location)
        return build_model(self.config, source, args, model_config, self._device, split)

    def _tell_members(self, kind: str, body: Any) -> None:
        for link in self.circle.members:
            link.send(self._call, kind, body, self.step_timeout_s)

    def _end(self, before: int, error: Exception | None) -> None:
        if self._call == before or not self.circle.members:
            return
        in_step = error is not None and not isinstance(error, NumericsError)
        timeout_s = SETTLE_S if in_step else self.step_timeout_s
        try:
            self._tell_members("stop", None)
            answers = gather(self.circle.members, self._call, timeout_s, "a batch")
        except (EngineDied, HangError) as problem:
            self.give_up(problem.message)
            raise EngineDied(problem.message, problem.hint) from error
        failures = {rank: restored(body) for rank, (_, body) in answers.items() if body is not None}
        if not failures:
            return
        everywhere = isinstance(error, DeviceMemoryError) and len(failures) == len(self.circle.members)
        # gloo's operations are synchronous: ranks that all ran out of memory did so before the same one.
        if everywhere and self.backend == "gloo" and all(isinstance(item, DeviceMemoryError) for item in failures.values()):
            return
        rank = min(failures)
        reason = f"rank {rank} failed in the middle of a batch: {failures[rank].message}"
        self.give_up(reason)
        raise EngineDied(reason) from error

    def _gather(self, links: Sequence[Link], call: int, timeout_s: float, doing: str) -> Mapping[int, Any]:
        """Bodies of the answers by rank; the first error among them is raised."""
        answers = gather(links, call, timeout_s, doing)
        for link in links:
            kind, body = answers[link.rank]
            if kind == "error":
                error = restored(body)
                raise type(error)(f"{link.name}: {error.message}", *error.args[1:])
        return {rank: body for rank, (_, body) in answers.items()}


def require_plan(layout: Layout, model_config: Any) -> None:
    """Refuse models that transformers cannot split in this way.

    Raises:
        ConfigError: It cannot.
    """
    text_config = model_config.get_text_config()
    if layout.tensor > 1 and not getattr(text_config, "base_model_tp_plan", None):
        raise ConfigError(
            "transformers has no plan to share the layers of this kind of model",
            "use data_parallel, or another engine",
            field="engine.tensor_parallel",
            found=f"{layout.tensor}, model type {text_config.model_type}",
            allowed="1",
        )
    if layout.pipeline > 1:
        require_pipeline(text_config.model_type, layout.pipeline)
