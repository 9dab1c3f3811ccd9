"""Joining a Ray cluster: a look from a process of its own first, so that whatever is wrong is one message within seconds."""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from llem_ray.core.errors import ConfigError, PlacementError
from llem_ray.execution.ray.address import Address, has_token

NAMESPACE: Final = "llem-ray"
CONNECT_TIMEOUT_S: Final = 20.0
TCP_TIMEOUT_S: Final = 5.0
RAYLET_TIMEOUT_S: Final = "5"
"""Ray would look a minute for a raylet on this host."""
TIMEOUT_VARIABLE: Final = "LLEM_RAY_CONNECT_TIMEOUT_S"
NODE_IP_VARIABLE: Final = "LLEM_RAY_NODE_IP"


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """A node as the cluster's head knows it."""

    node_id: str
    ip: str
    hostname: str
    alive: bool
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def gpus(self) -> int:
        """Whole GPUs that Ray may give away there."""
        return int(self.resources.get("GPU", 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterFacts:
    """What a cluster is made of."""

    ray: str
    """Version of Ray; the same here and there."""
    python: str
    gcs_address: str
    nodes: tuple[NodeFacts, ...]
    """All nodes, also the dead."""

    @property
    def alive(self) -> tuple[NodeFacts, ...]:
        """Nodes that are up."""
        return tuple(node for node in self.nodes if node.alive)


def connect_timeout_s(environ: Mapping[str, str] = os.environ) -> float:
    """How long a cluster may take to answer, in seconds.

    Raises:
        ConfigError: `LLEM_RAY_CONNECT_TIMEOUT_S` is not a positive number.
    """
    text = environ.get(TIMEOUT_VARIABLE)
    if not text:
        return CONNECT_TIMEOUT_S
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 3600:
        raise ConfigError("not a time", field=TIMEOUT_VARIABLE, found=text, allowed="seconds, above 0 and below 3600")
    return value


def probe_cluster(address: Address, timeout_s: float | None = None) -> ClusterFacts:
    """Look at a cluster that this process is about to join. Call ``prepare_environment`` first.

    Args:
        address: Of kind ``auto`` or ``gcs``.
        timeout_s: Deadline of the look, in seconds; default: ``connect_timeout_s``.

    Raises:
        PlacementError: It cannot be reached or joined from here, or has no node that is alive; the message says why.
    """
    timeout_s = connect_timeout_s() if timeout_s is None else timeout_s
    if address.host is not None and address.port is not None:
        check_listens(address.host, address.port, min(TCP_TIMEOUT_S, timeout_s))
    answer = _Look(address, timeout_s).answer()
    if "error" in answer:
        raise explain(answer["error"], address)
    facts = ClusterFacts(**{**answer, "nodes": tuple(NodeFacts(**node) for node in answer["nodes"])})
    if not facts.alive:
        raise PlacementError(f"the cluster at {address} has no node that is alive", "`ray status` there says more")
    return facts


def connect(address: Address) -> Any:
    """Join the cluster with this process; returns Ray's context. Call ``prepare_environment`` and ``probe_cluster`` first.

    Raises:
        PlacementError: Ray did not let us.
    """
    import ray  # noqa: PLC0415 - settings must be in the environment before

    node_ip = os.environ.get(NODE_IP_VARIABLE)
    chosen: dict[str, Any] = {"_node_ip_address": node_ip} if node_ip else {}
    try:
        return ray.init(address=address.text, namespace=NAMESPACE, log_to_driver=False, configure_logging=False, **chosen)
    except Exception as error:
        raise explain(f"{type(error).__name__}: {error}\n{error.__cause__ or ''}", address) from error


def check_listens(host: str, port: int, timeout_s: float) -> None:
    """Somebody accepts connections at ``host:port``.

    Raises:
        PlacementError: The name is unknown, nothing listens, there is no way there, or no answer within ``timeout_s``.
    """
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except socket.gaierror as error:
        raise PlacementError(f"the host name {host!r} does not resolve: {error.strerror}", "check --address") from error
    except ConnectionRefusedError as error:
        hint = "is the head up, and this its port? `ray start --head` prints it"
        raise PlacementError(f"nothing listens at {host}:{port}", hint) from error
    except TimeoutError as error:
        hint = "a firewall, or a host that is down"
        raise PlacementError(f"{host}:{port} did not answer within {timeout_s:g} s", hint) from error
    except OSError as error:
        raise PlacementError(f"cannot reach {host}:{port}: {error.strerror or error}", "check network and --address") from error


class _Look:
    """The process that looks, and what it says on stderr while Ray still tries: enough to end it long before Ray gives up."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s

    def answer(self) -> dict[str, Any]:
        """The JSON it printed.

        Raises:
            PlacementError: It said what is wrong, ended without an answer, or took too long.
        """
        node_ip = os.environ.get(NODE_IP_VARIABLE)
        script = str(Path(__file__).with_name("probe.py"))
        command = [sys.executable, "-P", script, self._address.text, str(self._timeout_s), *([node_ip] if node_ip else [])]
        environment = {**os.environ, "RAY_gcs_server_request_timeout_seconds": RAYLET_TIMEOUT_S}
        environment.pop("RAY_JOB_CONFIG_JSON_ENV_VAR", None)  # within a Ray job: this is not the job's driver
        with subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                return self._listen(process)
            finally:
                process.kill()

    def _listen(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        lines: queue.SimpleQueue[tuple[IO[str], str | None]] = queue.SimpleQueue()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            threading.Thread(target=_pump, args=(stream, lines), daemon=True).start()
        deadline = time.monotonic() + self._timeout_s
        said: list[str] = []
        open_streams = 2
        while open_streams:
            try:
                stream, line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise self._timed_out(said) from None
            if line is None:
                open_streams -= 1
            elif stream is process.stderr:
                said.append(line.strip())
                if problem := _hopeless(line, self._address):
                    raise problem
            elif line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise explain("\n".join(said[-5:]) or f"Ray ended with code {process.wait()}", self._address)

    def _timed_out(self, said: list[str]) -> PlacementError:
        last = f"; Ray last said: {said[-1]}" if said else ""
        hint = f"{TIMEOUT_VARIABLE} gives it longer; `ray status` on the head says whether it is well"
        return PlacementError(f"the cluster at {self._address} gave no answer within {self._timeout_s:g} s{last}", hint)


def _pump(stream: IO[str], lines: queue.SimpleQueue[tuple[IO[str], str | None]]) -> None:
    try:
        for line in stream:
            lines.put((stream, line))
    except ValueError:  # closed by the reader, who has heard enough
        pass
    finally:
        lines.put((stream, None))


def _hopeless(line: str, address: Address) -> PlacementError | None:
    """What a line of Ray's log means that no further waiting mends."""
    if "InvalidAuthToken" in line:
        return token_refused(address)
    if "Handshake failed" in line or "CERTIFICATE_VERIFY_FAILED" in line:
        if "WRONG_VERSION_NUMBER" in line:
            return PlacementError(f"the cluster at {address} does not use TLS, but RAY_USE_TLS is set here", "unset RAY_USE_TLS")
        reason = "its certificate is not trusted" if "VERIFY_FAILED" in line else "the handshake failed"
        hint = "RAY_TLS_CA_CERT must have signed the head's certificate, which must name the head's address"
        return PlacementError(f"no TLS connection to the cluster at {address}: {reason}", hint)
    if match := re.search(r"Failed to connect to GCS at address (\S+):(\d+) within", line):
        return _no_gcs(match[1], int(match[2]), address)
    if "Received http2 header with status" in line:
        return _no_head(str(address), address)
    return None


def _no_gcs(host: str, port: int, address: Address) -> PlacementError:
    """TCP works, but what answers is not a Ray head that we understand."""
    if address.host is not None and host != address.host:
        try:
            check_listens(host, port, TCP_TIMEOUT_S)
        except PlacementError as error:
            hint = f"start the head with --node-ip-address={host}, or use its own address"
            return PlacementError(f"Ray goes to {host} instead of {address.host}, but {error.message}", hint)
    if os.environ.get("RAY_USE_TLS", "0").lower() not in {"1", "true"} and _speaks_tls(host, port):
        hint = "set RAY_USE_TLS=1, RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT"
        return PlacementError(f"the cluster at {host}:{port} wants TLS", hint)
    return _no_head(f"{host}:{port}", address)


def _no_head(where: str, address: Address) -> PlacementError:
    hint = f"the head's port is 6379 unless chosen otherwise; of the dashboard's port write {address.jobs_address}"
    return PlacementError(f"what listens at {where} is no Ray head, or one that hangs", hint)


def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only asked whether it is TLS at all
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host, port), timeout=TCP_TIMEOUT_S) as plain, context.wrap_socket(plain):
            return True
    except OSError:
        return False


def token_refused(address: Address) -> PlacementError:
    """The cluster did not take our token, or wants one."""
    if has_token(os.environ):
        hint = "`ray get-auth-token` on the head prints the right one"
        return PlacementError(f"the cluster at {address} refuses the token", hint)
    hint = "--token-file PATH, or RAY_AUTH_TOKEN_PATH; `ray get-auth-token` on the head prints it"
    return PlacementError(f"the cluster at {address} demands a token, and there is none here", hint)


def explain(text: str, address: Address) -> PlacementError:
    """Ray's words about a failed connection, in ours."""
    for line in text.splitlines():
        if problem := _hopeless(line, address):
            return problem
    if versions := re.findall(r"Ray: (\S+)\s+Python: (\S+)", text):
        return _mismatch(versions, address)
    if "Could not find any running Ray instance" in text:
        hint = "start one with `ray start`, or name the head: --address HOST:6379 or http://HOST:8265"
        return PlacementError("no Ray cluster runs on this machine, which `auto` looks for", hint)
    if "No node info found" in text or "found no Raylet" in text:
        hint = f"submit it from here as a Ray job: --address {address.jobs_address}"
        return PlacementError(f"this machine is not a node of the cluster at {address}, and only a node can join it", hint)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return PlacementError(f"cannot connect to the cluster at {address}: {lines[0] if lines else 'no reason given'}")


def _mismatch(versions: list[tuple[str, str]], address: Address) -> PlacementError:
    (their_ray, their_python), (our_ray, our_python) = versions[0], versions[-1]
    parts = [f"Ray {their_ray} there, {our_ray} here"] if their_ray != our_ray else []
    parts += [f"Python {their_python} there, {our_python} here"] if their_python != our_python else []
    hint = f"both must be the same; as a Ray job it needs no match: --address {address.jobs_address}"
    if their_ray != our_ray:
        hint = f"pip install 'ray[default]=={their_ray}'; {hint}"
    return PlacementError(f"versions differ from those of the cluster at {address}: {', '.join(parts)}", hint)
