"""An embedded, loopback-only Ray that lives and dies with this process."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from llem_ray.core.errors import PlacementError
from llem_ray.execution.ray.base import RayExecutor
from llem_ray.execution.ray.reaper import kill_left_behind
from llem_ray.execution.ray.runtime import EMBEDDED, NAMESPACE, first_line, import_embedded

OBJECT_STORE_BYTES: Final = 256 * 2**20
MARK: Final = "LLEM_RAY_EMBEDDED"
"""Environment variable that every process of an embedded Ray carries."""
REAPER_TIMEOUT_S: Final = 10.0
ANSWER_S: Final = 1.0


class EmbeddedRayExecutor(RayExecutor):
    """A Ray of our own on this host: bound to 127.0.0.1, with a random token, gone when this process is."""

    def __init__(self) -> None:
        super().__init__()
        self._temp_dir: Path | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._head: tuple[str, int] | None = None

    def start(self) -> None:
        """Start Ray.

        Raises:
            PlacementError: It did not start, or something imported Ray before us, so that our settings came too late.
        """
        if "ray" in sys.modules and any(os.environ.get(name) != value for name, value in EMBEDDED.items()):
            raise PlacementError(
                "Ray was imported before llem-ray could bind it to this host alone", "an engine plug-in imports it"
            )
        ray = import_embedded()
        self._temp_dir = Path(tempfile.mkdtemp(prefix="llem-ray-", dir="/tmp"))
        # What Ray starts inherits the mark, so that the reaper knows it; the reaper itself must not.
        self._reaper = _start_reaper(self._temp_dir)
        os.environ[MARK] = str(self._temp_dir)
        try:
            context = ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                object_store_memory=OBJECT_STORE_BYTES,
                namespace=NAMESPACE,
                _temp_dir=str(self._temp_dir),
            )
        except Exception as error:
            self.close()
            raise PlacementError(f"Ray did not start on this host: {first_line(error)}") from error
        self._logs = Path(context.address_info["session_dir"]) / "logs"
        host, _, port = context.address_info["gcs_address"].rpartition(":")
        self._head = (host, int(port))

    def is_gone(self) -> bool:
        """Nothing listens where its head (GCS) did: it is on this host, and never restarted."""
        if self._head is None:
            return False
        try:
            socket.create_connection(self._head, timeout=ANSWER_S).close()
        except ConnectionRefusedError:
            return True
        except OSError:  # busy
            return False
        return False

    def facts(self) -> Mapping[str, str]:
        """For the environment record."""
        return {"executor": "ray-embedded", "ray": str(import_embedded().__version__)}

    def close(self) -> None:
        """Stop Ray and remove its files. Once its head is gone the others only wait for it: they are killed."""
        if self._temp_dir is not None and self.is_gone():
            kill_left_behind(f"{MARK}={self._temp_dir}".encode(), str(self._temp_dir), {os.getpid()})
        with contextlib.suppress(Exception):
            import_embedded().shutdown()
        os.environ.pop(MARK, None)
        if self._temp_dir is not None:
            shutil.rmtree(self._temp_dir, ignore_errors=True)
            self._temp_dir = None
        if self._reaper is not None and self._reaper.stdin is not None:
            self._reaper.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._reaper.wait(timeout=REAPER_TIMEOUT_S)
            self._reaper = None


def _start_reaper(folder: Path) -> subprocess.Popen[bytes]:
    """The process that cleans up after us however we end."""
    script = Path(__file__).with_name("reaper.py")
    command = [sys.executable, "-I", "-S", str(script), f"{MARK}={folder}", str(folder), str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
