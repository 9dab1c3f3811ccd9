"""What scripts/test, scripts/test-vllm and continuous integration are made of: every part runs, and one that fails is told."""

import re
import subprocess
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
