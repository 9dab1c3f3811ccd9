"""The life of a command: its exit code, its streams, and which signals reach it how often."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from llem_ray.core.clock import SystemClock
from llem_ray.execution.command import CommandLife, NotStarted, find_program, relayed_signals, run_command

RUN = """
import sys
from llem_ray.core.clock import SystemClock
from llem_ray.execution.command import relayed_signals, run_command
with relayed_signals() as relay:
    life = run_command(sys.argv[1:], relay, SystemClock(), output_to_stderr=False)
print("code", life.exit_code, flush=True)
"""

COUNT = """
import signal, sys, time
seen = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: seen.append(signal.Signals(number).name))
print("ready", flush=True)
for _ in range(600):
    time.sleep(0.05)
    if seen:
        time.sleep(0.3)  # a second delivery would come now
        break
print("seen", *seen, flush=True)
sys.exit(7)
"""


def run(command: Sequence[str], **options: bool) -> CommandLife | NotStarted:
    with relayed_signals() as relay:
        return run_command(command, relay, SystemClock(), output_to_stderr=options.get("output_to_stderr", False))


def start(*command: str, **options: object) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", RUN, *command]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == line


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -KILL $$", 137), ("kill -SEGV $$", 139)],
)
def test_the_exit_code_is_the_commands(script: str, code: int) -> None:
    life = run(["sh", "-c", script])
    assert isinstance(life, CommandLife)
    assert life.exit_code == code
    assert life.end_ns > life.begin_ns


def test_the_life_spans_all_of_the_command(tmp_path: Path) -> None:
    script = "import sys, time; open(sys.argv[1], 'w').write(str(time.monotonic_ns())); time.sleep(0.05)"
    life = run([sys.executable, "-c", script, str(tmp_path / "begin")])
    assert isinstance(life, CommandLife)
    assert life.begin_ns < int((tmp_path / "begin").read_text()) <= life.end_ns - 50_000_000


def test_a_grandchild_that_holds_the_streams_does_not_hold_us(tmp_path: Path) -> None:
    with start("sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid") as process:
        wait_for(process, "code 0")
        assert process.wait() == 0
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_us_alone_reaches_the_command_once(name: str) -> None:
    with start(sys.executable, "-c", COUNT, start_new_session=True) as process:
        wait_for(process, "ready")
        process.send_signal(getattr(signal, name))
        wait_for(process, f"seen {name}")
        wait_for(process, "code 7")
        assert process.wait() == 0


def test_a_terminals_ctrl_c_reaches_the_command_once() -> None:
    terminal, theirs = pty.openpty()
    take_it = "import os; os.open(os.ttyname(0), os.O_RDWR)  # the terminal of this session from now on\n"
    arguments = [sys.executable, "-c", take_it + RUN, sys.executable, "-c", COUNT]
    with subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True):
        os.close(theirs)
        text = b""
        while b"ready" not in text:
            text += os.read(terminal, 4096)
        os.write(terminal, b"\x03")
        while not text.endswith(b"\n") or b"code" not in text:
            text += os.read(terminal, 4096)
    os.close(terminal)
    lines = text.decode().replace("^C", "").split("\r\n")
    assert "seen SIGINT" in lines
    assert "code 7" in lines


def test_an_ignored_signal_stays_ignored() -> None:
    script = "import signal; print('ignored', signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, flush=True)"
    nohup = textwrap.dedent(f"trap '' HUP; exec {sys.executable} -c '{RUN}' {sys.executable} -c \"{script}\"")
    done = subprocess.run(["sh", "-c", nohup], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["ignored True", "code 0"]


def test_signals_are_given_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    with relayed_signals():
        assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_while_the_command_is_being_started_is_not_lost() -> None:
    with relayed_signals() as relay:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # lets the handler run
        life = run_command(["sleep", "60"], relay, SystemClock(), output_to_stderr=False)
    assert isinstance(life, CommandLife)
    assert life.exit_code == 128 + signal.SIGTERM


def test_output_to_stderr_is_binary_safe(capfd: pytest.CaptureFixture[str]) -> None:
    run([sys.executable, "-c", r"import os; os.write(1, bytes(range(256)))"], output_to_stderr=True)
    assert capfd.readouterr().out == ""
    data = subprocess.run(
        [sys.executable, "-c", RUN.replace("to_stderr=False", "to_stderr=True"), "printf", r"\377\000\n"],
        capture_output=True,
        check=True,
    )
    assert data.stderr == b"\xff\x00\n"
    assert data.stdout == b"code 0\n"


def test_what_cannot_be_started_is_told_apart_as_env_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").write_text("text")
    (tmp_path / "broken").write_bytes(b"\x7fELF nonsense")
    (tmp_path / "broken").chmod(0o755)
    (tmp_path / "lost").write_text("#!/nowhere/interpreter\n")
    (tmp_path / "lost").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for program, code in (
        ("no-such-program", 127),
        ("", 127),
        (str(tmp_path / "absent"), 127),
        (str(tmp_path / "plain"), 126),
        ("plain", 126),
        (str(tmp_path), 126),
    ):
        refused = find_program(program)
        assert refused is not None
        assert (refused.exit_code, program in refused.message) == (code, True)
    assert find_program("broken") is None
    for program, code in (("broken", 126), ("lost", 127)):
        life = run([program])
        assert isinstance(life, NotStarted)
        assert life.exit_code == code
    for program in ("no-such-program", "plain", "lost", str(tmp_path)):
        life = run([program])
        assert isinstance(life, NotStarted)
        assert life.exit_code == subprocess.run(["env", program], capture_output=True, check=False).returncode
