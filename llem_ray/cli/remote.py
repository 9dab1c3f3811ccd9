"""Runs that are Ray jobs: submit, status, watch, logs and stop over HTTP."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import click

from llem_ray import __version__
from llem_ray.cli.output import INTERRUPTED, echo_json
from llem_ray.cli.sweeps import tell_unseen
from llem_ray.core.errors import PlacementError, ResultsError
from llem_ray.core.spec import Sweep
from llem_ray.execution.package import SWEEP_FILE, pack_sweep
from llem_ray.execution.ray.jobs import RunJob, RunJobs
from llem_ray.planning.plan import run_hash

PYTHON_VARIABLE: Final = "LLEM_RAY_REMOTE_PYTHON"
CALL_TIMEOUT_S: Final = 60.0
OPEN: Final = ("pending", "running")
REOPENS: Final = ("again", "retry_failed", "require_energy")
"""Flags that ask something new of a run that is finished."""
PROGRESS: Final = ("run ", "trial ")
"""How the lines begin that a run driver without a terminal prints while it works."""


def submit_job(
    jobs: RunJobs, sweep: Sweep, results: str | None, flags: Mapping[str, bool], copy_to: str | None, *, detach: bool
) -> int:
    """Run a sweep as a Ray job, or follow the job that runs it; returns the run driver's exit code.

    Args:
        jobs: The cluster's.
        sweep: The resolved sweep.
        results: Folder of run directories on the head; None for its own choice.
        flags: Flags of `run`.
        copy_to: Where the head copies the run to; None: nowhere.
        detach: Return as soon as it is submitted.

    Raises:
        PlacementError: The cluster cannot be reached, or the job could not run llem-ray.
    """
    run = f"{sweep.name}-{run_hash(sweep)}"
    earlier = jobs.of_run(run)
    latest = earlier[-1] if earlier else None
    if latest is not None and latest.state in OPEN:
        click.echo(f"{run} runs already, as the Ray job {latest.job_id}", err=True)
        job = latest
    elif latest is not None and latest.state == "succeeded" and not any(flags[name] for name in REOPENS):
        click.echo(f"{run} is finished; --again starts a new run of the same sweep", err=True)
        click.echo(_results(jobs.logs(latest.job_id)), nl=False)
        return 0
    else:
        job = _start(jobs, run, earlier, sweep, results, flags, copy_to)
        click.echo(f"{run} {'goes on' if earlier else 'is submitted'} as the Ray job {job.job_id}", err=True)
    if detach:
        click.echo(_how_to(jobs, job), err=True)
        return 0
    return follow_job(jobs, job)


def _start(
    jobs: RunJobs,
    run: str,
    earlier: Sequence[RunJob],
    sweep: Sweep,
    results: str | None,
    flags: Mapping[str, bool],
    copy_to: str | None,
) -> RunJob:
    tell_unseen(sweep)
    command = [*_remote_llem(), "run", SWEEP_FILE]
    command += [f"--{name.replace('_', '-')}" for name, is_set in flags.items() if is_set]
    if copy_to is not None:
        command += ["--copy-to", copy_to]
    if results is not None:
        command += ["--results", results if Path(results).is_absolute() or results.startswith("~") else f"~/{results}"]
    variables = {"COLUMNS": str(shutil.get_terminal_size((100, 24)).columns)}
    with tempfile.TemporaryDirectory(prefix="llem-ray-") as folder:
        pack_sweep(sweep, Path(folder))
        return jobs.submit(run, earlier, Path(folder), command, variables)


def follow_job(jobs: RunJobs, job: RunJob) -> int:
    """Show what a job prints until it ends; Ctrl-C detaches. Returns the run driver's exit code, or that of an interrupt.

    Raises:
        PlacementError: llem-ray did not run there, or was killed.
    """
    try:
        ended = jobs.follow(job.job_id, _relay)
    except KeyboardInterrupt:
        click.echo(f"\ndetached; {_how_to(jobs, job)}", err=True)
        return INTERRUPTED
    return _exit_code(ended, jobs.logs(job.job_id))


def status_of_job(jobs: RunJobs, text: str, *, as_json: bool) -> None:
    """Print what is known of a run's newest job."""
    job = jobs.find(text)
    log = jobs.logs(job.job_id)
    if as_json:
        told = {"run": job.run, "job": job.job_id, "state": job.state, "exit_code": job.exit_code}
        echo_json({**told, "results": _run_path(log), "last": _last_line(log, job)})
    else:
        click.echo(_line(job, log))


def watch_job(jobs: RunJobs, text: str) -> None:
    """Follow a run's newest job until it ends."""
    job = jobs.find(text)
    try:
        job = jobs.follow(job.job_id, _relay)
    except KeyboardInterrupt:
        click.echo(f"\ndetached; {_how_to(jobs, job)}", err=True)
        return
    click.echo(_line(job, ""), err=True)


def logs_of_job(jobs: RunJobs, text: str, *, follow: bool) -> None:
    """Print what a run's newest job printed."""
    job = jobs.find(text)
    if follow:
        jobs.follow(job.job_id, _relay)
    else:
        click.echo(jobs.logs(job.job_id), nl=False)


def stop_job(jobs: RunJobs, text: str, *, now: bool) -> None:
    """Stop a run: after its running trial, or with ``now`` at once.

    Raises:
        ResultsError: It does not run.
        PlacementError: The run driver cannot be told.
    """
    job = jobs.find(text)
    if job.is_over:
        raise ResultsError(f"{job.run} is not running: its job {job.job_id} has {job.state}")
    path = _run_path(jobs.logs(job.job_id))
    if now or path is None:
        jobs.stop(job.job_id)
        click.echo(f"asked Ray to stop {job.job_id} now")
        return
    code, said = jobs.call(f"llem-stop-{secrets.token_hex(4)}", [*_remote_llem(), "stop", path, "--address", ""], CALL_TIMEOUT_S)
    if code != 0:
        raise PlacementError(f"the run driver could not be told: {_last(said)}", "`stop --now` has Ray end it")
    click.echo(_last(said))


def show_of_job(jobs: RunJobs, text: str, *, as_json: bool) -> None:
    """Print a run's results, read on the head.

    Raises:
        PlacementError: They cannot be read there.
    """
    job = jobs.find(text)
    told = (_run_path(jobs.logs(known.job_id)) for known in reversed(jobs.of_run(job.run)))
    path = next((path for path in told if path is not None), None)
    if path is None:
        raise PlacementError(f"{job.run} has no results yet", f"its job {job.job_id} is {job.state}")
    command = [*_remote_llem(), "show", path, "--address", "", *(["--json"] if as_json else [])]
    code, said = jobs.call(f"llem-show-{secrets.token_hex(4)}", command, CALL_TIMEOUT_S)
    if code != 0:
        raise PlacementError(f"the results cannot be read on the head: {_last(said)}")
    click.echo(said, nl=False)


def _relay(text: str) -> None:
    """Whole lines of a job's log: progress to stderr, all else to stdout, as a run driver here would."""
    for line in text.splitlines(keepends=True):
        click.echo(line, nl=False, err=line.startswith(PROGRESS))


def _remote_llem() -> list[str]:
    return [*shlex.split(os.environ.get(PYTHON_VARIABLE) or "python"), "-m", "llem_ray"]


def _exit_code(job: RunJob, log: str) -> int:
    if job.state == "succeeded":
        _tell_results(log)
        return 0
    if job.state == "stopped":
        click.echo(f"{job.job_id} was stopped; what is done is kept, submit the same sweep again to resume", err=True)
        return INTERRUPTED
    python = os.environ.get(PYTHON_VARIABLE) or "python"
    install = f"install llem-ray {__version__} on the head for {python}; {PYTHON_VARIABLE} chooses another interpreter"
    if re.search(r"No module named '?llem_ray", log):
        raise PlacementError(f"llem-ray is not installed for {python!r} on the head", install)
    if job.exit_code == 127:
        raise PlacementError(f"there is no {python!r} on the head", f"{PYTHON_VARIABLE} names the interpreter that has llem-ray")
    if re.search(r"No such command 'run'|not a resolved sweep of this schema version", log):
        raise PlacementError("llem-ray on the head is another release", install)
    if job.exit_code is None:
        raise PlacementError(f"the job {job.job_id} could not start: {_first(job.message)}", "`llem-ray logs` says more")
    if job.exit_code < 0 or job.exit_code > INTERRUPTED:
        number = abs(job.exit_code) if job.exit_code < 0 else job.exit_code - 128
        raise PlacementError(f"the run driver was killed by signal {number}", "submit the same sweep again to resume")
    _tell_results(log)
    return job.exit_code


def _tell_results(log: str) -> None:
    if path := _run_path(log):
        click.echo(f"the results are on the head, in {path}", err=True)


def _run_path(log: str) -> str | None:
    """Where the run directory is on the head, by what the run driver said."""
    found = re.findall(r"^run \S+: .*, results in (.+)$", log, re.MULTILINE)
    return found[-1].strip() if found else None


def _results(log: str) -> str:
    """What the run driver printed after its last line of progress."""
    lines = log.splitlines(keepends=True)
    last = max((i for i, line in enumerate(lines) if line.startswith(PROGRESS)), default=-1)
    return "".join(lines[last + 1 :])


def _line(job: RunJob, log: str) -> str:
    last = _last_line(log, job)
    parts = [f"{job.run}: {job.state}", f"Ray job {job.job_id}"]
    if job.exit_code is not None:
        parts.append(f"exit code {job.exit_code}")
    if last:
        parts.append(last)
    if job.is_over and job.state != "succeeded":
        parts.append("submit the same sweep again to resume it")
    return ", ".join(parts)


def _last_line(log: str, job: RunJob) -> str | None:
    """The newest progress of a job that runs."""
    told = [line for line in log.splitlines() if line.startswith(PROGRESS)]
    return told[-1] if told and not job.is_over else None


def _how_to(jobs: RunJobs, job: RunJob) -> str:
    return "\n  ".join(
        (
            "the run goes on",
            f"follow it: llem-ray watch {job.run} --address {jobs.address}",
            f"stop it:   llem-ray stop {job.run} --address {jobs.address}",
        )
    )


def _first(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")


def _last(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
