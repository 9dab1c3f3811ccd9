"""A port that is chosen now and listened at later, by another process, must not be given away meanwhile."""

from __future__ import annotations

import socket

import pytest

from llem_ray.core.ports import reserve_port


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=lambda family: family.name)
def test_a_reserved_port_is_kept_from_others_and_can_be_listened_at(family: socket.AddressFamily) -> None:
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    port = reserve_port(family)
    with socket.socket(family) as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    with socket.create_server(("", port), family=family):
        pass


def test_reserved_ports_differ() -> None:
    assert len({reserve_port() for _ in range(50)}) == 50
