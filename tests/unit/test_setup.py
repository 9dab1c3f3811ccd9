"""What scripts/setup-venv says where it cannot make an environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts" / "setup-venv"


@pytest.mark.parametrize("lacking", ["import sys; sys.modules['ensurepip'] = None", "import sys; sys.version_info = (3, 10, 1)"])
def test_without_a_python_that_makes_environments_it_says_what_is_needed_and_leaves_nothing(tmp_path: Path, lacking: str) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "cut", "dirname", "sha256sum", "tr"):
        (tools / name).symlink_to(shutil.which(name) or name)
    python = tools / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{lacking}; exec(sys.argv[1])" "$2"\n')
    python.chmod(0o755)
    env = {"PATH": str(tools), "LLEM_RAY_VENV": str(tmp_path / "venv"), "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(["bash", SETUP], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("llem-ray needs Python 3.11, 3.12 or 3.13 with venv")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()
