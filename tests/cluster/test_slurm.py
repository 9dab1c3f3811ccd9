"""The script for Slurm, run for real: its nodes are hosts of a lab, its commands small fakes that start processes there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_fixtures import require_lab, until
from slurm import FakeSlurm

from llem_ray.results.reader import read_table
from llem_ray.testing.lab import HostSpec, Lab, default_gpus

pytestmark = [pytest.mark.ray, pytest.mark.slow]

require_lab()

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "slurm" / "llem-ray.sbatch"
DEADLINE_S = 240.0
SWEEP = """
schema_version: 1
name: slurm
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, tensor_parallel: 2, gpus: 2, nodes: 2, engine_args: {decode_ms: 5, prefill_ms: 5}}
  workload: {batch_size: 2, output_tokens: 10}
repeats: 2
measure: {min_window_s: 1, idle_baseline_s: 0.5, sources: [nvml], gates: {min_coverage: 0.3}}
"""


class Site:
    """Two idle nodes, and a folder that both see."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        (folder / "sweep.yaml").write_text(SWEEP)
        self.next_job = 4001
        self._short = tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp")  # paths of sockets must be short
        self._slurms: list[FakeSlurm] = []

    def submit(self, *arguments: str, deaf: tuple[str, ...] = (), **env: str) -> tuple[subprocess.Popen[str], FakeSlurm]:
        job, self.next_job = self.next_job, self.next_job + 1
        slurm = FakeSlurm(self.lab, Path(self._short.name) / str(job), deaf)
        self._slurms.append(slurm)
        given = {
            "LLEM_RAY_VENV": sys.prefix,
            "LLEM_RAY_NODE_IP": self.lab.hosts["h1"].ip,
            "LLEM_RAY_START_OPTIONS": "--object-store-memory=100000000",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TMPDIR": "/tmp/ray",  # each host has its own
            **env,
        }
        words = arguments or ("sweep.yaml",)
        return slurm.sbatch(SCRIPT, *words, nodes=["h1", "h2"], job=job, cwd=self.folder, env=given), slurm

    def close(self) -> None:
        for slurm in self._slurms:
            slurm.close()
        self._short.cleanup()

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """Its exit code and output; nothing of the job is left."""
        out, err = process.communicate(timeout=DEADLINE_S)
        for host in ("h1", "h2"):
            ours = [each.command for each in self.lab.pids(host) if "ray" in each.command and "llem-ray-lab" not in each.command]
            assert not ours
            listed = self.lab.run(host, ["ls", "-A", "/tmp/ray"], timeout_s=20)
            assert listed.stdout == ""
        assert not list(self.folder.glob(".llem-ray-*"))
        return process.returncode, out, err


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("slurm")
    hosts = [HostSpec(name=name, gpus=default_gpus(name, 1), joins=False) for name in ("h1", "h2")]
    with Lab(hosts, folder=folder / "hosts", token=None) as lab:
        made = Site(lab, folder)
        yield made
        made.close()


def test_a_sweep_that_the_time_limit_interrupts_is_resumed_by_the_same_line(site: Site) -> None:
    process, slurm = site.submit()
    journals = lambda: "".join(path.read_text() for path in site.folder.glob("runs/*/journal.jsonl"))  # noqa: E731
    until(lambda: "measuring" in journals() or process.poll() is not None, deadline_s=DEADLINE_S, what="the first trial")
    tokens = list(site.folder.glob(".llem-ray-*/token"))
    assert [path.stat().st_mode & 0o777 for path in [*tokens, *(path.parent for path in tokens)]] == [0o600, 0o700]
    commands = [each.command for host in ("h1", "h2") for each in site.lab.pids(host)]
    assert tokens[0].read_text() not in " ".join(commands)
    process.send_signal(signal.SIGTERM)
    code, out, err = site.end(process)
    assert code == 130, (out, err)
    assert "2 nodes, 2 GPUs" in err
    assert "submit the same line again to resume" in err
    assert len(slurm.steps) == 1
    (run,) = site.folder.glob("runs/*")
    done = read_table(run, "trials").to_pylist()
    assert len(done) == 1
    assert all(row["status"] == "completed" for row in done)

    options = "--object-store-memory=100000000 --labels=llem-ray/backend=fake"
    code, out, err = site.end(site.submit(LLEM_RAY_START_OPTIONS=options)[0])
    assert code == 0, (out, err)
    assert "2 of 2 trials completed" in out
    rows = read_table(run, "trials").to_pylist()
    assert [row["attempt"] for row in rows] == [1, 1]
    assert all(row["total_gpu_energy_j"] > 0 and len(row["gang_nodes"]) == 2 for row in rows)


def test_a_node_that_never_comes_up_is_named_within_the_deadline(site: Site) -> None:
    begin_s = time.monotonic()
    process, _ = site.submit(deaf=("h2",), LLEM_RAY_START_TIMEOUT_S="5")
    code, out, err = site.end(process)
    assert code == 5, (out, err)
    assert "1 of 2 nodes joined within 5 s; missing: h2" in err
    assert "the cluster is not complete" in err
    assert time.monotonic() - begin_s < DEADLINE_S


def test_a_ray_that_does_not_start_ends_the_job_at_once_with_what_it_said(site: Site) -> None:
    # What the same job left when it was killed hard, and put back into the queue, is no hindrance.
    site.lab.run("h1", ["mkdir", "-p", f"/tmp/ray/llem-ray-{site.next_job}/session_old"], timeout_s=20)
    code, out, err = site.end(site.submit(LLEM_RAY_START_OPTIONS="--no-such-option")[0])
    assert code == 5, (out, err)
    assert "Ray on h1 ended before the cluster was up" in err or "Ray on h2 ended before the cluster was up" in err
    assert "No such option" in err
    assert len(err.splitlines()) < 40


@pytest.mark.parametrize(
    ("arguments", "env", "says", "code"),
    [
        (("absent.yaml",), {}, "there is no sweep file absent.yaml", 2),
        ((), {"LLEM_RAY_VENV": "/absent", "PATH": "/usr/bin:/bin"}, "no ray on the PATH", 5),
        ((), {"LLEM_RAY_NODE_IP": "127.0.1.1"}, "set LLEM_RAY_NODE_IP", 5),
        ((), {"LLEM_RAY_NODE_IP": "", "SLURM_JOB_NODELIST": "absent.invalid,h2"}, "absent.invalid does not tell", 5),
    ],
)
def test_what_is_missing_is_one_line(site: Site, arguments: tuple[str, ...], env: dict[str, str], says: str, code: int) -> None:
    found, _, err = site.end(site.submit(*arguments, **env)[0])
    assert found == code
    assert says in err
    assert len(err.splitlines()) == 1
