"""Where a run goes: `--address`, and the settings Ray needs for it before it is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from llem_ray.core.errors import ConfigError, PlacementError

AddressKind = Literal["embedded", "auto", "gcs", "jobs"]

JOBS_PORT: Final = 8265
ALLOWED: Final = "auto, HOST:PORT of the head (6379), or http://HOST:8265 for a Ray job; none runs on this machine alone"
GIVEN: Final = "RAY_AUTH_TOKEN"
IN_FILE: Final = "RAY_AUTH_TOKEN_PATH"
MODE: Final = "RAY_AUTH_MODE"
TLS_FILES: Final = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """A checked `--address`."""

    kind: AddressKind
    """`embedded`: a Ray of our own; `auto`, `gcs`: this process joins a cluster; `jobs`: a Ray job runs it on the head."""
    text: str
    """As Ray takes it; empty when embedded."""
    host: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        return self.text or "this machine"

    @property
    def jobs_address(self) -> str:
        """Where the same cluster takes Ray jobs, as far as one can tell."""
        return self.text if self.kind == "jobs" else f"http://{_bracketed(self.host or 'HEAD')}:{JOBS_PORT}"


def parse_address(text: str | None) -> Address:
    """What the user means by `--address`.

    Args:
        text: The flag or `LLEM_RAY_ADDRESS`; None or empty for this machine alone. `RAY_ADDRESS` is not looked at, so that a
            variable set for something else never moves a run; Ray itself follows it for `auto`.

    Raises:
        ConfigError: It is none of the forms there are. Of `ray://` the message names the address of the Jobs API.
    """
    text = (text or "").strip()
    if not text:
        return Address(kind="embedded", text="")
    if text == "auto":
        return Address(kind="auto", text=text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        host, port = _host_and_port(text, text)
        if port is None:
            raise _wrong("the port is missing", text)
        return Address(kind="gcs", text=f"{_bracketed(host)}:{port}", host=host, port=port)
    host, port = _host_and_port(rest.partition("/")[0], text)
    if scheme == "ray":
        raise _wrong(
            "Ray Client cannot carry a measurement: it dies with its connection",
            text,
            f"submit it as a Ray job: --address http://{_bracketed(host)}:{JOBS_PORT}",
        )
    if scheme not in {"http", "https"}:
        raise _wrong("an address of unknown kind", text)
    if port is None:
        raise _wrong("the port is missing", text)
    path = urlsplit(text).path.rstrip("/")
    return Address(kind="jobs", text=f"{scheme}://{_bracketed(host)}:{port}{path}", host=host, port=port)


def prepare_environment(address: Address, token_file: Path | None = None) -> None:
    """Give Ray its settings for a cluster; they must be there before it is imported. Embedded Ray sets its own.

    Raises:
        ConfigError: The token or a TLS file cannot be used.
        PlacementError: Ray was imported already, with other settings.
    """
    if address.kind == "embedded":
        if token_file is not None:
            raise ConfigError("a token is for a cluster", "give --address too", field="--token-file", found=str(token_file))
        return
    changes = cluster_environment(os.environ, token_file, tls=address.kind != "jobs")
    if "ray" in sys.modules and any(os.environ.get(name) != value for name, value in changes.items()):
        raise PlacementError("Ray was imported before llem-ray could set up the connection", "a plug-in imports it")
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def cluster_environment(environ: Mapping[str, str], token_file: Path | None, *, tls: bool = True) -> dict[str, str | None]:
    """Variables to set, or with None to remove, before Ray is imported for a cluster.

    The token is that of ``token_file``, else as Ray has it: `RAY_AUTH_TOKEN`, or the file `RAY_AUTH_TOKEN_PATH` or
    `~/.ray/auth_token`.
    `RAY_AUTH_MODE` is always set: what Ray does without it depends on how it is called and on files left in the home folder.

    Raises:
        ConfigError: The token file is missing, unreadable or empty, or a file for TLS is.
    """
    changes: dict[str, str | None] = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": None,  # it binds Ray to 127.0.0.1
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if tls and environ.get("RAY_USE_TLS", "0").lower() in {"1", "true"}:
        for name in TLS_FILES:
            _check_file(name, environ.get(name), "RAY_USE_TLS needs this file")
    mode = environ.get(MODE)
    if token_file is not None:
        _check_token(token_file, "--token-file")
        return {**changes, MODE: "token", GIVEN: None, IN_FILE: str(token_file.expanduser().absolute())}
    if mode == "disabled":
        return changes
    found = bool(environ.get(GIVEN))
    if not found and environ.get(IN_FILE):
        _check_token(Path(environ[IN_FILE]), IN_FILE)
        found = True
    default = Path(environ.get("HOME") or Path.home()) / ".ray" / "auth_token"
    if not found and default.exists():
        _check_token(default, MODE)
        found = True
    if mode == "token" and not found:
        raise ConfigError("there is no token", field=MODE, found=mode, allowed=f"--token-file, {GIVEN}, {IN_FILE} or {default}")
    return {**changes, MODE: mode or ("token" if found else "disabled")}


def has_token(environ: Mapping[str, str]) -> bool:
    """A token is sent, by the variables that ``prepare_environment`` left."""
    return environ.get(MODE, "disabled") != "disabled"


def _check_token(path: Path, field: str) -> None:
    text = _check_file(field, str(path), "no token")
    if not text.strip():
        raise ConfigError(
            "the token file is empty", field=field, found=str(path), allowed="a file that holds the cluster's token"
        )


def _check_file(field: str, path: str | None, message: str) -> bytes:
    if not path:
        raise ConfigError(f"{message}, and it is not set", field=field, allowed="path of a readable file")
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{message}: {error.strerror}", field=field, found=path, allowed="path of a readable file") from error


def _host_and_port(text: str, whole: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _wrong(f"no valid host and port ({error})", whole) from error
    if not host or parts.path or parts.query or parts.fragment or any(char.isspace() for char in text):
        raise _wrong("no valid host and port", whole)
    if parts.username or parts.password:
        raise _wrong("an address holds no user or password", "(not shown)", "give the token by --token-file")
    return host, port


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _wrong(message: str, found: str, hint: str | None = None) -> ConfigError:
    return ConfigError(message, hint, field="--address", found=found, allowed=ALLOWED)
