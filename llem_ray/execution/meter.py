"""The run driver's side of the samplers: fetches what they measured and keeps it until every window is accounted for."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from llem_ray import __version__
from llem_ray.core.clock import Clock
from llem_ray.core.errors import LlemRayError, PlacementError, Unreachable
from llem_ray.core.power import SampleBatch, SamplerInfo
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.execution.calls import Call, Executor, Fetched, Node, Sampler, SamplerSettings
from llem_ray.execution.clocks import Exchange
from llem_ray.execution.probing import ClockProber
from llem_ray.execution.sampled_hosts import SampledHost, SampledHosts
from llem_ray.execution.starter import SamplerStarter, Started
from llem_ray.power.traces import TraceBuffer

LOG = logging.getLogger(__name__)

FETCH_TIMEOUT_S: Final = 10.0
SILENT_S: Final = 30.0
"""A sampler that does not answer for so long is taken for dead."""
LATE_S: Final = 2.0
"""An answer that takes longer is late: what it brings may be waited for."""
COLLECT_S: Final = 0.5
LAST_S: Final = 10.0
"""The last samples are waited for that long."""
ENOUGH_ROWS: Final = 131_072
"""Samples taken at a time, more or less."""
ASKED_AT_ONCE: Final = 64
"""Samplers that have not answered within a glance do not count."""
GLANCE_S: Final = 0.05
NODES_PER_S: Final = 50
MAX_PERIOD_S: Final = 5.0
LATEST_NS: Final = 6 * NS_PER_S
"""A power that is older is not shown."""
RESTARTED_NS: Final = NS_PER_S
"""A host whose clock is off by more than this from what it showed before was restarted."""

GPU_SCOPES: Final = frozenset({"gpu", "module"})


@dataclass(slots=True)
class _Link:
    """One sampler that polls."""

    node: Node
    sampler: Sampler
    info: SamplerInfo
    answered_ns: int
    """When its latest answer came, on the run driver's clock."""
    after_seq: int = 0
    pending: Call[Fetched] | None = None
    sent_ns: int = 0
    unanswered_ns: int | None = None
    """When the first of the questions that it has not answered was sent."""
    round: int = 0
    due_ns: int = 0
    leaving: bool = False
    """Its next answer is its last."""
    fresh: bool = True
    """Nothing has been fetched from it yet."""

    @property
    def host(self) -> str:
        return self.info.node


class Meter(SampledHosts):
    """All samplers of a run. Its methods may be called from any thread; ``pump`` from one at a time.

    Args:
        executor: Where samplers are started.
        settings: How they work.
        clock: The run driver's clock.
        own_host: Stable id of the run driver's host.
        on_sampler: Told of every sampler that starts, again too.
    """

    def __init__(
        self,
        executor: Executor,
        settings: SamplerSettings,
        clock: Clock,
        own_host: str,
        on_sampler: Callable[[SamplerInfo], None],
    ) -> None:
        super().__init__(own_host, settings.sample_hz)
        self._executor, self._clock = executor, clock
        self._on_sampler = on_sampler
        self._prober = ClockProber(self.clocks, clock, self.sampler_of)
        self._links: dict[str, _Link] = {}
        self._links_of: dict[str, tuple[_Link, ...]] = {}
        """The same by host."""
        self._starter = SamplerStarter(executor, settings, clock, self._learn_host, self._begin_of)
        self._gpu_hosts: dict[str, SamplerInfo] = {}
        """UUID -> who reported the GPU first."""
        self._hosts: dict[str, str] = {}
        self._epochs: dict[str, int] = {}
        self._round = 0
        """Counts the times that all were to be asked, due or not."""
        self.given_up = False
        """Nothing more will come."""
        self.is_behind = False
        """The last ``pump`` ran out of time before it had asked all that were due."""
        self.samples_per_s = 0.0
        """Samples that all hosts yield together, about."""

    def open(self, nodes: Iterable[Node]) -> tuple[SamplerInfo, ...]:
        """Start the samplers of all nodes and wait until they poll.

        Raises:
            PowerError: A source asked for by name works on none of the nodes.
            PlacementError: Two hosts report the same GPU.
            HangError: No sampler started in time.
        """
        self.adopt(nodes)
        first: LlemRayError | None = None
        while self._starter.is_busy():
            self._starter.wait(GLANCE_S)
            first = self._serve_started() or first
        if first is not None and (not self._links or isinstance(first, PlacementError)):
            raise first
        return self.infos

    def adopt(self, nodes: Iterable[Node]) -> None:
        """Start samplers on those of the nodes that nobody samples; ``pump`` brings them into service."""
        for node in () if self.given_up else nodes:
            with self._lock:
                host = self._hosts.get(node.node_id)
                served = node.node_id in self._links or (host is not None and self.is_in_service(host))
            if not served:
                self._starter.want(node)

    def drop(self, node_id: str, reason: str) -> None:
        """The node is gone: its samples so far stay. Its host may come back as another node."""
        with self._lock:
            link = self._retire(node_id)
        self._starter.forget(node_id, reason)
        if link is not None:
            link.sampler.close(force=True)

    def give_up(self) -> None:
        """No sampler will ever answer again: what was fetched so far is all there is."""
        self.given_up = True
        with self._lock:
            for node_id in list(self._links):
                self._retire(node_id)
        self._starter.close()

    def is_starting(self) -> bool:
        """A sampler is being started: ``pump`` brings it further each time."""
        return self._starter.is_busy()

    @property
    def problems(self) -> dict[str, str]:
        """Node id -> why it has no sampler."""
        return dict(self._starter.problems)

    def release(self, node_id: str) -> None:
        """End a node's sampler once what it still has was fetched: an autoscaler may remove the node."""
        link = self._links.get(node_id)
        if link is None:
            return
        link.leaving = True

    def _retire(self, node_id: str) -> _Link | None:
        """No sampler of the node is in service any more; returns the one that was."""
        with self._lock:
            self._hosts.pop(node_id, None)
            link = self._links.pop(node_id, None)
            if link is not None:
                self._links_of[link.host] = tuple(other for other in self._links_of[link.host] if other is not link)
            return link

    @property
    def infos(self) -> tuple[SamplerInfo, ...]:
        """What each sampler in service said of its node, in the order they were opened."""
        with self._lock:
            return tuple(link.info for link in self._links.values())

    def host_of(self, node_id: str) -> str | None:
        """Stable host id of a node; None while it is not known."""
        return self._hosts.get(node_id)

    def sampler_on(self, node_id: str) -> Sampler | None:
        """The sampler of this very node."""
        link = self._links.get(node_id)
        return link.sampler if link else None

    def has_sampler(self, node_id: str) -> bool:
        """A sampler of this very node polls."""
        return node_id in self._links

    def is_in_service(self, host: str) -> bool:
        """A sampler of the host polls, as far as is known."""
        return bool(self._links_of.get(host))

    def is_silent(self, host: str) -> bool:
        """A sampler of the host has not answered for longer than it may take, and is not given up yet."""
        now_ns = self._clock.monotonic_ns()
        links = self._links_of.get(host, ())
        return any(link.unanswered_ns is not None and now_ns - link.unanswered_ns > LATE_S * NS_PER_S for link in links)

    def heard_ns(self, host: str) -> int:
        """By when all samplers of the host had answered, on the run driver's clock; now, where nobody samples it any more.

        It may be a while ago without anybody's fault but ours: a run driver that is held up asks late.
        """
        now_ns = self._clock.monotonic_ns()
        return min((link.answered_ns for link in self._links_of.get(host, ())), default=now_ns)

    def sampler_of(self, host: str) -> Sampler | None:
        """A sampler of the host."""
        return next((link.sampler for link in self._links_of.get(host, ())), None)

    def pump(self, *, hurry: bool = False) -> list[SampleBatch]:
        """Fetch what was sampled, from every sampler that is due. One that died is started anew with the next epoch.

        Few are asked at a time: an exchange that waits for others tells little of the host's clock. Much at once is left for the
        next call, see ``is_behind``.

        Args:
            hurry: From every sampler, due or not.
        """
        self._serve_started()
        self._round += hurry
        return self._pump()

    def pump_last(self) -> Iterator[list[SampleBatch]]:
        """Fetch, in portions, what was sampled up to now from every sampler that answers: before they are closed."""
        begin_ns = self._clock.monotonic_ns()
        self._round += 1
        while self._clock.monotonic_ns() < begin_ns + LAST_S * NS_PER_S:
            yield self._pump(last=True)
            with self._lock:
                if all(link.pending is None and link.round == self._round for link in self._links.values()):
                    return

    def _pump(self, *, last: bool = False) -> list[SampleBatch]:
        """Fetch from those that were not asked in this round, and unless it is the ``last`` from those that are due."""
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            links = list(self._links.values())
        waiting = [link for link in links if link.pending is not None]
        idle = [link for link in links if link.pending is None]
        due = deque(link for link in idle if link.round < self._round or (not last and now_ns >= link.due_ns))
        self._schedule(due, links, now_ns)
        fetched: list[SampleBatch] = []
        rows, slow, until_ns = 0, len(waiting), now_ns + ns_from_s(COLLECT_S)
        while (waiting or due) and rows < ENOUGH_ROWS:
            while due and len(waiting) < slow + ASKED_AT_ONCE:
                waiting.append(due.popleft())
                self._ask(waiting[-1])
            answered = self._answered(waiting)
            slow = slow if answered else len(waiting)
            for link, answered_ns in answered:
                taken = self._collect(link, answered_ns)
                fetched.extend(taken)
                rows += sum(map(len, taken))
            waiting = [link for link in waiting if link.pending is not None]
            slow = min(slow, len(waiting))
            if self._clock.monotonic_ns() >= until_ns:
                break
        self.is_behind = bool(due)
        for link in due:
            link.due_ns = now_ns
        for link in links:
            if link.unanswered_ns is not None and self._clock.monotonic_ns() - link.unanswered_ns > SILENT_S * NS_PER_S:
                self._restart(link, f"no answer for {SILENT_S:g} s")
        return fetched

    def _schedule(self, due: Iterable[_Link], links: Sequence[_Link], now_ns: int) -> None:
        """When each is asked again: in step with the time before, spread over the period at first."""
        period_ns = ns_from_s(min(max(1.0, len(links) / NODES_PER_S), MAX_PERIOD_S))
        for index, link in enumerate(due):
            if link.fresh:
                link.due_ns = now_ns + period_ns * (index + 1) // max(1, len(links))
            elif link.due_ns <= now_ns:
                link.due_ns = max(link.due_ns, now_ns - period_ns) + period_ns

    def _answered(self, waiting: Sequence[_Link]) -> list[tuple[_Link, int]]:
        """Those of them that answered, and by when."""
        calls = [link.pending for link in waiting if link.pending is not None]
        answered = {id(call) for call in self._executor.wait(calls, GLANCE_S)}
        answered_ns = self._clock.monotonic_ns()
        return [(link, answered_ns) for link in waiting if id(link.pending) in answered]

    def _ask(self, link: _Link) -> None:
        link.sent_ns, link.round = self._clock.monotonic_ns(), self._round
        if link.unanswered_ns is None:
            link.unanswered_ns = link.sent_ns
        link.pending = link.sampler.fetch(link.after_seq, link.info.epoch)

    def _collect(self, link: _Link, answered_ns: int) -> Sequence[SampleBatch]:
        call, link.pending = link.pending, None
        assert call is not None
        try:
            answer = call.result(FETCH_TIMEOUT_S)
        except (TimeoutError, Unreachable) as error:
            if link.unanswered_ns == link.sent_ns:
                LOG.warning("the sampler of %s does not answer: %s", link.info.hostname, error)
            return ()  # it is asked again: a network that is cut for some seconds is no reason to lose its samples
        except LlemRayError as error:
            self._restart(link, error.message)
            return ()
        taken = self._take(link, answer, answered_ns)
        if link.leaving:
            self._retire(link.node.node_id)
            link.sampler.close()
        return taken

    def _take(self, link: _Link, answer: Fetched, answered_ns: int) -> Sequence[SampleBatch]:
        exchange = Exchange(
            sent_ns=link.sent_ns, received_ns=answer.received_ns, replied_ns=answer.replied_ns, answered_ns=answered_ns
        )
        link.fresh = False
        link.unanswered_ns = None
        link.answered_ns = answered_ns
        self._starter.settle(link.node.node_id)
        self.clocks.add(link.host, exchange)
        taken = []
        for batch in answer.batches:
            if self._known[link.host].buffer.append(batch):
                taken.append(batch)
            if batch.epoch == link.info.epoch:
                link.after_seq = max(link.after_seq, batch.seq)
        return taken

    def watch_closely(self, name: str, hosts: Iterable[str]) -> None:
        """Keep the clock offsets of a gang's hosts sharp until ``watch_no_more(name)``."""
        self._prober.watch(name, hosts)

    def watch_no_more(self, name: str) -> None:
        """The gang is gone."""
        self._prober.watch_no_more(name)

    def _notice_restart(self, host: str, exchange: Exchange) -> None:
        """A host that was restarted under the same id has another clock: nothing old may be mixed with it."""
        known = self.clocks.offset(host, exchange.answered_ns)
        if known is None or self.clocks.is_own(host):
            return
        slack_ns = known.delta_ns + RESTARTED_NS
        latest_ns, earliest_ns = exchange.received_ns - exchange.sent_ns, exchange.replied_ns - exchange.answered_ns
        if earliest_ns <= known.offset_ns + slack_ns and latest_ns >= known.offset_ns - slack_ns:
            return
        LOG.warning("host %s was restarted: its clock and its counters begin anew", host)
        with self._lock:
            self.clocks.forget(host)
            self._known[host].buffer = TraceBuffer()
            self._generations[host] = self._generations.get(host, 0) + 1
            self._restarted_ns[host] = exchange.answered_ns

    def latest_power_w(self) -> tuple[float | None, bool]:
        """Sum of the newest instant power of all measuring devices, or of the estimates where nothing measures (True)."""
        measured: list[float] = []
        estimated: list[float] = []
        now_ns = self._clock.monotonic_ns()
        for info in self.infos:
            host_ns = self.clocks.to_host(info.node, now_ns)
            if host_ns is None:
                continue
            for device in info.devices:
                power_mw = self._known[info.node].buffer.latest_power_mw(device.uuid, host_ns - LATEST_NS)
                if power_mw is not None:
                    (estimated if device.method == "estimated_model" else measured).append(power_mw / 1e3)
        return (sum(measured or estimated) if measured or estimated else None), not measured

    def close(self) -> None:
        """Stop the samplers, and log what trouble they had."""
        self._prober.close()
        with self._lock:
            links = list(self._links.values())
        last = [(link, link.sampler.describe()) for link in links]
        self._executor.wait([call for _, call in last], FETCH_TIMEOUT_S)
        for link, call in last:
            try:
                for note in call.result(0.1).notes:
                    LOG.warning("the sampler of %s: %s", link.info.hostname, note)
            except (LlemRayError, TimeoutError) as error:
                LOG.warning("the sampler of %s gave no last word: %s", link.info.hostname, error)
        for link in links:
            link.sampler.close(force=self.is_silent(link.host))
        self._starter.close()

    def _learn_host(self, node_id: str, host: str) -> None:
        with self._lock:
            self._hosts[node_id] = host

    def _begin_of(self, host: str) -> tuple[Sequence[str], int]:
        """What a new sampler of the host leaves to those that are there, and its lowest epoch."""
        skip = [device.uuid for link in self._links_of.get(host, ()) for device in link.info.devices]
        return skip, self._epochs.get(host, 0) + 1

    def _serve_started(self) -> LlemRayError | None:
        """Bring samplers into service that poll now; returns what the first that cannot start raises."""
        started, failed = self._starter.step()
        for one in started:
            try:
                self._serve(one)
            except PlacementError as error:
                LOG.error("no sampler on %s: %s", one.node.hostname, error)  # noqa: TRY400 - the text says it all
                self.drop(one.node.node_id, error.message)
                one.sampler.close(force=True)
                failed = failed or error
        return failed

    def _serve(self, one: Started) -> None:
        info = one.info
        if not info.devices and self.is_in_service(info.node):  # another node of the same host: one sampler is enough
            one.sampler.close()
            return
        self._refuse_twins(info)
        _refuse_other_release(info)
        self._notice_restart(info.node, one.exchange)
        self.clocks.add(info.node, one.exchange)
        with self._lock:
            self._epochs[info.node] = max(info.epoch, self._epochs.get(info.node, 0))
            self._known.setdefault(info.node, SampledHost(TraceBuffer(), {})).take(self._key(info), info)
            self.samples_per_s = sum(known.samples_per_s for known in self._known.values())
            self._gpu_hosts |= {device.uuid: info for device in info.devices if device.scope in GPU_SCOPES}
            link = self._links[one.node.node_id] = _Link(one.node, one.sampler, info, one.exchange.answered_ns)
            self._links_of[info.node] = (*self._links_of.get(info.node, ()), link)
        self._on_sampler(info)

    def _key(self, info: SamplerInfo) -> str:
        """A restarted sampler takes the place of the one that read the same devices."""
        uuids = {device.uuid for device in info.devices}
        known = self._known.get(info.node)
        for key, other in known.infos.items() if known else ():
            if uuids & {device.uuid for device in other.devices} or not uuids:
                return key
        return f"{info.pid}/{info.epoch}"

    def _refuse_twins(self, info: SamplerInfo) -> None:
        """A GPU exists once."""
        for device in info.devices:
            other = self._gpu_hosts.get(device.uuid) if device.scope in GPU_SCOPES else None
            if other is None or other.node == info.node or not self.is_in_service(other.node):
                continue
            if self._info(other.node, device.uuid) is not None:
                raise PlacementError(
                    f"GPU {device.uuid} is reported by {other.hostname} and by {info.hostname}",
                    "where two containers share a host, give both the same LLEM_RAY_HOST_ID",
                )

    def _restart(self, link: _Link, why: str) -> None:
        with self._lock:
            if self._links.get(link.node.node_id) is not link:  # its node is gone
                return
            host = self._hosts.get(link.node.node_id)
            self._retire(link.node.node_id)
            if host is not None:
                self._hosts[link.node.node_id] = host
        LOG.warning("the sampler of %s is started anew: %s", link.info.hostname, why)
        link.sampler.close(force=True)
        self.adopt([link.node])


def _refuse_other_release(info: SamplerInfo) -> None:
    """All hosts of a run measure and serve with one release."""
    there = info.host.get("llem_ray", __version__)
    if there != __version__:
        raise PlacementError(
            f"{info.hostname} has llem-ray {there}, here is {__version__}",
            f"install llem-ray {__version__} there",
        )
