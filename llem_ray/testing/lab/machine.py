"""A set of namespaces with an init process: what makes a host of a lab, and how commands enter it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

BOOT_S: Final = 30.0
"""Deadline for an init process to say it is ready."""
END_S: Final = 10.0
"""Deadline for killed processes to be gone."""
_MARK: Final = "llem-ray-lab"
_INIT: Final = Path(__file__).with_name("init.py")
_ENTER: Final = ("--net", "--pid", "--mount", "--uts", "--ipc", "--time")


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A living process of a host."""

    pid: int
    """As the creator of the lab sees it."""
    name: str
    command: str


class Entered(subprocess.Popen[str]):
    """A command inside a host. Signals go to the command itself, not to the nsenter that waits for it."""

    machine: Machine

    def send_signal(self, sig: int) -> None:
        """Signal the command."""
        deadline = time.monotonic() + END_S
        while self.poll() is None:
            if children := _children(self.pid):
                for pid in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, sig)
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"no command to signal below nsenter, process {self.pid}")
            time.sleep(0.005)  # it has not forked yet


class Machine:
    """Namespaces that live as long as their init process, which ends with the process that made it, however that ends."""

    def __init__(
        self,
        lab: str,
        *,
        log: Path,
        hostname: str | None = None,
        mounts: Sequence[Sequence[str]] = (),
        monotonic_offset_s: int = 0,
    ) -> None:
        """Boot.

        Args:
            lab: The lab's name, for finding what was left behind.
            log: File for what the init process says.
            hostname: Its host name; None: the machine's.
            mounts: Arguments of ``mount``, the mount point last; made where it does not exist.
            monotonic_offset_s: Shift of CLOCK_MONOTONIC and CLOCK_BOOTTIME, s.

        Raises:
            RuntimeError: It did not come up; the text has the end of its log.
        """
        spec = json.dumps({"hostname": hostname, "mounts": [list(arguments) for arguments in mounts]})
        shift = [f"--monotonic={monotonic_offset_s}", f"--boottime={monotonic_offset_s}"]
        command = ["unshare", "--fork", "--kill-child=KILL", "--mount-proc", *_ENTER, *shift, "--"]
        command += [sys.executable, "-I", "-S", str(_INIT), f"{_MARK}:{_creator()}:{lab}", spec]
        with log.open("ab") as errors:
            self._unshare = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={"PATH": os.environ.get("PATH", os.defpath)},
                cwd="/",
                start_new_session=True,
            )
        try:
            self._await_ready(hostname or "switch", log)
            (self.pid,) = _children(self._unshare.pid)
            self._pid_namespace = _namespace(self.pid)
        except BaseException:
            self.kill()
            raise

    def _await_ready(self, name: str, log: Path) -> None:
        assert self._unshare.stdout is not None
        ready, _, _ = select.select([self._unshare.stdout], [], [], BOOT_S)
        if not ready or self._unshare.stdout.readline() != b"ready\n":
            what = "ended at once" if ready else f"said nothing for {BOOT_S:g} s"
            raise RuntimeError(f"{name}: the init process {what}:\n{tail(log)}")

    @property
    def alive(self) -> bool:
        """Whether the init process runs."""
        return self._unshare.poll() is None

    def enter(self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, **options: Any) -> Entered:
        """Start a command inside all namespaces; ``options`` are those of Popen (text, start_new_session by default)."""
        options = {"start_new_session": True, "text": True} | options
        argv = [*_nsenter(self.pid, *_ENTER), "env", f"--chdir={cwd}", *command]
        process = Entered(argv, env=dict(env), **options)
        process.machine = self
        return process

    def in_network(self, *command: str, text: str | None = None) -> None:
        """Run a short command of the machine in this network namespace only.

        Raises:
            RuntimeError: It failed; the text is what it said.
        """
        argv = [*_nsenter(self.pid, "--net"), *command]
        done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False, timeout=END_S)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{text or ''}{done.stderr}")

    def processes(self) -> tuple[Process, ...]:
        """Processes inside, without the init process and zombies."""
        return tuple(process for process in processes_of(self._pid_namespace) if process.pid != self.pid) if self.alive else ()

    def listens(self, port: int) -> bool:
        """Whether something inside listens on a TCP port."""
        found = False
        for table in ("tcp", "tcp6"):
            rows = [row.split() for row in _read(f"/proc/{self.pid}/net/{table}").splitlines()[1:]]
            found = found or any(row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port for row in rows)
        return found

    def kill(self) -> None:
        """End the init process, and so everything inside; harmless where it is gone."""
        for pid in _children(self._unshare.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            self._unshare.wait(END_S)
        except subprocess.TimeoutExpired:
            self._unshare.kill()
            self._unshare.wait(END_S)
        for pipe in (self._unshare.stdin, self._unshare.stdout):
            if pipe is not None:
                pipe.close()


def processes_of(pid_namespace: str) -> Iterator[Process]:
    """Living processes of a pid namespace, by what ``/proc/PID/ns/pid`` reads."""
    for pid, fields in _stats():
        if fields[0] != "Z" and _namespace(pid) == pid_namespace:
            command = _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
            yield Process(pid=pid, name=_read(f"/proc/{pid}/comm").strip(), command=command)


def cleanup_stale() -> tuple[str, ...]:
    """Kill hosts whose creator is gone; returns their labs' names.

    Hosts end with their creator by themselves. They outlive it only where a child of it holds on to what it had open.
    """
    stale = []
    for pid, _ in list(_stats()):
        arguments = _read(f"/proc/{pid}/cmdline").split("\0")
        if str(_INIT) not in arguments[:-1]:
            continue
        mark, _, rest = arguments[arguments.index(str(_INIT)) + 1].partition(":")
        creator, _, lab = rest.partition(":")
        here = _inode(_namespace(os.getpid()))
        if mark == _MARK and creator.endswith(f"/{here}") and not _lives(creator):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            stale.append(lab)
    return tuple(dict.fromkeys(stale))


def why_not() -> str | None:
    """Why namespaces cannot be made here, or None."""
    if not sys.platform.startswith("linux"):
        return "a lab needs Linux"
    if os.geteuid() != 0:
        return "a lab needs root"
    packages = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "mount": "mount", "env": "coreutils"}
    if missing := [f"{tool} ({package})" for tool, package in packages.items() if shutil.which(tool) is None]:
        return f"a lab needs {', '.join(missing)}"
    if not Path("/proc/self/ns/time").exists():
        return "this kernel has no time namespaces"
    trial = "ip link add b0 type bridge && ip link add v0 type veth peer name v1"
    command = ["unshare", "--fork", "--mount-proc", *_ENTER, "--monotonic=1", "--boottime=1", "--", "sh", "-c", trial]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOOT_S)
    return None if done.returncode == 0 else f"no namespaces can be made here: {done.stderr.strip()}"


def tail(log: Path, lines: int = 30) -> str:
    """The end of a log file."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join(text.splitlines()[-lines:]) or "(its log is empty)"


def signal_group(process: subprocess.Popen[Any], sig: int) -> None:
    """Signal a command that leads its own session, and all that it started there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sig)


def read_to_end(process: Entered, timeout_s: float) -> tuple[str, str]:
    """What a command says until it ends; it is killed, with what it started, when that takes too long.

    Raises:
        TimeoutError: It did; the text has the end of its output.
    """
    try:
        return process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        signal_group(process, signal.SIGKILL)
        out, err = process.communicate(timeout=END_S)
        said = "\n".join((out + err).splitlines()[-30:])
        raise TimeoutError(f"the command did not end within {timeout_s:g} s; it said:\n{said}") from None
    except BaseException:
        signal_group(process, signal.SIGKILL)
        process.wait(END_S)
        _close(process.stdout, process.stderr)
        raise


def _close(*pipes: IO[str] | None) -> None:
    for pipe in pipes:
        if pipe is not None:
            pipe.close()


def _nsenter(pid: int, *namespaces: str) -> list[str]:
    return ["nsenter", f"--target={pid}", *namespaces, "--"]


def _creator() -> str:
    """This process, such that it is not mistaken for another with the same pid."""
    pid = os.getpid()
    return f"{pid}/{_started(pid)}/{_inode(_namespace(pid))}"


def _lives(creator: str) -> bool:
    pid, started, _ = creator.split("/")
    return _started(int(pid)) == started


def _started(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields and fields[0] != "Z" else ""


def _children(pid: int) -> list[int]:
    return [child for child, fields in _stats() if int(fields[1]) == pid]


def _stats() -> Iterator[tuple[int, list[str]]]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            yield int(entry.name), fields


def _stat(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` from the state on; empty where there is no such process."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _namespace(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


def _inode(namespace: str) -> str:
    """The number in ``pid:[4026531836]``."""
    return namespace.rpartition("[")[2].rstrip("]")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
