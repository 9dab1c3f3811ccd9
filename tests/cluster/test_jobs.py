"""Runs as Ray jobs on a real head, through the real command: every call is a new process, as from another machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from head import Head, ray_head
from submission import RECORDING, suspended

from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DEADLINE_S = 120.0
SWEEP = """
schema_version: 1
name: {name}
base:
  model: {{config: llama-tiny}}
  engine: {{backend: fake, device: cpu{engine}}}
  workload: {{input_tokens: 8, output_tokens: 4, prompts: {{source: file, path: ../prompts.jsonl}}}}
sweep: {{workload.batch_size: [1, 2]}}
repeats: {repeats}
measure: {{min_window_s: {window_s}, idle_baseline_s: 0, sources: [replay], gates: {{min_coverage: 0.05}}}}
"""


class Remote:
    """`llem-ray` with the address of a head."""

    def __init__(self, head: Head, folder: Path) -> None:
        self.head, self.folder, self.results = head, folder, folder / "on-the-head"
        (folder / "sweeps").mkdir()
        (folder / "prompts.jsonl").write_text("".join(f'"a prompt, number {i}, of some words"\n' for i in range(8)))

    def sweep(self, name: str, *, engine: str = "", repeats: int = 1, window_s: float = 0.2) -> Path:
        path = self.folder / "sweeps" / f"{name}.yaml"
        path.write_text(SWEEP.format(name=name, engine=engine, repeats=repeats, window_s=window_s))
        return path

    def start(self, *arguments: object, python: str = sys.executable) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "llem_ray", *map(str, arguments)]
        command += ["--address", self.head.jobs_address, "--token-file", str(self.head.token_file)]
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env["LLEM_RAY_REMOTE_PYTHON"] = python
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def call(self, *arguments: object, python: str = sys.executable) -> tuple[int, str, str]:
        process = self.start(*arguments, python=python)
        out, err = process.communicate(timeout=DEADLINE_S)
        return process.returncode, out, err

    def submit(self, sweep: Path, *arguments: object, python: str = sys.executable) -> tuple[int, str, str]:
        return self.call(*self.submission(sweep), *arguments, python=python)

    def submission(self, sweep: Path) -> tuple[object, ...]:
        return ("submit", sweep, "--inline", "--results", self.results)

    def run(self, name: str) -> RunDirectory:
        (path,) = self.results.glob(f"{name}-*")
        return RunDirectory.open(path)

    def driver_of(self, name: str) -> int:
        """Process id of the run's newest driver."""
        started = [line for line in self.run(name).journal_path.read_text().splitlines() if '"run_started"' in line]
        return int(json.loads(started[-1])["pid"])

    def wait_for(self, name: str, text: str) -> None:
        """Until the run's journal says it."""
        deadline = time.monotonic() + DEADLINE_S
        while not any(text in path.read_text() for path in self.results.glob(f"{name}-*/journal.jsonl")):
            assert time.monotonic() < deadline, f"no {text} in the journal of {name}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "recording.csv").write_text(RECORDING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLEM_RAY_REPLAY", str(folder / "recording.csv"))
        patch.setenv("LLEM_RAY_REPLAY_LOOP", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        with ray_head(dashboard=True) as head:
            yield Remote(head, folder)


def test_a_run_from_submit_to_its_results(remote: Remote) -> None:
    sweep = remote.sweep("whole")
    code, out, err = remote.submit(sweep)
    assert code == 0, err
    run = remote.run("whole")
    assert "2 of 2 trials completed" in out
    assert f"{run.name} is submitted as the Ray job llem-{run.name}" in err
    assert f"the results are on the head, in {run.path}" in err
    assert all(row["power_valid"] for row in read_table(run.path, "trials").to_pylist())

    again = remote.submit(sweep)
    assert again[0] == 0
    assert "is finished; --again" in again[2]
    assert "2 of 2 trials completed" in again[1]
    assert json.loads(remote.call("status", "whole", "--json")[1]) == {
        "run": run.name,
        "job": f"llem-{run.name}",
        "state": "succeeded",
        "exit_code": 0,
        "results": str(run.path),
        "last": None,
    }
    assert "2 of 2 trials completed" in remote.call("show", "whole")[1]
    assert "2 of 2 trials completed" in remote.call("logs", "whole")[1]
    refused = remote.call("stop", "whole")
    assert refused[0] == 5
    assert "is not running" in refused[2]


def test_the_job_runs_the_sweep_on_the_cluster(remote: Remote) -> None:
    """Engine and sampler are actors of the cluster, and prompts come from the job's package."""
    code, out, err = remote.call("submit", remote.sweep("real"), "--results", remote.results)
    assert code == 0, (out, err)
    assert "2 of 2 trials completed" in out
    assert json.loads((remote.run("real").path / "environment.json").read_text())


def test_the_run_drivers_exit_code_is_ours(remote: Remote) -> None:
    sweep = remote.sweep("failing", engine=", engine_args: {fail: {kind: out_of_memory, batch_above: 1}}")
    code, out, _ = remote.submit(sweep)
    assert code == 3
    assert "out_of_memory" in out
    assert "exit code 3" in remote.call("status", "failing")[1]
    code, out, err = remote.submit(sweep)
    assert code == 3
    assert "goes on as the Ray job llem-failing-" in err
    assert "is finished; --again" in out


def test_ctrl_c_detaches_and_others_follow(remote: Remote) -> None:
    sweep = remote.sweep("long", repeats=2, window_s=4.0)
    process = remote.start(*remote.submission(sweep))
    remote.wait_for("long", "measuring")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "the run goes on" in err
    name = remote.run("long").name
    assert f"llem-ray watch {name} --address {remote.head.jobs_address}" in err

    code, out, _ = remote.call("status", "long")
    assert code == 0
    assert out.startswith(f"{name}: running, Ray job llem-{name}, trial ")
    with suspended(remote.driver_of("long")):
        code, _, err = remote.submit(sweep, "--detach")
        assert code == 0
        assert f"{name} runs already, as the Ray job llem-{name}" in err

        code, out, _ = remote.call("stop", "long")
        assert code == 0
        assert f"to stop {name} after its running trial" in out
    code, out, err = remote.call("watch", "long")
    assert code == 0
    assert f"{name}: failed, Ray job llem-{name}, exit code 130" in err
    done = len(read_table(remote.run("long").path, "trials"))
    assert 0 < done < 4

    code, out, err = remote.submit(sweep)
    assert code == 0, err
    assert f"{name} goes on as the Ray job llem-{name}-2" in err
    assert "4 of 4 trials completed" in out
    attempts = [row["attempt"] for row in read_table(remote.run("long").path, "trials").to_pylist()]
    assert attempts == [1, 1, 1, 1]


def test_stop_now_keeps_what_is_done(remote: Remote) -> None:
    sweep = remote.sweep("hasty", repeats=1, window_s=600.0)
    assert remote.submit(sweep, "--detach")[0] == 0
    remote.wait_for("hasty", "measuring")
    assert "asked Ray to stop" in remote.call("stop", "hasty", "--now")[1]
    assert remote.call("watch", "hasty")[0] == 0
    assert "stopped" in remote.call("status", "hasty")[1]
    assert '"interrupted"' in remote.run("hasty").journal_path.read_text()


def test_two_submits_at_once_are_one_run(remote: Remote) -> None:
    sweep = remote.sweep("twice")
    both = [remote.start(*remote.submission(sweep)) for _ in range(2)]
    ended = [process.communicate(timeout=DEADLINE_S) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert len(read_table(remote.run("twice").path, "trials")) == 2


LATE = """
import sys
from pathlib import Path
from llem_ray.execution.ray.address import parse_address
from llem_ray.execution.ray.address import prepare_environment
from llem_ray.execution.ray.jobs import RunJobs
where = parse_address(sys.argv[1])
prepare_environment(where, Path(sys.argv[2]))
jobs = RunJobs(where)
print(*(jobs.submit("late", (), None, ["true"], {}).job_id for _ in range(2)))
"""


def test_a_submission_that_another_one_overtook_is_that_one(remote: Remote) -> None:
    command = [sys.executable, "-c", LATE, remote.head.jobs_address, str(remote.head.token_file)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ended = subprocess.run(command, check=False, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert ended.stdout == "llem-late llem-late\n", ended.stderr


@pytest.mark.parametrize(
    ("python", "says"),
    [("/no/such/python", "there is no '/no/such/python' on the head"), ("python3 -S -I", "is not installed for")],
)
def test_a_head_without_llem_ray(remote: Remote, python: str, says: str) -> None:
    code, _, err = remote.submit(remote.sweep("absent", window_s=0.3 + len(python) / 100), python=python)
    assert code == 5
    assert says in err
    assert "LLEM_RAY_REMOTE_PYTHON" in err


def test_a_run_that_is_not_there(remote: Remote) -> None:
    code, _, err = remote.call("status", "nobody")
    assert code == 5
    assert "no run 'nobody' at" in err


def test_a_wrong_token(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("wrong")
    (tmp_path / "own").mkdir()
    code, _, err = Remote(replace(remote.head, token_file=tmp_path / "wrong"), tmp_path / "own").call("status", "whole")
    assert code == 5
    assert "refuses the token" in err


RAY_JOB = Path(__file__).parents[2] / "cluster" / "kuberay" / "job" / "rayjob.yaml"


class Submitter:
    """The pod by which KubeRay 1.7 submits a RayJob (K8sJobMode): it is started again where it fails."""

    def __init__(self, remote: Remote, sweep: Path) -> None:
        spec = yaml.safe_load(RAY_JOB.read_text())["spec"]
        entrypoint = spec["entrypoint"].replace("/sweep/sweep.yaml", str(sweep)).replace("/results", str(remote.results))
        assert entrypoint != spec["entrypoint"]
        self._address, self._entrypoint, self._metadata = remote.head.jobs_address, entrypoint, json.dumps(spec["metadata"])
        (self.run,) = spec["metadata"].values()
        bin_folder = str(Path(sys.executable).parent)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": remote.head.token_file.read_text().strip()}
        self._env = kept | token | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}

    def start(self, job_id: str, *, follow: bool = True) -> subprocess.Popen[str]:
        address = f"--address {self._address}"
        script = f"if ! ray job status {address} {job_id} >/dev/null 2>&1 ; then ray job submit {address} --no-wait"
        script += f" --metadata-json '{self._metadata}' --submission-id {job_id} -- {self._entrypoint} ; fi"
        script += f" ; ray job logs {address} --follow {job_id}" if follow else ""
        return subprocess.Popen(
            ["bash", "-c", script], env=self._env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def test_a_ray_job_of_kuberay(remote: Remote) -> None:
    """Its entrypoint runs on the head and can be told to end, a second submitter follows it, and a later job goes on."""
    name = "kube"
    submitter = Submitter(remote, remote.sweep(name, window_s=2.0))
    submitter.start("llem-ray-sweep-a1b2c", follow=False).communicate(timeout=DEADLINE_S)
    remote.wait_for(name, "measuring")
    os.kill(json.loads((remote.run(name).path / "lock").read_text())["pid"], signal.SIGINT)  # as `llem-ray stop` does
    again = submitter.start("llem-ray-sweep-a1b2c").communicate(timeout=DEADLINE_S)[0]
    assert "interrupted with 1 trial left" in again
    assert len(read_table(remote.run(name).path, "trials")) == 1
    assert "exit code 130" in remote.call("status", submitter.run)[1]

    assert "2 of 2 trials completed" in submitter.start("llem-ray-sweep-d3e4f").communicate(timeout=DEADLINE_S)[0]
    assert [row["attempt"] for row in read_table(remote.run(name).path, "trials").to_pylist()] == [1, 1]


def test_kuberay_s_probe_needs_no_token(remote: Remote) -> None:
    """It asks the agent of every node over HTTP, without starting a process there."""
    with urllib.request.urlopen(f"http://127.0.0.1:{remote.head.agent_port}/api/healthz", timeout=30) as answer:
        assert answer.status == 200
