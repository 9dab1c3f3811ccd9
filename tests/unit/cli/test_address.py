"""`--address` and `--token-file` through the real command, where nothing is there to answer."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that is taken and not listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What commands set for Ray is undone; other tests of this process may have imported it."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "")
    for name in ("RAY_USE_TLS", "LLEM_RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.delenv(name, raising=False)


def test_ray_client_is_refused_with_the_address_to_use(llem, sweep: Path) -> None:
    ended = llem("submit", sweep, "--address", "ray://head:10001")
    assert ended.code == 2
    assert "hint: submit it as a Ray job: --address http://head:8265" in ended.err


@pytest.mark.parametrize("command", ["status", "watch", "logs", "stop", "show"])
def test_a_jobs_address_where_nothing_listens(llem, silent_port: int, command: str) -> None:
    ended = llem(command, "run", "--address", f"http://127.0.0.1:{silent_port}")
    assert ended.code == 5
    assert f"nothing listens at 127.0.0.1:{silent_port}" in ended.err


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_submit_where_nothing_listens(llem, sweep: Path, silent_port: int, scheme: str) -> None:
    ended = llem("submit", sweep, "--address", f"{scheme}127.0.0.1:{silent_port}")
    assert ended.code == 5
    assert f"nothing listens at 127.0.0.1:{silent_port}" in ended.err
    assert not Path("runs").exists()


def test_the_flag_goes_before_the_variable(llem, sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLEM_RAY_ADDRESS", "ray://variable:1")
    assert "http://variable:8265" in llem("submit", sweep).err
    assert "http://flag:8265" in llem("submit", sweep, "--address", "ray://flag:1").err


def test_a_token_file_that_is_not_there(llem, sweep: Path) -> None:
    ended = llem("submit", sweep, "--address", "http://head:8265", "--token-file", "none")
    assert ended.code == 2
    assert "--token-file: no token: No such file or directory" in ended.err


def test_only_a_job_can_be_left_alone(llem, sweep: Path) -> None:
    ended = llem("submit", sweep, "--detach")
    assert ended.code == 2
    assert "--detach: only a Ray job goes on by itself" in ended.err


def test_inline_needs_no_cluster(llem, sweep: Path) -> None:
    ended = llem("submit", sweep, "--inline", "--address", "head:6379")
    assert ended.code == 2
    assert "--inline runs without a cluster" in ended.err


def test_run_wants_a_packed_sweep(llem, sweep: Path) -> None:
    ended = llem("run", sweep, "--inline")
    assert ended.code == 2
    assert "the resolved sweep is not JSON" in ended.err
