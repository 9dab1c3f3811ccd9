"""torch.distributed among the ranks of one replica."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from llem_ray.backends.gang.links import Link
from llem_ray.backends.interfaces import NETWORK_VARIABLES, interface_of
from llem_ray.core.errors import LoadError


class ProcessGroup:
    """The default process group of this process, and the variables it needs; ``close`` undoes both.

    Args:
        backend: ``gloo`` or ``nccl``.
        rank: Within the replica.
        size: Of the replica.
        device: Of this rank.
        node_addr: Address of this host.
        timeout_s: Longest wait of one rank for another in a collective operation.
    """

    def __init__(self, backend: str, rank: int, size: int, device: torch.device, node_addr: str, timeout_s: float) -> None:
        self.backend = backend
        self._rank, self._size, self._device = rank, size, device
        self._timeout = timedelta(seconds=timeout_s)
        self._address = node_addr
        self._store: TCPStore | None = None
        self._before: dict[str, str | None] = {}
        self._watch: HangUpWatch | None = None

    def host(self, port: int = 0) -> list[Any]:
        """Open the store that the group meets at, in its first rank, at a free port or a given one; returns where it is."""
        self._store = TCPStore(self._address, port, self._size, True, wait_for_workers=False, timeout=self._timeout)
        return [self._address, self._store.port]

    def join(self, address: str, port: int) -> None:
        """Form the group; every rank of the replica must.

        Raises:
            LoadError: This process has a process group already.
            RuntimeError: The others did not come.
        """
        if dist.is_initialized():
            raise LoadError(
                "this process has a torch.distributed process group already", "one process serves one rank of one gang"
            )
        if self._store is None:
            self._store = TCPStore(address, port, self._size, False, timeout=self._timeout)
        self._set_variables()
        dist.init_process_group(
            self.backend,
            store=self._store,
            rank=self._rank,
            world_size=self._size,
            timeout=self._timeout,
            device_id=self._device if self._device.type == "cuda" else None,
        )

    def watch(self, links: Iterable[Link]) -> None:
        """Break collective operations when one of ``links`` hangs up, and no longer when one watched before does.

        gloo notices by itself, NCCL does not.
        """
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        links = tuple(links)
        if self.backend == "nccl" and links:
            self._watch = HangUpWatch(links, dist.distributed_c10d._abort_process_group)

    def close(self) -> None:
        """Leave the group."""
        self.watch(())
        if dist.is_initialized():
            gc.collect()  # what still refers to the group would keep its connections open
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        self._store = None
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._before = {}

    def _set_variables(self) -> None:
        wanted = {"LOCAL_RANK": str(self._device.index or 0)}
        interface = interface_of(self._address)
        if interface is not None:
            wanted |= {name: interface for name in NETWORK_VARIABLES.values() if name not in os.environ}
        self._before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)


class HangUpWatch:
    """A thread that sleeps until one of the links is closed by the other side.

    Args:
        links: Watched; nothing is read from them.
        on_hang_up: Called once, in that thread.
    """

    def __init__(self, links: Iterable[Link], on_hang_up: Callable[[], None]) -> None:
        self._wake, wakes = socket.socketpair()
        self._links = [link.fileno() for link in links]
        self._thread = threading.Thread(target=self._sleep, args=(wakes, on_hang_up), name="llem-ray-hang-up", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._wake.close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _sleep(self, wakes: socket.socket, on_hang_up: Callable[[], None]) -> None:
        poll = select.poll()
        poll.register(wakes, select.POLLIN)
        for descriptor in self._links:
            poll.register(descriptor, select.POLLRDHUP)
        with wakes:
            if wakes.fileno() not in dict(poll.poll()):
                on_hang_up()


def require_device_type(device: torch.device) -> None:
    """Refuse a split model on the CPU of a host whose GPUs are visible: transformers would put it on those.

    Raises:
        LoadError: It would.
    """
    found = torch.accelerator.current_accelerator(check_available=True) if torch.accelerator.is_available() else None
    if device.type == "cpu" and found is not None:
        raise LoadError(
            f"transformers splits a model over {found.type} devices wherever it sees one, but the engine is to run on the CPU",
            "hide them: CUDA_VISIBLE_DEVICES=''",
        )
