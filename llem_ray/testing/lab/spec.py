"""What a lab's host is to be, and GPUs for it."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from llem_ray.testing.nvml import Gpu, Waveform

_NAME: Final = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?")
_UUIDS: Final = uuid.UUID("6f1d9f0e-5d4c-4f8e-9a53-0f6f3c1f7a11")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSpec:
    """One host of a lab.

    Raises:
        ValueError: The name is not a host name of lower-case letters, digits and hyphens, or a number is negative.
    """

    name: str
    """The host name inside."""
    gpus: tuple[Gpu, ...] = ()
    """What this host's fake NVML shows; without any the host has no NVML."""
    joins: bool = True
    """Whether it runs a raylet. A host that does not join is a client: an address in the cluster's network."""
    monotonic_offset_s: int = 0
    """Shift of CLOCK_MONOTONIC and CLOCK_BOOTTIME against the machine's, s. CLOCK_REALTIME is common to all."""
    num_cpus: int = 4
    """What Ray is told; the cores themselves are shared by all hosts."""
    num_gpus: int | None = None
    """What Ray is told; None: the number of ``gpus``."""
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    """Further environment variables of everything on this host."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"a host's name is lower-case letters, digits and hyphens, at most 32, not {self.name!r}")
        if self.num_cpus < 0 or (self.num_gpus is not None and self.num_gpus < 0):
            raise ValueError(f"{self.name}: num_cpus and num_gpus must be at least 0, not {self.num_cpus} and {self.num_gpus}")
        for key, value in self.labels.items():
            if not key or re.search(r"[,=\s]", key + value):
                raise ValueError(f"{self.name}: a label has no comma, equals sign or space, unlike {key!r}: {value!r}")


def default_gpus(host: str, count: int, seed: int = 0) -> tuple[Gpu, ...]:
    """GPUs that each serve a load of their own: prefill (600 to 680 W), decode (300 to 450 W) and pause (100 to 200 W).

    Args:
        host: Distinguishes the UUIDs and loads of several hosts.
        count: How many.
        seed: The same arguments give the same GPUs.
    """
    return tuple(
        Gpu(uuid=f"GPU-{uuid.uuid5(_UUIDS, f'{host}/{index}/{seed}')}", waveform=_serving(f"{host}/{index}/{seed}"), seed=seed)
        for index in range(count)
    )


def _serving(seed: str) -> Waveform:
    rng = random.Random(seed)  # noqa: S311
    # Scenario time 0 is inside the first cycle, so that the phases of the GPUs differ, too.
    begin_s = t_s = -rng.uniform(0.0, 2.0)
    segments: list[tuple[float, float, str]] = []
    for _ in range(rng.randint(3, 6)):
        for low_w, high_w, short_s, long_s in ((600, 680, 0.08, 0.25), (300, 450, 0.3, 0.9), (100, 200, 0.05, 0.3)):
            segments.append((t_s, round(rng.uniform(low_w, high_w), 1), "step"))
            t_s += rng.uniform(short_s, long_s)
    return Waveform.of(segments, repeat_s=t_s - begin_s)
