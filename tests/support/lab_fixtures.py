"""Labs for tests: skipping where there can be none, and scripts that run on their hosts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from llem_ray.testing.lab import Lab

PRELUDE = """
import json, logging, os, sys
import ray
ray.init(address=os.environ["LAB_ADDRESS"], logging_level=logging.ERROR, log_to_driver=False)
def say(value):
    print("said:" + json.dumps(value), flush=True)
"""


def require_lab() -> None:
    """Skip the test, or the module, where no lab can be had."""
    if reason := Lab.why_not():
        pytest.skip(reason, allow_module_level=True)


def ray_says(lab: Lab, host: str, script: str, *, timeout_s: float = 120.0) -> Any:
    """What a script, run on a host as a driver of the lab's cluster, hands to ``say``."""
    done = lab.run(host, [sys.executable, "-c", PRELUDE + script], env={"LAB_ADDRESS": lab.address}, timeout_s=timeout_s)
    said = [line.removeprefix("said:") for line in done.stdout.splitlines() if line.startswith("said:")]
    assert done.returncode == 0, done.stdout + done.stderr
    assert said, done.stdout + done.stderr
    return json.loads(said[-1])


def nodes(lab: Lab, host: str) -> list[dict[str, Any]]:
    """``ray.nodes()`` as a driver on a host sees it."""
    found: list[dict[str, Any]] = ray_says(lab, host, "say(ray.nodes())")
    return found


def alive(lab: Lab, host: str) -> dict[str, str]:
    """Names and Ray ids of the living nodes."""
    return {node["NodeName"]: node["NodeID"] for node in nodes(lab, host) if node["Alive"]}


def until(true: Callable[[], bool], *, deadline_s: float = 90.0, what: str) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < deadline, f"waited {deadline_s:g} s for {what}"
        time.sleep(0.1)
