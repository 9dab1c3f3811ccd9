"""The ledger of a whole run: every device of every host, at every instant, in exactly one phase."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from llem_ray.core.energy import Phase, PhaseEnergy, PhaseSpan
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.energy.ledger import DeviceLedger
from llem_ray.execution.meter import GPU_SCOPES, Meter
from llem_ray.execution.records import GangPlaced, GangRecord, HostDevice, LaneClosed, LaneOpened
from llem_ray.results.rows import phase_row

UNLEASED_ROW_S: Final = 600.0
"""Time outside any gang is told in rows of at most this length."""

Row = dict[str, Any]


@dataclass(slots=True)
class _Lane:
    """Who may hold devices of some hosts from ``begin_ns`` on."""

    hosts: frozenset[str]
    begin_ns: int
    gang: GangRecord | None = None


@dataclass(slots=True)
class _Book:
    """One device's ledger, in the time of its host."""

    item: HostDevice
    generation: int
    ledger: DeviceLedger
    at_ns: int
    """Up to where it is accounted for, on the run driver's clock."""
    idle: PhaseEnergy | None = None
    """Time outside any gang that has not been told yet."""


@dataclass(slots=True)
class RunLedger:
    """Ledgers of all devices.

    Args:
        meter: Where samples come from.
        begin_ns: Start of the run on its driver's clock.
    """

    meter: Meter
    begin_ns: int
    _books: dict[str, dict[str, _Book]] = field(init=False, default_factory=dict)
    """By host and UUID."""
    _lanes: dict[str, _Lane] = field(init=False, default_factory=dict)
    _lanes_on: dict[str, dict[str, None]] = field(init=False, default_factory=dict)
    """Host -> names of its lanes, in the order they were opened."""
    _startup_end_ns: int = field(init=False, default=0)
    _rest: list[Row] = field(init=False, default_factory=list)
    """Of books that a restart of their host closed."""

    def __post_init__(self) -> None:
        self._startup_end_ns = self.begin_ns

    def open_lane(self, event: LaneOpened) -> None:
        """Some devices of its hosts may be a gang's from now on."""
        self._lanes[event.lane] = _Lane(frozenset(event.hosts), event.begin_ns)
        self._note_hosts(event.lane, event.hosts)

    def place_gang(self, event: GangPlaced) -> None:
        """Now it is known which."""
        self._lanes[event.lane].gang = event.gang
        self._note_hosts(event.lane, event.gang.hosts)

    def close_lane(self, event: LaneClosed) -> None:
        """They are nobody's again."""
        self._lanes.pop(event.lane, None)
        for lanes in self._lanes_on.values():
            lanes.pop(event.lane, None)

    def _note_hosts(self, lane: str, hosts: Iterable[str]) -> None:
        for host in hosts:
            self._lanes_on.setdefault(host, {})[lane] = None

    def add(self, gang: GangRecord, spans: Sequence[PhaseSpan]) -> list[Row]:
        """Account for new spans of a gang's devices and of its hosts' CPUs."""
        rows: list[Row] = []
        for item in (*gang.devices, *gang.context):
            if item.device.scope in GPU_SCOPES and item not in gang.devices:
                continue
            if self._holder(item) is gang:
                rows += self._extend(self._book(item), spans, gang.name)
        return rows

    def add_to_all(self, spans: Sequence[PhaseSpan]) -> Iterator[tuple[str, list[Row]]]:
        """Account for new spans of all devices that no lane has, host by host: which it was, and rows."""
        if spans and spans[-1].phase == "startup":
            self._startup_end_ns = spans[-1].end_ns
        for host in self.meter.hosts:
            rows: list[Row] = []
            for book in self._books_on(host):
                if self._holder(book.item) is None:
                    rows += self._extend(book, spans, None)
            yield host, rows

    def advance(self, host: str, until_ns: int) -> list[Row]:
        """Account for devices of a host that no lane has up to ``until_ns`` of our clock; it must have been sampled."""
        rows: list[Row] = []
        if self.meter.is_silent(host):
            return rows
        for book in self._books_on(host):
            if until_ns > book.at_ns and not self._is_reserved(book.item):
                span = PhaseSpan(phase="unleased", begin_ns=book.at_ns, end_ns=until_ns)
                rows += self._extend(book, [span], None, goes_on=True)
        return rows

    def finish(self) -> list[Row]:
        """What had not been told yet."""
        rows, self._rest = self._rest, []
        for books in self._books.values():
            for book in books.values():
                rows += self._tell_idle(book)
        return rows

    def accounted_ns(self, host: str) -> int | None:
        """Up to where all devices of a host are accounted for, on the host's clock; None when it has none."""
        return min((book.ledger.end_ns for book in self._books.get(host, {}).values()), default=None)

    def _books_on(self, host: str) -> Iterator[_Book]:
        if self.meter.clocks.latest(host) is None:
            return
        for device in self.meter.devices(host):
            yield self._book(HostDevice(host=host, device=device))

    def _book(self, item: HostDevice) -> _Book:
        generation = self.meter.generation(item.host)
        books = self._books.setdefault(item.host, {})
        book = books.get(item.device.uuid)
        if book is None or book.generation != generation:
            # After a restart of the host its old clock means nothing: accounting begins anew where samples do.
            begin_ns = self.begin_ns
            if book is not None:
                begin_ns = self._first_sample_ns(item, book.at_ns)
                self._rest += self._end_boot(book, begin_ns)
            book = books[item.device.uuid] = _Book(item, generation, self._new_ledger(item, begin_ns), begin_ns)
        return book

    def _end_boot(self, book: _Book, until_ns: int) -> list[Row]:
        """Cover the time until the host's next boot, on the clock of the one before: nobody knows what was spent in it."""
        begin_ns, length_ns = book.ledger.end_ns, until_ns - book.at_ns
        if length_ns <= 0:
            return self._tell_idle(book)
        nothing = self.meter.trace(book.item.host, book.item.device.uuid, 0, -1)
        span = PhaseSpan(phase="unleased", begin_ns=begin_ns, end_ns=begin_ns + length_ns)
        rows = [row for energy in book.ledger.add(nothing, [span]) for row in self._keep_idle(book, energy)]
        return rows + self._tell_idle(book)

    def _first_sample_ns(self, item: HostDevice, after_ns: int) -> int:
        """When the samples of a restarted host begin, on our clock."""
        trace = self.meter.trace(item.host, item.device.uuid, -(2**62), 2**62)
        ours_ns = self.meter.clocks.to_own(item.host, int(trace.t_ns[0])) if len(trace) else None
        return max(after_ns, ours_ns or self.meter.restarted_ns(item.host) or after_ns)

    def _new_ledger(self, item: HostDevice, begin_ns: int) -> DeviceLedger:
        offset, latest = self.meter.clocks.offset(item.host, begin_ns), self.meter.clocks.latest(item.host)
        assert offset is not None
        assert latest is not None
        return DeviceLedger(
            device=item.device,
            calibration=self.meter.calibration(item.host, item.device),
            sample_period_s=self.meter.period_s(item.host, item.device),
            begin_ns=begin_ns + offset.offset_ns,
            delta_ns=latest.delta_ns,
        )

    def _is_reserved(self, item: HostDevice) -> bool:
        """A lane has the device, or may come to have it."""
        return any(_may_hold(lane, item) for lane in self._lanes_at(item.host))

    def _holder(self, item: HostDevice) -> GangRecord | None:
        """The gang that accounts for the device: where several share a host, the first of them for its CPU."""
        return next((lane.gang for lane in self._lanes_at(item.host) if lane.gang is not None and _may_hold(lane, item)), None)

    def _lanes_at(self, host: str) -> list[_Lane]:
        """Lanes on a host, in the order they were opened."""
        return [self._lanes[name] for name in self._lanes_on.get(host, ())]

    def _extend(self, book: _Book, spans: Sequence[PhaseSpan], gang: str | None, *, goes_on: bool = False) -> list[Row]:
        wanted = [span for span in spans if span.end_ns > book.at_ns]
        if not wanted:
            return []
        wanted[0] = replace(wanted[0], begin_ns=max(wanted[0].begin_ns, book.at_ns))
        before = list(self._between(book.at_ns, wanted[0].begin_ns))
        local = list(self._on_host(book, [*before, *wanted]))
        gangs_own = local[max(0, len(local) - len(wanted)) :]
        if not local:
            return []
        margin_ns = ns_from_s(self.meter.margin_s(book.item.host, book.item.device))
        trace = self.meter.trace(
            book.item.host, book.item.device.uuid, local[0].begin_ns - margin_ns, local[-1].end_ns + margin_ns
        )
        energies = book.ledger.add(trace, local, goes_on=goes_on)
        book.at_ns = wanted[-1].end_ns
        rows: list[Row] = []
        for energy in energies:
            if energy.span.phase == "unleased":
                rows += self._keep_idle(book, energy)
                continue
            rows += self._tell_idle(book)
            rows.append(phase_row(energy, gang=gang if energy.span in gangs_own else None, node=book.item.host))
        return rows

    def _between(self, begin_ns: int, end_ns: int) -> Iterable[PhaseSpan]:
        """Time that no event tells of: start-up while it lasted, then nobody's."""
        split_ns = min(max(self._startup_end_ns, begin_ns), end_ns)
        phases: tuple[tuple[Phase, int, int], ...] = (("startup", begin_ns, split_ns), ("unleased", split_ns, end_ns))
        return [PhaseSpan(phase=phase, begin_ns=begin, end_ns=end) for phase, begin, end in phases if end > begin]

    def _on_host(self, book: _Book, spans: Iterable[PhaseSpan]) -> Iterator[PhaseSpan]:
        """Adjoining spans on the clock of the device's host: each begins where the one before ended, whatever offsets do."""
        at_ns = book.ledger.end_ns
        for span in spans:
            end_ns = self.meter.clocks.to_host(book.item.host, span.end_ns)
            if end_ns is None or end_ns <= at_ns:
                continue
            yield replace(span, begin_ns=at_ns, end_ns=end_ns)
            at_ns = end_ns

    def _keep_idle(self, book: _Book, energy: PhaseEnergy) -> list[Row]:
        """Join it to what came before, as long as that has an energy too and is not long enough for a row of its own."""
        kept = book.idle
        if kept is None:
            book.idle = energy
            return []
        length_s = (energy.span.end_ns - kept.span.begin_ns) / NS_PER_S
        if length_s > UNLEASED_ROW_S or kept.method != energy.method or (kept.energy_j is None) != (energy.energy_j is None):
            rows = self._tell_idle(book)
            book.idle = energy
            return rows
        book.idle = replace(
            kept,
            span=replace(kept.span, end_ns=energy.span.end_ns),
            energy_j=None if kept.energy_j is None or energy.energy_j is None else kept.energy_j + energy.energy_j,
            # The boundary between the two cancels in their sum, so this is a little too large.
            u_j=None if kept.u_j is None or energy.u_j is None else math.hypot(kept.u_j, energy.u_j),
        )
        return []

    def _tell_idle(self, book: _Book) -> list[Row]:
        kept, book.idle = book.idle, None
        return [] if kept is None else [phase_row(kept, gang=None, node=book.item.host)]


def _may_hold(lane: _Lane, item: HostDevice) -> bool:
    if lane.gang is None:
        return item.host in lane.hosts
    if item.device.scope in GPU_SCOPES and lane.gang.group.gpus:
        return item in lane.gang.devices
    if item.device.scope in GPU_SCOPES:
        return False
    return item.host in lane.gang.hosts
