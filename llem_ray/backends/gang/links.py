"""Connections between the ranks of one gang: they meet at rank 0, then each leader talks to those it leads.

Messages are those of an engine's process, over TCP: JSON, never pickle. A closed connection is noticed at once and a host that
went away within half a minute, so that an idle rank may wait for its next order for as long as it takes.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from llem_ray.backends.gang.layout import Layout
from llem_ray.backends.process.wire import Channel, PeerGone, ProtocolError
from llem_ray.core.backend import Rendezvous
from llem_ray.core.errors import EngineDied, HangError, LoadError

_HELLO_S: Final = 10.0
"""A connection that says nothing for so long is none of ours."""
_RETRY_S: Final = 0.1
_KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


class Link:
    """A connection to another rank.

    Args:
        rank: The other side.
        host: Its host.
        connection: Connected; it is owned from now on.
    """

    def __init__(self, rank: int, host: str, connection: socket.socket) -> None:
        self.rank = rank
        self.name = f"rank {rank} ({host})"
        for level, option, value in _KEEPALIVE:
            connection.setsockopt(level, option, value)
        self._channel = Channel(connection)

    def send(self, call: int, kind: str, body: Any = None, timeout_s: float | None = None) -> None:
        """Send one message.

        Raises:
            EngineDied: Nobody is there.
            HangError: It was not taken in time.
        """
        try:
            self._channel.send(call, kind, body, timeout_s)
        except PeerGone as error:
            raise EngineDied(f"{self.name} is gone: {error}") from error
        except TimeoutError as error:
            raise HangError(f"{self.name} took no message within {timeout_s:g} s") from error

    def receive(self, timeout_s: float | None, doing: str) -> tuple[int, str, Any]:
        """The next message: call, kind, body.

        Args:
            timeout_s: Deadline; None where the wait may last for hours.
            doing: What it is waited for, for messages.

        Raises:
            EngineDied: The other side has ended, or sent garbage.
            HangError: None came in time.
        """
        try:
            return self._channel.receive(timeout_s)
        except PeerGone as error:
            raise EngineDied(f"{self.name} is gone during {doing}: {error}") from error
        except ProtocolError as error:
            raise EngineDied(f"{self.name} sent no message of ours during {doing}: {error}") from error
        except TimeoutError as error:
            raise HangError(f"{self.name} did not answer during {doing} within {timeout_s:g} s") from error

    def pending(self) -> bool:
        """Something has arrived, or the other side has ended."""
        return self._channel.pending()

    def fileno(self) -> int:
        """The socket."""
        return self._channel.fileno()

    def shut_down(self) -> None:
        """Wake whoever waits for a message, here and there: they are told that nobody is there."""
        self._channel.shut_down()

    def close(self) -> None:
        """Close the connection; the other side notices."""
        self._channel.shut_down()
        self._channel.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Circle:
    """The connections of one rank."""

    leader: Link | None
    """None at rank 0."""
    members: tuple[Link, ...] = ()
    """The other ranks of the replica this rank leads."""
    deputies: tuple[Link, ...] = ()
    """Leaders of the other replicas; at rank 0 only."""
    hosts: tuple[str, ...] = field(default=())
    """Stable host id of every rank."""

    @property
    def led(self) -> tuple[Link, ...]:
        """Those this rank tells what to do."""
        return self.members + self.deputies

    def close(self) -> None:
        """Close them all."""
        for link in (*self.led, *([self.leader] if self.leader else ())):
            link.close()


def gather(links: Iterable[Link], call: int, timeout_s: float, doing: str) -> Mapping[int, tuple[str, Any]]:
    """One answer to ``call`` from every link, by rank; answers to earlier calls are dropped.

    Raises:
        EngineDied: One has ended: noticed while others are waited for.
        HangError: One has not answered in time; the message names all such.
    """
    waiting = {link.fileno(): link for link in links}
    names = {link.rank: link.name for link in waiting.values()}
    poll, answers = select.poll(), {}
    for descriptor in waiting:
        poll.register(descriptor, select.POLLIN)
    deadline_s = time.monotonic() + timeout_s
    ready = [descriptor for descriptor, link in waiting.items() if link.pending()]
    while waiting:
        for link in [waiting[descriptor] for descriptor in ready if descriptor in waiting]:
            number, kind, body = link.receive(max(0.0, deadline_s - time.monotonic()), doing)
            if number == call:
                answers[link.rank] = (kind, body)
                poll.unregister(link.fileno())
                del waiting[link.fileno()]
        if not waiting:
            break
        ready = [descriptor for descriptor, link in waiting.items() if link.pending()]
        if not ready:
            ready = [descriptor for descriptor, _ in poll.poll(1000 * max(0.0, deadline_s - time.monotonic()))]
        if not ready:
            late = ", ".join(name for rank, name in sorted(names.items()) if rank not in answers)
            raise HangError(f"no answer during {doing} within {timeout_s:g} s from {late}")
    return answers


def meet(place: Rendezvous, layout: Layout, key: str, timeout_s: float) -> Circle:
    """Connect this rank to the one that leads it and to those it leads.

    Args:
        place: Where, and who this is.
        layout: Of the gang.
        key: What all must agree on: ranks of another gang are refused.
        timeout_s: Deadline of the whole meeting.

    Raises:
        LoadError: Somebody did not come; the message names who, and the address.
    """
    deadline_s = time.monotonic() + timeout_s
    if place.rank == 0:
        return _receive_all(place, layout, key, deadline_s, timeout_s)
    listener = _listen(place.node_addr, 0) if layout.led else None
    with contextlib.ExitStack() as stack:
        if listener is not None:
            stack.enter_context(listener)
        port = listener.getsockname()[1] if listener is not None else 0
        address = (place.master_addr, place.master_port)
        leader, told = _introduce(place, 0, address, [key, place.rank, place.node_addr, port], deadline_s, timeout_s)
        if layout.leader not in (0, place.rank):
            leader.close()
            leader, _ = _introduce(place, layout.leader, tuple(told), [key, place.rank, "", 0], deadline_s, timeout_s)
        members = _accept(listener, place, layout, key, deadline_s, timeout_s) if listener is not None else {}
    for link, _ in members.values():
        link.send(0, "welcome", None, _HELLO_S)
    return Circle(leader=leader, members=tuple(members[rank][0] for rank in layout.led), hosts=place.hosts)


def _receive_all(place: Rendezvous, layout: Layout, key: str, deadline_s: float, timeout_s: float) -> Circle:
    everybody = {rank: _layout_at(layout, rank) for rank in range(1, layout.world_size)}
    with _listen(place.master_addr, place.master_port) as listener:
        came = _accept(listener, place, layout, key, deadline_s, timeout_s, tuple(everybody))
    kept = {rank: link for rank, (link, _) in came.items() if rank in layout.led}
    for rank, (link, _) in came.items():
        leader = everybody[rank].leader
        link.send(0, "welcome", came[leader][1] if leader not in (0, rank) else None, _HELLO_S)
        if rank not in kept:
            link.close()
    members = tuple(link for rank, link in sorted(kept.items()) if rank < layout.replica_size)
    deputies = tuple(link for rank, link in sorted(kept.items()) if rank >= layout.replica_size)
    return Circle(leader=None, members=members, deputies=deputies, hosts=place.hosts)


def _layout_at(layout: Layout, rank: int) -> Layout:
    return Layout(tensor=layout.tensor, pipeline=layout.pipeline, data=layout.data, rank=rank)


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for host in (address, ""):  # an address of another network name space cannot be bound: listen on all
        try:
            return socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            problem = error
    raise LoadError(f"rank 0 cannot listen on {address}:{port}: {problem.strerror or problem}") from problem


def _accept(
    listener: socket.socket,
    place: Rendezvous,
    layout: Layout,
    key: str,
    deadline_s: float,
    timeout_s: float,
    expected: tuple[int, ...] | None = None,
) -> dict[int, tuple[Link, list[Any]]]:
    """Link and own address of every expected rank."""
    ranks = layout.led if expected is None else expected
    came: dict[int, tuple[Link, list[Any]]] = {}
    try:
        while len(came) < len(ranks):
            listener.settimeout(max(0.01, deadline_s - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                names = ", ".join(f"rank {rank} ({place.hosts[rank]})" for rank in ranks if rank not in came)
                where = "{}:{}".format(*listener.getsockname()[:2])
                raise LoadError(
                    f"{len(came) + 1} of {len(ranks) + 1} processes met at {where} within {timeout_s:g} s; missing: {names}",
                    "see the logs of those processes, and whether a firewall stands between the hosts",
                ) from error
            _welcome(connection, place, ranks, key, came)
    except BaseException:
        for link, _ in came.values():
            link.close()
        raise
    return came


def _welcome(
    connection: socket.socket, place: Rendezvous, ranks: tuple[int, ...], key: str, came: dict[int, tuple[Link, list[Any]]]
) -> None:
    channel = Channel(connection)
    try:
        _, kind, body = channel.receive(_HELLO_S)
        told, rank, address, port = body if kind == "hello" else (None, None, None, None)
    except (PeerGone, ProtocolError, TimeoutError, TypeError, ValueError):
        channel.close()  # a port scanner, or a process that gave up
        return
    if rank not in ranks or rank in came or told != key:
        channel.close()
        if told == key or not isinstance(rank, int):
            return
        raise LoadError(f"rank {rank} was given another model, engine or gang than rank {place.rank}")
    came[rank] = (Link(rank, place.hosts[rank], connection), [address, port])


def _introduce(
    place: Rendezvous, rank: int, address: tuple[Any, ...], hello: list[Any], deadline_s: float, timeout_s: float
) -> tuple[Link, Any]:
    """A link to ``rank`` and what it said."""
    where = f"rank {rank} ({place.hosts[rank]}) at {address[0]}:{address[1]}"
    problem: Exception | None = None
    while (left_s := deadline_s - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((str(address[0]), int(address[1])), timeout=left_s)
        except OSError as error:
            problem = error
            time.sleep(min(_RETRY_S, max(0.0, deadline_s - time.monotonic())))
            continue
        link = Link(rank, place.hosts[rank], connection)
        try:
            link.send(0, "hello", hello, _HELLO_S)
            _, _, told = link.receive(max(0.01, deadline_s - time.monotonic()), "the meeting")
        except (EngineDied, HangError) as error:
            link.close()
            raise LoadError(f"{where} did not welcome rank {place.rank}: {error.message}") from error
        return link, told
    raise LoadError(f"rank {place.rank} did not reach {where} within {timeout_s:g} s: {problem}")
