"""What scripts/test, scripts/test-vllm and continuous integration are made of: every part runs, and one that fails is told."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = Path(__file__).parents[2] / "scripts" / "parts.sh"


@pytest.mark.parametrize(("first_code", "code", "told"), [(3, 1, {"FAILED one", "ok two"}), (0, 0, {"ok one", "ok two"})])
def test_all_parts_run_and_one_that_fails_fails_the_whole(first_code: int, code: int, told: set[str]) -> None:
    script = f'set -euo pipefail; . "{PARTS}"; part one bash -c "echo first; exit {first_code}"; part two echo second; summary'
    done = subprocess.run(["bash", "-c", f"{script}; echo never"], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    lines = [re.sub(r" +\d+ s +", " ", line) for line in done.stdout.splitlines()]
    assert [line for line in lines if line in {"first", "second", "never"}] == ["first", "second"]
    assert told <= set(lines)


def test_an_interrupt_ends_the_part_that_runs_and_begins_no_other() -> None:
    # Like pytest, the part takes Ctrl-C, tidies up, and ends with a code of its own. A parent may have SIGINT ignored.
    part = "import sys, time\ntry:\n print('begun', flush=True)\n time.sleep(300)\nexcept KeyboardInterrupt:\n sys.exit(2)"
    script = f'set -euo pipefail; . "{PARTS}"; part zero true; part one "$0" -c "$1"; part two echo second; summary'
    start = "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); os.execvp('bash', sys.argv[1:])"
    command = [sys.executable, "-c", start, "bash", "-c", script, sys.executable, part]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() not in {"begun\n", ""}:
            pass
        os.killpg(process.pid, signal.SIGINT)
        told = process.stdout.read()
    assert process.returncode == 130, told
    assert "second" not in told
    assert re.search(r"^ok .* zero\ninterrupted$", told, re.MULTILINE)
