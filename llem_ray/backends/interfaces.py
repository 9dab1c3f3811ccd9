"""Which network interface torch.distributed is to use."""

from __future__ import annotations

from typing import Final

import psutil

NETWORK_VARIABLES: Final = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}
"""By backend of torch.distributed."""


def interface_of(address: str) -> str | None:
    """The network interface that has ``address``; None where none has (another network name space)."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address == address for item in addresses):
            return name
    return None
