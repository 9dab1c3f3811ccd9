"""What workloads read from files and data sets, each once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from llem_ray.core.workload_spec import LengthSpec, PromptSpec, WorkloadSpec
from llem_ray.workloads.hub_dataset import is_local
from llem_ray.workloads.lengths import load_lengths
from llem_ray.workloads.prompt_files import PromptSet
from llem_ray.workloads.prompts import load_prompts
from llem_ray.workloads.traces import Arrival, load_trace

Lengths = TypeVar("Lengths", int | LengthSpec, int | LengthSpec | None, int | LengthSpec | Literal["recorded"])


class Part(NamedTuple):
    """One thing that a workload reads."""

    field: str
    path: str | None
    """File or folder, as the sweep names it."""
    read: Callable[[], object]
    """Raises as ``Sources.read``."""
    on_hub: bool = False
    """A data set that may have to be fetched."""


class Sources:
    """Prompts, lengths and traces by what a workload says of them. Pickles with what it has read: other hosts need no files.

    Args:
        base_dir: Folder that relative paths start from.
    """

    def __init__(self, base_dir: str | os.PathLike[str]) -> None:
        self._base_dir = base_dir
        self._prompts: dict[tuple[PromptSpec, bool], PromptSet] = {}
        self._lengths: dict[LengthSpec, LengthSpec] = {}
        self._traces: dict[str, tuple[Arrival, ...]] = {}

    def read(self, workload: WorkloadSpec) -> None:
        """Read all that the workload names.

        Raises:
            ConfigError: A file or data set is missing or malformed.
            PluginError: The library that reads a data set is not installed.
        """
        for part in self.parts(workload):
            part.read()

    def parts(self, workload: WorkloadSpec) -> Iterator[Part]:
        """All that the workload names."""
        prompts, trace = workload.prompts, workload.load.trace
        if prompts.source == "file":
            yield Part("workload.prompts.path", prompts.path, lambda: self.prompts(workload))
        elif prompts.source == "dataset":
            on_hub = prompts.dataset is not None and not is_local(prompts.dataset, Path(self._base_dir))
            yield Part(
                "workload.prompts.dataset", None if on_hub else prompts.dataset, lambda: self.prompts(workload), on_hub=on_hub
            )
        else:
            yield Part("workload.prompts", None, lambda: self.prompts(workload))
        for name in ("input_tokens", "output_tokens", "turns"):
            lengths, field = getattr(workload, name), f"workload.{name}"
            if isinstance(lengths, LengthSpec) and lengths.path is not None:
                yield Part(f"{field}.path", lengths.path, partial(self._resolved, lengths, field))
        if trace is not None:
            yield Part("workload.load.trace", trace, lambda: self.trace(trace))

    def prompts(self, workload: WorkloadSpec) -> PromptSet:
        """The prompts of a workload, with all turns of recorded conversations. Raises as ``read``."""
        key = _prompts_key(workload)
        if key not in self._prompts:
            self._prompts[key] = load_prompts(key[0], self._base_dir, all_turns=workload.recorded)
        return self._prompts[key]

    def resolved(self, workload: WorkloadSpec) -> WorkloadSpec:
        """The workload with the lengths of files written out. Raises as ``read``."""
        return replace(
            workload,
            input_tokens=self._resolved(workload.input_tokens, "workload.input_tokens"),
            output_tokens=self._resolved(workload.output_tokens, "workload.output_tokens"),
            turns=self._resolved(workload.turns, "workload.turns"),
        )

    def trace(self, path: str | None) -> tuple[Arrival, ...]:
        """The arrivals of a trace, none without a path. Raises as ``read``."""
        if path is None:
            return ()
        if path not in self._traces:
            self._traces[path] = load_trace(path, self._base_dir)
        return self._traces[path]

    def part(self, workloads: Iterable[WorkloadSpec]) -> Sources:
        """What these workloads read from files and data sets, to be sent elsewhere. Raises as ``read``."""
        part = Sources(self._base_dir)
        for workload in workloads:
            if workload.prompts.source in ("file", "dataset"):
                part._prompts[_prompts_key(workload)] = self.prompts(workload)
            if (path := workload.load.trace) is not None:
                part._traces[path] = self.trace(path)
            self.resolved(workload)
            for lengths in (workload.input_tokens, workload.output_tokens, workload.turns):
                if isinstance(lengths, LengthSpec) and lengths in self._lengths:
                    part._lengths[lengths] = self._lengths[lengths]
        return part

    def _resolved(self, lengths: Lengths, field: str) -> Lengths:
        if not isinstance(lengths, LengthSpec) or lengths.path is None:
            return lengths
        if lengths not in self._lengths:
            self._lengths[lengths] = load_lengths(lengths, self._base_dir, field)
        return self._lengths[lengths]


def _prompts_key(workload: WorkloadSpec) -> tuple[PromptSpec, bool]:
    """What decides which texts are read."""
    return replace(workload.prompts, chat_template=False), workload.recorded
