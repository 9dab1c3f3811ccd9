"""Durable files: whole or not there, and every operating system error as one ResultsError that names the path."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llem_ray.core.errors import ResultsError

TEMPORARY_SUFFIX = ".tmp"

_HINTS = {
    errno.ENOSPC: "free space on that disk, then submit the sweep again: what is done is kept",
    errno.EDQUOT: "your quota on that disk is used up; free space, then submit the sweep again: what is done is kept",
    errno.EFBIG: "a file size limit was reached (ulimit -f); raise it, then submit the sweep again: what is done is kept",
    errno.EROFS: "the file system is mounted read-only; choose another results folder",
    errno.EACCES: "this user may not write there; choose another results folder or change its permissions",
    errno.EPERM: "this user may not write there; choose another results folder or change its permissions",
}


@contextlib.contextmanager
def storage_errors(path: Path, action: str) -> Iterator[None]:
    """Turn an OSError inside the block into a ResultsError such as ``cannot write /x/y: No space left on device``.

    Raises:
        ResultsError: The block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno) if error.errno is not None else None
        raise ResultsError(f"cannot {action} {path}: {error.strerror or error}", hint) from error


def sync_directory(path: Path) -> None:
    """Make renames and deletions inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under ``path``, whole and durable, when the block ends; on an error nothing remains.

    Raises:
        ResultsError: It cannot be written.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with storage_errors(path, "write"):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_directory(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole and durable.

    Raises:
        ResultsError: It cannot be written; ``path`` is as it was before.
    """
    with atomic_file(path) as file:
        file.write(data)


def check_writable(folder: Path, min_free_bytes: int) -> None:
    """Make sure that files can be written, synced and renamed in ``folder`` and that there is room for more.

    Raises:
        ResultsError: The folder is read-only, missing, full or nearly full.
    """
    probe = folder / f".probe-{os.getpid()}"
    write_atomic(probe, os.urandom(64 * 1024))
    with storage_errors(folder, "write to"):
        probe.unlink()
        free_bytes = shutil.disk_usage(folder).free
    if free_bytes < min_free_bytes:
        raise ResultsError(
            f"cannot write to {folder}: {free_bytes / 1e6:.0f} MB free, at least {min_free_bytes / 1e6:.0f} MB needed",
            _HINTS[errno.ENOSPC],
        )
