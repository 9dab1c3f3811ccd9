"""Fixtures of the tests that run the real command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from submission import Submission


@pytest.fixture
def submission(tmp_path: Path) -> Callable[[str], Submission]:
    return lambda sweep: Submission(tmp_path, sweep)
