"""Looking at a real head, with the right token, a wrong one and none; and at what is no head."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from head import Head, ray_head

from llem_ray.core.errors import PlacementError
from llem_ray.execution.ray.address import cluster_environment, parse_address
from llem_ray.execution.ray.connect import probe_cluster

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(dashboard=False) as started:
        yield started


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def prepare(monkeypatch: pytest.MonkeyPatch, token_file: Path | None) -> None:
    for name, value in cluster_environment(os.environ, token_file).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)


def test_a_head_that_is_well(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, head.token_file)
    facts = probe_cluster(parse_address(head.address))
    (node,) = facts.alive
    assert node.resources["CPU"] == 1
    assert node.gpus == 0
    assert facts.gcs_address == head.address
    assert node.ip == head.address.rpartition(":")[0]


def test_a_wrong_token(head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("wrong")
    prepare(monkeypatch, tmp_path / "wrong")
    with pytest.raises(PlacementError, match=f"the cluster at {head.address} refuses the token"):
        probe_cluster(parse_address(head.address))


def test_no_token(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, None)
    with pytest.raises(PlacementError, match="demands a token, and there is none here") as error:
        probe_cluster(parse_address(head.address))
    assert "--token-file" in (error.value.hint or "")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls_here_and_none_there(head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "2"]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=60)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(key))
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(certificate))
    monkeypatch.setenv("RAY_TLS_CA_CERT", str(certificate))
    prepare(monkeypatch, head.token_file)
    with pytest.raises(PlacementError, match="does not use TLS, but RAY_USE_TLS is set here"):
        probe_cluster(parse_address(head.address))


def test_what_listens_is_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, None)
    with http.server.HTTPServer(("", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(PlacementError, match="is no Ray head, or one that hangs"):
                probe_cluster(parse_address(f"127.0.0.1:{server.server_port}"))
        finally:
            server.shutdown()


def test_silence_ends_at_the_deadline(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, head.token_file)
    monkeypatch.setenv("LLEM_RAY_CONNECT_TIMEOUT_S", "0.01")
    with pytest.raises(PlacementError, match=r"gave no answer within 0\.01 s"):
        probe_cluster(parse_address(head.address))


def test_the_doctor_examines_every_node_and_the_interpreters_of_a_sweep(head: Head, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        "schema_version: 1\nname: study\nbase:\n  model: {config: llama-tiny}\n"
        f"  engine: {{backend: transformers, device: cpu, python: {sys.executable}}}\n"
    )
    command = [sys.executable, "-m", "llem_ray", "doctor", str(sweep), "--json"]
    command += ["--address", head.address, "--token-file", str(head.token_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (node,) = report["nodes"]
    assert node["problem"] is None
    engines = {(engine["name"], engine["interpreter"]): engine for engine in node["host"]["engines"]}
    there = engines["transformers", sys.executable]
    assert there["importable"], there["problem"]
    assert there["device"].startswith(("cpu", "cuda"))
    assert report["memory"][0]["parts"][0]["lower_bytes"] == 4 * 1_000_576
    assert report["problems"] == []
    command += ["--set", "base.engine.engine_args={nonsense: 1}", "--set", "base.engine.python=null"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2, refused.stderr
    assert "engine.engine_args.nonsense: unknown engine argument" in refused.stderr
    assert json.loads(refused.stdout)["problems"][0].startswith("engine.engine_args.nonsense")
