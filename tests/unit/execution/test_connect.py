"""Addresses, tokens and the settings of a connection; what is wrong is told before Ray is asked, or in our words after."""

import socket
from pathlib import Path

import pytest

from llem_ray.core.errors import ConfigError, PlacementError
from llem_ray.execution.ray.address import Address, cluster_environment, parse_address, prepare_environment
from llem_ray.execution.ray.choice import make_executor
from llem_ray.execution.ray.connect import check_listens, connect_timeout_s, explain, probe_cluster
from llem_ray.execution.ray.executor import EmbeddedRayExecutor

HEAD = parse_address("head:6379")


@pytest.mark.parametrize(
    ("text", "kind", "as_ray_takes_it"),
    [
        (None, "embedded", ""),
        ("", "embedded", ""),
        (" auto ", "auto", "auto"),
        ("head:6379", "gcs", "head:6379"),
        ("10.0.0.1:6379", "gcs", "10.0.0.1:6379"),
        ("[fd00::1]:6379", "gcs", "[fd00::1]:6379"),
        ("http://head:8265", "jobs", "http://head:8265"),
        ("https://ray.example.org:443/cluster/", "jobs", "https://ray.example.org:443/cluster"),
    ],
)
def test_addresses(text: str | None, kind: str, as_ray_takes_it: str) -> None:
    found = parse_address(text)
    assert (found.kind, found.text) == (kind, as_ray_takes_it)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ray://head:10001", "--address http://head:8265"),
        ("ray://head", "--address http://head:8265"),
        ("head", "the port is missing"),
        ("http://head", "the port is missing"),
        ("local", "the port is missing"),
        ("head:port", "no valid host and port"),
        ("head:70000", "no valid host and port"),
        (":6379", "no valid host and port"),
        ("he ad:6379", "no valid host and port"),
        ("head:6379/path", "no valid host and port"),
        ("tcp://head:6379", "unknown kind"),
        ("redis://head:6379", "unknown kind"),
    ],
)
def test_other_addresses_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_address(text)
    assert says in str(error.value)
    assert "allowed: auto, HOST:PORT" in str(error.value)
    assert error.value.found == text


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match="no user or password") as error:
        parse_address("http://me:secret@head:8265")
    assert "secret" not in str(error.value)


def test_the_jobs_address_of_the_same_head() -> None:
    assert HEAD.jobs_address == "http://head:8265"
    assert parse_address("[fd00::1]:6379").jobs_address == "http://[fd00::1]:8265"
    assert parse_address("http://head:80").jobs_address == "http://head:80"


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("s3cret\n")
    return path


def test_the_mode_is_always_set(tmp_path: Path, token: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert cluster_environment(home, None)["RAY_AUTH_MODE"] == "disabled"
    assert cluster_environment({**home, "RAY_AUTH_TOKEN": "t"}, None)["RAY_AUTH_MODE"] == "token"
    assert cluster_environment({**home, "RAY_AUTH_TOKEN_PATH": str(token)}, None)["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_MODE" not in cluster_environment({**home, "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "t"}, None)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    assert cluster_environment(home, None)["RAY_AUTH_MODE"] == "token"


def test_the_flag_goes_before_the_environment(token: Path) -> None:
    changes = cluster_environment({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "other"}, token)
    assert changes["RAY_AUTH_MODE"] == "token"
    assert changes["RAY_AUTH_TOKEN"] is None
    assert changes["RAY_AUTH_TOKEN_PATH"] == str(token)
    assert "s3cret" not in str(changes)


def test_a_cluster_is_not_bound_to_loopback_and_sends_no_statistics() -> None:
    changes = cluster_environment({"RAY_AUTH_MODE": "disabled"}, None)
    assert changes == {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": None, "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.mark.parametrize(("content", "says"), [(None, "No such file"), (b"", "is empty"), (b" \n", "is empty")])
@pytest.mark.parametrize("way", ["flag", "variable"])
def test_a_token_file_that_cannot_be_used(tmp_path: Path, content: bytes | None, says: str, way: str) -> None:
    path = tmp_path / "bad"
    if content is not None:
        path.write_bytes(content)
    environ = {"HOME": str(tmp_path), **({"RAY_AUTH_TOKEN_PATH": str(path)} if way == "variable" else {})}
    with pytest.raises(ConfigError, match=says) as error:
        cluster_environment(environ, path if way == "flag" else None)
    assert error.value.field == ("--token-file" if way == "flag" else "RAY_AUTH_TOKEN_PATH")
    assert error.value.found == str(path)


def test_a_mode_that_needs_a_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no token"):
        cluster_environment({"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}, None)


def test_files_of_tls(tmp_path: Path) -> None:
    present = tmp_path / "cert"
    present.write_text("x")
    environ = {"RAY_AUTH_MODE": "disabled", "RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": str(present)}
    with pytest.raises(ConfigError, match="RAY_TLS_SERVER_KEY: RAY_USE_TLS needs this file, and it is not set"):
        cluster_environment(environ, None)
    environ["RAY_TLS_SERVER_KEY"] = str(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"RAY_TLS_SERVER_KEY.*No such file"):
        cluster_environment(environ, None)
    cluster_environment(environ, None, tls=False)
    cluster_environment({**environ, "RAY_USE_TLS": "0"}, None)


def test_a_token_for_this_machine_is_refused(token: Path) -> None:
    with pytest.raises(ConfigError, match="a token is for a cluster"):
        prepare_environment(parse_address(None), token)


def test_executors() -> None:
    assert isinstance(make_executor(parse_address(None)), EmbeddedRayExecutor)
    with pytest.raises(ConfigError, match="runs where it is called"):
        make_executor(parse_address("http://head:8265"))


def test_the_deadline() -> None:
    assert connect_timeout_s({}) == 20.0
    assert connect_timeout_s({"LLEM_RAY_CONNECT_TIMEOUT_S": "2.5"}) == 2.5
    for text in ("soon", "0", "-1", "inf", "nan"):
        with pytest.raises(ConfigError, match="LLEM_RAY_CONNECT_TIMEOUT_S") as error:
            connect_timeout_s({"LLEM_RAY_CONNECT_TIMEOUT_S": text})
        assert error.value.found == text


def test_nothing_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(PlacementError, match=f"nothing listens at 127.0.0.1:{port}"):
            probe_cluster(parse_address(f"127.0.0.1:{port}"))


def test_a_name_that_does_not_resolve() -> None:
    with pytest.raises(PlacementError, match=r"'no-such-host\.invalid' does not resolve"):
        check_listens("no-such-host.invalid", 6379, 5.0)


VERSIONS = """ConnectionError: x
RuntimeError: Version mismatch: The cluster was started with:
    Ray: {}
    Python: {}
This process on node 10.0.0.1 was started with:
    Ray: {}
    Python: {}
"""


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        (VERSIONS.format("2.60.0", "3.11.7", "2.55.1", "3.11.7"), "Ray 2.60.0 there, 2.55.1 here", "ray[default]==2.60.0"),
        (VERSIONS.format("2.60.0", "3.12.1", "2.60.0", "3.11.7"), "Python 3.12.1 there, 3.11.7 here", "http://head:8265"),
        ("ConnectionError: Could not find any running Ray instance. Please", "no Ray cluster runs on this machine", "ray start"),
        ("RuntimeError: No node info found matching attributes: ''", "this machine is not a node", "http://head:8265"),
        ("RPC error: InvalidAuthToken: Authentication token is missing", "demands a token", "--token-file"),
        ("RuntimeError: something new\n more", "cannot connect to the cluster at head:6379: RuntimeError: something new", ""),
    ],
)
def test_rays_words_in_ours(monkeypatch: pytest.MonkeyPatch, text: str, says: str, hint: str) -> None:
    """The texts are Ray 2.60's own, as real heads gave them; other versions cannot be installed side by side in one test."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    error = explain(text, HEAD)
    assert says in error.message
    assert hint in (error.hint or "")


def test_a_token_that_is_refused_is_told_from_one_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert "refuses the token" in explain("InvalidAuthToken", HEAD).message


def test_an_address_says_where_it_is() -> None:
    assert str(Address(kind="embedded", text="")) == "this machine"
    assert str(HEAD) == "head:6379"
