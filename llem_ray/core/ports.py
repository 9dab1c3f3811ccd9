"""A TCP port for somebody else to listen at, kept free until then."""

from __future__ import annotations

import contextlib
import socket


def reserve_port(family: socket.AddressFamily = socket.AF_INET) -> int:
    """A free port of this host that the kernel gives to nobody who asks for any port, for a minute.

    A connection to it that this end closed first leaves it in TIME_WAIT: it can then be bound by name alone, and with
    SO_REUSEADDR, which servers set. Where this host cannot reach itself the port is free, but not kept so.
    """
    with socket.socket(family) as server, socket.socket(family) as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", 0))
        server.listen(1)
        server.settimeout(1.0)
        client.settimeout(1.0)
        with contextlib.suppress(OSError):
            client.connect(server.getsockname())
            server.accept()[0].close()
        return int(server.getsockname()[1])
