"""Polls the power sources of one node, steadily and for as long as it takes."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from llem_ray.core.clock import Clock
from llem_ray.core.errors import PowerError
from llem_ray.core.power import Calibration, Device, PowerSource, SampleBatch, SamplerInfo
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.power.batches import OpenBatch
from llem_ray.power.calibration import DEFAULT_LAG_S, calibrate_sources
from llem_ray.power.host import read_host_facts
from llem_ray.power.lanes import PowerLane, StateLane, followed_tick_s, polling_period_s
from llem_ray.power.spool import Spool

KEEP_S: Final = 3600.0
"""Unacknowledged batches older than this leave memory, if the spool has them."""

NAP_NS: Final = 200_000_000
"""The thread looks up at least this often, so that it stops promptly."""

MAX_NOTES: Final = 50


class SamplerLoop:
    """Samples every device of one node and hands the samples out in numbered batches.

    A plain class: host it in an actor, in a thread, or call ``run_until`` yourself. All methods may be called from any
    thread, except that ``calibrate`` and ``run_until`` refuse while the sampler's own thread runs.

    Each source is polled about every min(1/sample_hz, T/2), where T is the tick period of its slowest-to-follow counter, but
    never in step with it, see ``lanes.detuned_period_s``
    (counters that tick faster than 15 ms are fresh at every poll and keep 1/sample_hz), never faster than the source's
    ``max_hz``. Deadlines are absolute, so they never drift; a deadline that was missed is skipped, and samples carry the
    time they were really taken. When a source's reads take over half of its period, the period is lengthened, see
    ``lanes.slower_period_s`` (and shortened again once reads are quick): ``info().notes`` says so and ``info().periods_s`` has
    the period in force. A source that raises yields samples with the error; it never ends the loop. Devices whose method is
    ``unavailable`` give no rows.

    Args:
        sources: Open power sources; the loop closes them in ``close``.
        node: Stable host id, see ``host_id``.
        clock: The clock that the sources stamp their samples with.
        sample_hz: Polls per second.
        epoch: Counts the sampler's restarts on this node, see ``spool.next_epoch``.
        spool_dir: Folder for a copy of every batch until it is acknowledged; None keeps them in memory only.
        batch_s: A batch is closed after this long, unless ``fetch(flush=True)`` closes it before.
        state_hz: Rate of the slow lane (``read_states``).
        unavailable: Power source -> why it gives nothing on this host; goes into ``info()``.
        lag_s: Publication lag of counters whose source does not declare ``lag_s`` itself.
        lease_s: The thread ends when nobody has fetched for this long; ``start`` begins anew. None: never.
        keep_s: Unacknowledged batches older than this leave memory, if the spool has them.

    Raises:
        PowerError: Two sources have a device of the same UUID, or a source cannot list its devices.
    """

    def __init__(
        self,
        sources: Sequence[PowerSource],
        *,
        node: str,
        clock: Clock,
        sample_hz: float = 20.0,
        epoch: int = 1,
        spool_dir: Path | None = None,
        batch_s: float = 5.0,
        state_hz: float = 1.0,
        unavailable: Mapping[str, str] | None = None,
        lag_s: float = DEFAULT_LAG_S,
        lease_s: float | None = None,
        keep_s: float = KEEP_S,
    ) -> None:
        self._sources = tuple(sources)
        self._node, self._epoch, self._clock = node, epoch, clock
        self._sample_hz, self._lag_s = sample_hz, lag_s
        self._batch_ns, self._keep_ns = ns_from_s(batch_s), ns_from_s(keep_s)
        self._lease_ns = None if lease_s is None else ns_from_s(lease_s)
        self._unavailable = dict(unavailable or {})
        self._devices = _distinct_devices(self._sources)
        self._host = read_host_facts()
        self._calibrations: dict[str, Calibration] = {}
        self._power_lanes = [
            PowerLane(source, polling_period_s(source, sample_hz, None), clock, self._note) for source in self._sources
        ]
        self._lanes: list[PowerLane | StateLane] = [
            *self._power_lanes,
            *(StateLane(source, 1.0 / state_hz, clock, self._note) for source in self._sources),
        ]
        self._lock = threading.Lock()
        self._open = self._new_open()
        self._closed: deque[SampleBatch] = deque()
        self._next_seq = 1
        self._notes: deque[str] = deque(maxlen=MAX_NOTES)
        self._spool = None if spool_dir is None else Spool(spool_dir, epoch=epoch)
        self._renewed_ns = clock.monotonic_ns()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def running(self) -> bool:
        """The sampler's own thread is polling."""
        return self._thread is not None and self._thread.is_alive()

    def calibrate(self, duration_s: float = 2.0) -> Mapping[str, Calibration]:
        """Watch every device closely for ``duration_s`` and set the polling periods accordingly.

        Returns:
            Device UUID -> calibration.

        Raises:
            RuntimeError: The sampler's thread runs.
        """
        self._refuse_while_running("calibrate")
        calibrations = calibrate_sources(self._sources, self._clock, duration_s=duration_s, lag_s=self._lag_s)
        with self._lock:
            self._calibrations.update(calibrations)
            for lane in self._power_lanes:
                tick_s = followed_tick_s(lane.source, self._calibrations)
                lane.set_period(polling_period_s(lane.source, self._sample_hz, tick_s), tick_s)
            self._cut()
            self._open = self._new_open()
        return calibrations

    def run_until(self, t_ns: int) -> None:
        """Poll on the caller's thread until the clock shows ``t_ns``; a poll due exactly then is made.

        Raises:
            RuntimeError: The sampler's thread runs.
        """
        self._refuse_while_running("run_until")
        self._begin_lanes()
        while (due_ns := self._due_ns()) <= t_ns:
            self._clock.sleep_until_ns(due_ns)
            self._poll_due()
        self._clock.sleep_until_ns(t_ns)

    def start(self) -> None:
        """Poll on a thread of our own from now on; does nothing while one runs. Renews the lease."""
        if self.running:
            return
        self._stop.clear()
        self._renewed_ns = self._clock.monotonic_ns()
        self._begin_lanes()
        self._thread = threading.Thread(target=self._run, name="llem-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it. What was sampled stays to be fetched; ``start`` may follow."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def fetch(self, after_seq: int, *, flush: bool = False, epoch: int | None = None) -> list[SampleBatch]:
        """The batches numbered above ``after_seq``, in order; those up to it are acknowledged and freed. Renews the lease.

        Args:
            after_seq: Number of the last batch that the caller has in safety; 0 at first.
            flush: Close the batch being filled, so that everything sampled so far is returned.
            epoch: Epoch that ``after_seq`` counts in. When it is not this sampler's, because the sampler was restarted in
                between, ``after_seq`` says nothing about its batches: all are returned, none are freed.
        """
        with self._lock:
            self._renewed_ns = self._clock.monotonic_ns()
            if flush:
                self._cut()
            if after_seq >= self._next_seq or epoch not in (None, self._epoch):
                after_seq = 0
            while self._closed and self._closed[0].seq <= after_seq:
                self._closed.popleft()
            held = list(self._closed)
            wanted = range(after_seq + 1, held[0].seq if held else self._next_seq)
        if self._spool is None:
            return held
        spooled = self._spool.read(wanted) if wanted else []
        self._spool.acknowledge(after_seq)
        return spooled + held

    def info(self) -> SamplerInfo:
        """Who samples this node, what it found, and what it had to do about trouble."""
        with self._lock:
            notes = tuple(self._notes)
            periods_s = {uuid: lane.period_s for lane in self._power_lanes for uuid in lane.uuids}
            calibrations = dict(self._calibrations)
        if self._spool is not None and self._spool.error:
            notes += (f"spool lost: {self._spool.error}",)
        return SamplerInfo(
            node=self._node,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            epoch=self._epoch,
            sample_hz=self._sample_hz,
            devices=self._devices,
            calibrations=calibrations,
            unavailable=dict(self._unavailable),
            host=self._host,
            periods_s=periods_s,
            notes=notes,
        )

    def close(self) -> None:
        """Stop, and close the sources and the spool; may be called more than once."""
        if self._is_closed:
            return
        self._is_closed = True
        self.stop()
        with self._lock:
            self._cut()
        for source in self._sources:
            source.close()
        if self._spool is not None:
            self._spool.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            now_ns = self._clock.monotonic_ns()
            if self._lease_ns is not None and now_ns > self._renewed_ns + self._lease_ns:
                self._note(f"nobody fetched for {self._lease_ns / NS_PER_S:g} s: sampling ended with its lease")
                return
            due_ns = self._due_ns()
            self._clock.sleep_until_ns(min(due_ns, now_ns + NAP_NS))
            if due_ns > now_ns + NAP_NS:
                continue
            try:
                self._poll_due()
            except Exception as error:  # noqa: BLE001 - a malformed sample must not end the sampling of a whole run
                self._note(f"poll lost: {type(error).__name__}: {error}")

    def _begin_lanes(self) -> None:
        now_ns = self._clock.monotonic_ns()
        for lane in self._lanes:
            lane.begin(now_ns)

    def _due_ns(self) -> int:
        return min((lane.next_ns for lane in self._lanes), default=self._clock.monotonic_ns() + NAP_NS)

    def _poll_due(self) -> None:
        now_ns = self._clock.monotonic_ns()
        for lane in self._lanes:
            if lane.next_ns > now_ns:
                continue
            lane.schedule(now_ns)
            if isinstance(lane, PowerLane):
                samples = lane.poll()
                with self._lock:
                    self._cut_if_due(now_ns, len(samples))
                    strangers = self._open.extend(samples)
                for uuid in strangers:
                    self._note(f"{lane.source.name}: sample of {uuid!r}, which it did not list, left out")
            else:
                states = lane.poll()
                with self._lock:
                    self._open.extend_states(states)

    def _new_open(self) -> OpenBatch:
        rows_per_s = sum(len(lane.uuids) / lane.period_s for lane in self._power_lanes)
        rows_per_poll = sum(len(lane.uuids) for lane in self._power_lanes)
        rows = int(rows_per_s * self._batch_ns / NS_PER_S) + 2 * rows_per_poll
        return OpenBatch(tuple(device.uuid for device in self._devices), max(rows, 64))

    def _cut_if_due(self, now_ns: int, rows: int) -> None:
        first_ns = self._open.first_ns
        if first_ns is not None and (now_ns - first_ns >= self._batch_ns or not self._open.has_room(rows)):
            self._cut()

    def _cut(self) -> None:
        if self._open.first_ns is None:
            return
        batch = self._open.cut(node=self._node, epoch=self._epoch, seq=self._next_seq)
        self._next_seq += 1
        self._closed.append(batch)
        if self._spool is not None:
            self._spool.append(batch)
            self._drop_spooled(self._clock.monotonic_ns() - self._keep_ns, self._spool.written_seq)

    def _drop_spooled(self, before_ns: int, written_seq: int) -> None:
        while self._closed and self._closed[0].seq <= written_seq and _last_ns(self._closed[0]) < before_ns:
            self._closed.popleft()

    def _note(self, text: str) -> None:
        with self._lock:
            if text not in self._notes:
                self._notes.append(text)

    def _refuse_while_running(self, what: str) -> None:
        if self.running:
            raise RuntimeError(f"{what}: the sampler's thread is running; call stop() first")


def _last_ns(batch: SampleBatch) -> int:
    return int(batch.t_ns[-1]) if len(batch) else batch.states[-1].t_ns


def _distinct_devices(sources: Sequence[PowerSource]) -> tuple[Device, ...]:
    devices: dict[str, Device] = {}
    for source in sources:
        for device in source.devices():
            if device.uuid in devices:
                raise PowerError(f"device {device.uuid!r} is listed by {devices[device.uuid].source!r} and by {source.name!r}")
            devices[device.uuid] = device
    return tuple(devices.values())
