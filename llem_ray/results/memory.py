"""Memory that passes through a run driver: samples come and go by the megabyte, for days."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Final

import pyarrow as pa

_M_MMAP_THRESHOLD: Final = -3
"""From glibc's malloc.h."""
LARGE_BYTES: Final = 128 * 1024


def return_freed_memory() -> None:
    """Give what is freed back to the system, or to whoever in this process needs it next.

    Arrow's own allocator keeps what it once had. And glibc, after the first large block was freed, takes such blocks from its
    heap too, where small ones that live long pin them. Together that is 100 MB with a thousand nodes. Where there is no
    glibc, only Arrow is told.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)


def trim_heap() -> None:
    """Give the holes in glibc's heap back to the system; takes some 10 ms."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
