"""Holds one node's power sampler. A plain class: Ray makes an actor of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.power import SampleBatch, SamplerInfo
from llem_ray.power.host import host_id
from llem_ray.power.sampler import SamplerLoop
from llem_ray.power.sources import open_sources

CALIBRATION_S = 2.0


class SamplerHost:
    """Opens the node's power sources, calibrates them and polls them on a thread of its own.

    Args:
        sources: Names of power sources, or ``auto``.
        sample_hz: Polls per second.
        epoch: Counts the sampler's restarts on this node, from 1.
        lease_s: Stop polling when nobody fetched for this long; None polls until closed.
        spool_dir: Folder for samples that nobody fetched in time, or None to keep them in memory.
        clock: The node's monotonic clock.
    """

    def __init__(
        self,
        sources: Sequence[str] | str,
        sample_hz: float,
        epoch: int = 1,
        lease_s: float | None = None,
        spool_dir: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._sources: Sequence[str] | Literal["auto"] = "auto" if isinstance(sources, str) else tuple(sources)
        self._sample_hz, self._epoch, self._lease_s = sample_hz, epoch, lease_s
        self._spool_dir = Path(spool_dir) if spool_dir else None
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._loop: SamplerLoop | None = None
        self._closed = False

    def describe(self) -> SamplerInfo:
        """Who samples, which devices, how their sensors behave. The first call opens the sources and starts to poll.

        Raises:
            PowerError: A source that was asked for by name cannot work here.
            PluginError: It is unknown, or not installed.
        """
        with self._lock:
            if self._loop is None:
                self._loop = self._open()
            return self._loop.info()

    def fetch(self, after_seq: int) -> list[SampleBatch]:
        """All batches after ``after_seq``, up to now; acknowledges those up to it. Polling that ended with its lease goes on."""
        with self._lock:
            if self._loop is None:
                return []
            if not self._closed:
                self._loop.start()
            return self._loop.fetch(after_seq, flush=True, epoch=self._epoch)

    def close(self) -> None:
        """Stop polling and release the meters."""
        with self._lock:
            self._closed = True
            if self._loop is not None:
                self._loop.close()

    def _open(self) -> SamplerLoop:
        opened, unavailable = open_sources(self._sources)
        loop = SamplerLoop(
            opened,
            node=host_id(),
            clock=self._clock,
            sample_hz=self._sample_hz,
            epoch=self._epoch,
            unavailable=unavailable,
            lease_s=self._lease_s,
            spool_dir=self._spool_dir,
        )
        loop.calibrate(CALIBRATION_S)
        loop.start()
        return loop
