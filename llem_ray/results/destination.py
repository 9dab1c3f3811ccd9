"""Where copies of runs go: a folder of any file system that pyarrow.fs opens by URI."""

from __future__ import annotations

import copy
import os
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, TypeVar
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from llem_ray.core.errors import ConfigError, ResultsError
from llem_ray.results.files import TEMPORARY_SUFFIX

T = TypeVar("T")

OPEN_TIMEOUT_S: Final = 30.0
"""A destination that has not answered by then is unreachable."""
GCS_RETRY_S: Final = 10
"""Of one operation on a Google server that refuses; pyarrow's own is 15 minutes, in which nobody would hear of it."""
STORE_ERRORS: Final = (OSError, pa.ArrowException)
"""What pyarrow raises when a file system fails."""

_SCHEMES: Final = ("s3", "gs", "gcs", "abfs", "abfss", "file")
_ALLOWED: Final = "s3://bucket/folder, gs://bucket/folder, abfs://account@container/folder, or file:///folder"
_OBJECT_STORES: Final = frozenset({"s3", "gcs", "abfs"})
"""pyarrow's names of file systems in which a file appears whole, when it is closed."""
_CHUNK_BYTES: Final = 8 * 1024 * 1024
_REASONS: Final = (
    (re.compile(r"NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist", re.IGNORECASE), "its bucket does not exist", "create it"),
    (
        re.compile(
            r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|PERMISSION_DENIED|UNAUTHENTICATED|response code 40[13]"
            r"|AuthenticationException|Failed to get token"
        ),
        "access is denied",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, or AZURE_CLIENT_ID and its kin, "
        "to credentials that may write there",
    ),
    (
        re.compile(r"NETWORK_CONNECTION|curlCode|resolv|connect|UNAVAILABLE|timed? ?out", re.IGNORECASE),
        "it cannot be reached",
        "check network, endpoint_override and region",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """A folder of a file system. Its methods raise ``STORE_ERRORS``; ``destination_error`` words them."""

    filesystem: fs.FileSystem
    path: str
    """As the file system names it, without a slash at its end."""
    shown: str
    """For messages: the URI without credentials and options."""
    argument: str
    """For commands that a user is told to type: the URI as given, or ``URI`` where it holds a password."""

    def child(self, name: str) -> Destination:
        """The folder ``name`` in it."""
        return replace(self, path=f"{self.path}/{name}", shown=f"{self.shown}/{name}")

    @property
    def is_local(self) -> bool:
        """On a file system that is mounted here."""
        return bool(self.filesystem.type_name == "local")

    def list_files(self) -> dict[str, int]:
        """Path below the folder -> size in bytes of every file; empty when the folder is missing."""
        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return {info.path[len(self.path) + 1 :]: info.size for info in infos if info.type == fs.FileType.File}

    def list_folders(self) -> tuple[str, ...]:
        """Names of the folders in it."""
        infos = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return tuple(info.base_name for info in infos if info.type == fs.FileType.Directory)

    def read(self, name: str) -> bytes:
        """Contents of a file.

        Raises:
            FileNotFoundError: There is none.
        """
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
            return bytes(stream.read())

    def write(self, name: str, data: bytes | pa.Buffer, advanced: Callable[[], None] = lambda: None) -> None:
        """Write a file that appears whole or not at all; one of that name is replaced.

        Args:
            name: Path below the folder.
            data: Its contents.
            advanced: Called after every few MB.
        """
        path = f"{self.path}/{name}"
        at_once = self.filesystem.type_name in _OBJECT_STORES
        target = path if at_once else path + TEMPORARY_SUFFIX
        if not at_once:
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        view = memoryview(data)
        with self.filesystem.open_output_stream(target) as stream:
            for begin in range(0, len(view), _CHUNK_BYTES):
                stream.write(view[begin : begin + _CHUNK_BYTES])
                advanced()
        size = self.filesystem.get_file_info(target).size
        if size != len(view):
            raise OSError(f"{self.shown}/{name} has {size} bytes after {len(view)} were written")
        if not at_once:
            self.filesystem.move(target, path)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; those that are gone already are no error."""
        for name in names:
            try:
                self.filesystem.delete_file(f"{self.path}/{name}")
            except FileNotFoundError:
                continue


def destination_error(destination: Destination | str, error: BaseException, action: str = "copy to") -> ResultsError:
    """A file system's error in one sentence, with what to do about it."""
    shown = destination if isinstance(destination, str) else destination.shown
    detail = " ".join(str(error).split())[:300]
    for pattern, reason, hint in _REASONS:
        if pattern.search(detail):
            return ResultsError(f"cannot {action} {shown}: {reason} ({detail})", hint)
    return ResultsError(f"cannot {action} {shown}: {detail}")


@contextmanager
def destination_errors(destination: Destination, action: str = "copy to") -> Iterator[None]:
    """Word a file system's errors inside the block.

    Raises:
        ResultsError: The block raised one.
    """
    try:
        yield
    except STORE_ERRORS as error:
        raise destination_error(destination, error, action) from error


def open_destination(uri: str, timeout_s: float = OPEN_TIMEOUT_S) -> Destination:
    """Open a destination and make sure that files can be written and deleted there.

    Args:
        uri: As of ``pyarrow.fs``: ``s3://bucket/folder?region=...&endpoint_override=...``, ``gs://``, ``abfs://``, ``file:///folder``,
            or an absolute path.
        timeout_s: It must have answered by then.

    Raises:
        ConfigError: It is not such a URI.
        ResultsError: It cannot be reached or written.
    """
    shown = _without_secrets(uri)
    if not uri.startswith("/") and urlsplit(uri).scheme not in _SCHEMES:
        raise ConfigError("not a place that runs can be copied to", field="--copy-to", found=shown, allowed=_ALLOWED)

    def check() -> Destination:
        try:
            filesystem, path = _open_filesystem(uri)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            reason = str(error).replace(uri, shown)
            raise ConfigError(f"not a place that runs can be copied to: {reason}", field="--copy-to", allowed=_ALLOWED) from error
        argument = "URI" if holds_secret(uri) else uri
        destination = Destination(filesystem=filesystem, path=path.rstrip("/"), shown=shown.rstrip("/"), argument=argument)
        if not destination.path:
            raise ConfigError("a folder is missing", field="--copy-to", found=shown, allowed=_ALLOWED)
        if destination.is_local and filesystem.get_file_info(path).type != fs.FileType.Directory:
            raise ResultsError(f"cannot copy to {shown}: no such folder", "make it, or mount its file system")
        probe = f".probe-{socket.gethostname()}-{os.getpid()}"
        destination.write(probe, b"llem-ray")
        destination.delete([probe])
        return destination

    try:
        return _within(timeout_s, check)
    except TimeoutError as error:
        raise ResultsError(f"cannot copy to {shown}: no answer within {timeout_s:g} s", _REASONS[-1][2]) from error
    except STORE_ERRORS as error:
        raise destination_error(shown, error) from error


def _open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """File system and path, with operations that give up soon: a process cannot exit while one of S3 goes on."""
    parts = urlsplit(uri)
    if parts.scheme in {"gs", "gcs"} and "retry_limit_seconds" not in dict(parse_qsl(parts.query)):
        uri = urlunsplit(parts._replace(query=f"{parts.query}&retry_limit_seconds={GCS_RETRY_S}".lstrip("&")))
    filesystem, path = fs.FileSystem.from_uri(uri)
    if parts.scheme == "s3":
        filesystem = copy.copy(filesystem)  # made by the class, it tries 3 times; from_uri's goes on for over a minute
    return filesystem, path


def holds_secret(uri: str) -> bool:
    """A user name, password or key is part of the URI."""
    parts = urlsplit(uri)
    before, at, _ = parts.netloc.rpartition("@")
    if any(name == "client_secret" for name, _ in parse_qsl(parts.query)):
        return True
    return bool(at) and (":" in before or not uri.startswith(("abfs", "gs://anonymous@", "gcs://anonymous@")))


def _without_secrets(uri: str) -> str:
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ConfigError("not a URI", field="--copy-to", allowed=_ALLOWED) from error
    host = parts.netloc.rpartition("@")[2] if holds_secret(uri) else parts.netloc
    return uri if uri.startswith("/") else urlunsplit((parts.scheme, host, parts.path, "", ""))


def _within(timeout_s: float, work: Callable[[], T]) -> T:
    """What ``work`` returns or raises; it is left behind when it takes longer than ``timeout_s``.

    Raises:
        TimeoutError: It did.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            future.set_exception(error)

    threading.Thread(target=run, name="open-destination", daemon=True).start()
    return future.result(timeout_s)
