"""Holds one node's power sampler. A plain class: Ray makes an actor of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

import psutil

from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.power import SampleBatch, SamplerInfo
from llem_ray.core.units import NS_PER_S
from llem_ray.execution.calls import Fetched
from llem_ray.execution.memory import with_memory_limit
from llem_ray.power.host import host_id
from llem_ray.power.sampler import SamplerLoop
from llem_ray.power.sources import open_sources, without_devices
from llem_ray.power.spool import next_epoch, read_spool, remove_epochs

CALIBRATION_S: Final = 2.0
SAME_CLOCK_NS: Final = 5 * NS_PER_S
"""Wall time less monotonic time moves by less while a host is up: by more, it was restarted, and its old samples mean nothing."""


class SamplerHost:
    """Opens the node's power sources, calibrates them and polls them on a thread of its own.

    Args:
        sources: Names of power sources, or ``auto``.
        sample_hz: Polls per second.
        lease_s: Stop polling when nobody fetched for this long; None polls until closed.
        spool_dir: Folder for samples that nobody fetched in time, or None to keep them in memory. What a sampler that died left
            there is handed out by the next one.
        clock: The node's monotonic clock.
    """

    def __init__(
        self,
        sources: Sequence[str] | str,
        sample_hz: float,
        lease_s: float | None = None,
        spool_dir: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._sources: Sequence[str] | Literal["auto"] = "auto" if isinstance(sources, str) else tuple(sources)
        self._sample_hz, self._lease_s = sample_hz, lease_s
        self._spool_dir = Path(spool_dir) / host_id() if spool_dir else None
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._loop: SamplerLoop | None = None
        self._epoch = 1
        self._recovered: tuple[SampleBatch, ...] = ()
        self._closed = False
        self._asked_ns = self._clock.monotonic_ns()

    @property
    def silence_s(self) -> float:
        """How long nobody has asked anything, s."""
        return (self._clock.monotonic_ns() - self._asked_ns) / NS_PER_S

    def host(self) -> str:
        """Stable id of this host."""
        return host_id()

    def describe(self, skip: Sequence[str] = (), min_epoch: int = 1) -> SamplerInfo:
        """Who samples, which devices, how their sensors behave. The first call opens the sources and starts to poll.

        Args:
            skip: UUIDs of devices to leave out.
            min_epoch: This sampler's epoch is this or a later one.

        Raises:
            PowerError: A source that was asked for by name cannot work here.
            PluginError: It is unknown, or not installed.
        """
        self._asked_ns = self._clock.monotonic_ns()
        with self._lock:
            if self._loop is None:
                self._loop = self._open(skip, min_epoch)
            info = self._loop.info()
            return replace(info, host=with_memory_limit(info.host))

    def fetch(self, after_seq: int, epoch: int) -> Fetched:
        """All batches after ``after_seq``, up to now; acknowledges those up to it. Polling that ended with its lease goes on.

        Args:
            after_seq: Number of the last batch that the caller has in safety.
            epoch: Epoch that it counts in.
        """
        received_ns = self._asked_ns = self._clock.monotonic_ns()
        with self._lock:
            batches: tuple[SampleBatch, ...] = ()
            if self._loop is not None:
                if not self._closed:
                    self._loop.start()
                if self._recovered and epoch == self._epoch and after_seq > 0:
                    self._forget_recovered()
                batches = (*self._recovered, *self._loop.fetch(after_seq, flush=True, epoch=epoch))
            return Fetched(batches=batches, received_ns=received_ns, replied_ns=self._clock.monotonic_ns())

    def probe(self) -> tuple[int, int]:
        """This host's clock when the question arrived and when the answer left, ns."""
        received_ns = self._clock.monotonic_ns()
        return received_ns, self._clock.monotonic_ns()

    def alive(self, pids: Sequence[int]) -> tuple[int, ...]:
        """Those of the processes that still exist here; one that only waits to be reaped holds nothing any more."""
        return tuple(pid for pid in pids if _exists(pid))

    def close(self) -> None:
        """Stop polling and release the meters; all that was sampled has been fetched, so the spool goes too."""
        with self._lock:
            self._closed = True
            if self._loop is not None:
                self._loop.close()
                if self._spool_dir is not None and self._loop.info().devices:  # without devices another one samples here
                    remove_epochs(self._spool_dir, before=self._epoch + 1)

    def _open(self, skip: Sequence[str], min_epoch: int) -> SamplerLoop:
        opened, unavailable = open_sources(self._sources)
        self._epoch = min_epoch
        if self._spool_dir is not None:
            self._epoch = max(min_epoch, next_epoch(self._spool_dir))
            self._recovered = self._recover(self._spool_dir)
        loop = SamplerLoop(
            without_devices(opened, skip),
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

    def _recover(self, spool_dir: Path) -> tuple[SampleBatch, ...]:
        """What earlier samplers of this run left here, if their clock is still ours."""
        spool_dir.mkdir(parents=True, exist_ok=True)
        mark = spool_dir / "clock"
        now_ns = time.time_ns() - self._clock.monotonic_ns()
        try:
            same = abs(int(mark.read_text()) - now_ns) < SAME_CLOCK_NS
        except (OSError, ValueError):
            same = False
        if not same:
            remove_epochs(spool_dir, before=self._epoch)
        mark.write_text(str(now_ns))
        return tuple(read_spool(spool_dir))

    def _forget_recovered(self) -> None:
        self._recovered = ()
        if self._spool_dir is not None:
            remove_epochs(self._spool_dir, before=self._epoch)


def _exists(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
