"""A real S3 server on the loopback interface: moto's, from an environment of its own (scripts/setup-s3)."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from failing_store import wait_until
from pyarrow import fs

from llem_ray.core.ports import reserve_port

SERVER = Path(os.environ.get("LLEM_RAY_VENV_S3", Path(__file__).parents[2] / ".venv-s3")) / "bin" / "moto_server"


class S3Server:
    """Starts and stops; what it holds is gone with it."""

    def __init__(self) -> None:
        self.port = reserve_port()
        self._process: subprocess.Popen[bytes] | None = None

    def uri(self, path: str, **options: str) -> str:
        query = {"endpoint_override": f"127.0.0.1:{self.port}", "scheme": "http", "region": "us-east-1", **options}
        return f"s3://{path}?" + "&".join(f"{name}={value}" for name, value in query.items())

    def start(self) -> None:
        command = [str(SERVER), "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self._listens)
        filesystem, bucket = fs.FileSystem.from_uri(self.uri("bucket", allow_bucket_creation="true"))
        filesystem.create_dir(bucket)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the server ended"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=60)
            self._process = None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    if not SERVER.exists():
        pytest.skip("no S3 server here: scripts/setup-s3 makes one")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    made = S3Server()
    made.start()
    yield made
    made.stop()
