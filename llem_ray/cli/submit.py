"""`llem-ray submit` and `run`: run a sweep, or resume it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from click.core import ParameterSource
from rich.console import Console

from llem_ray import __version__
from llem_ray.cli.copy import COPY_TO, TAKE_OVER, CopyTarget, refuse_secret
from llem_ray.cli.output import INTERRUPTED, SOME_FAILED
from llem_ray.cli.remote import submit_job
from llem_ray.cli.summaries import read_summary
from llem_ray.cli.sweeps import ADDRESS, RESULTS_DIR, SET, SWEEP, TOKEN_FILE, build_plan
from llem_ray.config.locate import locator
from llem_ray.config.resolved import dump_sweep
from llem_ray.config.sweep import load_sweep
from llem_ray.core.errors import ConfigError, EnergyGateError, ResultsError
from llem_ray.core.plan import Plan
from llem_ray.core.spec import Sweep
from llem_ray.execution.calls import Executor
from llem_ray.execution.driver import RunDriver, RunOptions, RunResult
from llem_ray.execution.engine_host import host_cache_dir
from llem_ray.execution.inline import InlineExecutor
from llem_ray.execution.package import unpack_sweep
from llem_ray.execution.preflight import check_plan, check_prompts, process_start_ns
from llem_ray.execution.ray.address import Address, parse_address, prepare_environment
from llem_ray.execution.ray.choice import make_executor
from llem_ray.execution.ray.connect import probe_cluster
from llem_ray.execution.ray.jobs import RunJobs
from llem_ray.execution.ray.runtime import prepare_embedded
from llem_ray.execution.stopping import known_so_far
from llem_ray.planning.serialise import plan_to_dict
from llem_ray.power.sources import count_gpus
from llem_ray.reporting.numbers import count_noun
from llem_ray.reporting.progress import open_progress
from llem_ray.reporting.tables import run_table
from llem_ray.results.reader import read_table, settled_state
from llem_ray.results.rundir import RunDirectory, latest_run
from llem_ray.results.segments import list_segments
from llem_ray.results.writer import DatasetWriter

LOG = logging.getLogger(__name__)


RUN_FLAGS = (
    click.option("--again", is_flag=True, help="Start a new run although one of this sweep exists."),
    click.option("--retry-failed", is_flag=True, help="Try trials again that failed for good."),
    click.option("--allow-mixed", is_flag=True, help="Resume although engine, driver, GPUs or llem-ray changed since."),
    click.option("--require-energy", is_flag=True, help="Exit with 4 unless every trial has a valid measured energy."),
    click.option("--inline", is_flag=True, help="Run engine and sampler in one process, without Ray or GPUs: for debugging."),
    COPY_TO,
    TAKE_OVER,
)


def run_flags(command: Callable[..., int]) -> Callable[..., int]:
    """The flags that `submit` and `run` share."""
    for option in reversed(RUN_FLAGS):
        command = option(command)
    return command


@click.command()
@click.argument("sweep", type=SWEEP)
@SET
@RESULTS_DIR
@ADDRESS
@TOKEN_FILE
@run_flags
@click.option("--detach", is_flag=True, help="Do not follow the Ray job.")
@click.pass_context
def submit(
    context: click.Context,
    /,
    sweep: Path,
    overrides: tuple[str, ...],
    results_dir: Path,
    address: str | None,
    token_file: Path | None,
    detach: bool,
    copy_to: str | None,
    **flags: bool,
) -> int:
    """Run SWEEP on this machine or a cluster, or resume it.

    The results table goes to stdout, progress to stderr. Ctrl-C finishes the running trial and leaves a run that the same command
    resumes; a second Ctrl-C aborts the trial. Of a run that is finished it prints the results.

    With an http address the run is a Ray job on the head, and --results a folder there; Ctrl-C detaches, and the same command
    follows it again.
    """
    where = parse_address(address)
    if detach and where.kind != "jobs":
        raise ConfigError("only a Ray job goes on by itself", field="--detach", allowed="with --address http://HOST:8265")
    loaded = load_sweep(sweep, overrides=overrides)
    located = locator(sweep, overrides=overrides)
    try:
        if where.kind == "jobs":
            if copy_to is not None:
                refuse_secret(copy_to)
            prepare_environment(where, token_file)
            chosen = context.get_parameter_source("results_dir") == ParameterSource.COMMANDLINE
            return submit_job(RunJobs(where), loaded, str(results_dir) if chosen else None, flags, copy_to, detach=detach)
        return run_sweep(loaded, results_dir, where, token_file, located, copy_to=copy_to, **flags)
    except ConfigError as error:
        raise located(error) from error


@click.command()
@click.argument("sweep", type=SWEEP)
@click.option(
    "--results",
    "results_dir",
    type=click.Path(path_type=Path),
    default=Path("~/llem-ray/runs"),
    show_default=True,
    envvar="LLEM_RAY_RESULTS",
    help="Folder of run directories.",
)
@click.option("--address", default="auto", show_default=True, metavar="ADDRESS", help="The Ray cluster: auto or HOST:PORT.")
@TOKEN_FILE
@run_flags
def run(sweep: Path, results_dir: Path, address: str, token_file: Path | None, copy_to: str | None, **flags: bool) -> int:
    """Run a packed SWEEP on the cluster that this machine is a node of.

    What `submit` makes of a sweep for a Ray job calls this on the head; you need not.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a Ray job begins with it blocked; `stop` sends it
    where = parse_address("" if flags["inline"] else address)
    return run_sweep(unpack_sweep(sweep), results_dir.expanduser(), where, token_file, copy_to=copy_to, **flags)


def run_sweep(
    loaded: Sweep,
    results_dir: Path,
    address: Address,
    token_file: Path | None,
    located: Callable[[ConfigError], ConfigError] = lambda error: error,
    /,
    *,
    again: bool,
    retry_failed: bool,
    allow_mixed: bool,
    require_energy: bool,
    inline: bool,
    copy_to: str | None,
    take_over: bool,
) -> int:
    """Run a sweep from this process, or resume it, or print its results when it is finished; returns the exit code.

    Raises:
        LlemRayError: It cannot run, or an energy gate failed.
    """
    begin_ns = process_start_ns()
    if inline and address.kind != "embedded":
        raise ConfigError("--inline runs without a cluster", field="--address", found=address.text, allowed="without --inline")
    prepare_environment(address, token_file)
    cluster = None if address.kind == "embedded" else probe_cluster(address)
    gpus = (0 if inline else count_gpus()) if cluster is None else sum(node.gpus for node in cluster.alive)
    plan = build_plan(loaded, results_dir, gpus)
    target = CopyTarget(copy_to, take_over)
    existing = None if again else latest_run(results_dir, plan.run_name) or target.fetch(results_dir, plan.run_name)
    if existing is not None and _is_settled(RunDirectory.open(existing), plan, retry_failed):
        click.echo(f"{existing.name} is finished; --again starts a new run of the same sweep", err=True)
        with target.copying(RunDirectory.open(existing)):
            _compact(RunDirectory.open(existing))
        return _report(RunDirectory.open(existing), plan, None, require_energy)
    cache_dir = host_cache_dir()
    check_prompts(plan)
    if cluster is None:
        if not inline:
            prepare_embedded()
        check_plan(plan, gpus, str(cache_dir), alone=inline)
    if existing is None:
        rundir = RunDirectory.create(results_dir, plan.run_name, again=again, taken=target.taken_names() if again else ())
    else:
        rundir = RunDirectory.open(existing)
    options = RunOptions(
        begin_ns=begin_ns,
        cache_dir=str(cache_dir),
        retry_failed=retry_failed,
        allow_mixed=allow_mixed,
        facts={"llem_ray": __version__},
        locate=located,
    )
    with rundir.lock(), _log_to(rundir.log_path), target.copying(rundir):
        result = _run(plan, loaded, rundir, InlineExecutor() if inline else make_executor(address, cluster), options)
    return _report(rundir, plan, result, require_energy)


def _run(plan: Plan, sweep: Sweep, rundir: RunDirectory, executor: Executor, options: RunOptions) -> RunResult:
    """One session of the run, with its sweep and plan written down before anything starts."""
    if not rundir.has_json("plan"):
        rundir.check_writable()
        rundir.write_text("sweep.json", dump_sweep(sweep))
        rundir.write_json("plan", plan_to_dict(plan))
    counted = f"{count_noun(len(plan.trials), 'trial')}, {count_noun(len(plan.groups), 'model load')}"
    LOG.info("llem-ray %s, process %d: %s, %s", __version__, os.getpid(), rundir.name, counted)
    with open_progress(Console(stderr=True)) as progress:
        progress.message(f"run {rundir.name}: {counted}, results in {rundir.path}")
        result = RunDriver(plan, rundir, executor, options, progress).run()
    LOG.info("session ended: %s", result)
    return result


def _is_settled(rundir: RunDirectory, plan: Plan, retry_failed: bool) -> bool:
    """Nothing is left to do, and nobody is doing it: a run's last rows are written before its lock is released."""
    if rundir.is_locked():
        return False
    state = settled_state(rundir)
    if retry_failed:
        state.given_up.clear()
    known_so_far(plan, rundir, state)
    return all(state.is_settled(trial.trial_id) for trial in plan.trials)


def _compact(rundir: RunDirectory) -> None:
    """A run driver that was killed after its last trial, or ran out of disk, left rows that are not in the Parquet tables yet."""
    if not list_segments(rundir.segments_path):
        return
    try:
        with rundir.lock():
            DatasetWriter(rundir).finish()
    except ResultsError as error:
        click.echo(f"its last rows could not be moved into its Parquet tables: {error}", err=True)


class _RunLog(logging.FileHandler):
    """The run's log file. When it cannot be written the run goes on: whoever needs the disk says what is wrong with it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say nothing."""


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Keep our log, from INFO on, in the run directory."""
    handler = _RunLog(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("llem_ray")
    before = logger.level
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()


def _report(rundir: RunDirectory, plan: Plan, result: RunResult | None, require_energy: bool) -> int:
    """Print the results; returns the exit code.

    Raises:
        EnergyGateError: A trial lacks a valid energy although ``require_energy`` asks for it.
    """
    rows = read_table(rundir.path, "trials").to_pylist()
    summary = read_summary(rundir, rows)
    Console().print(run_table(summary, rundir.path))
    if result is not None and result.interrupted:
        click.echo(f"interrupted with {count_noun(result.left, 'trial')} left; submit the same sweep again to resume", err=True)
        return INTERRUPTED
    if result is not None and result.stopped:
        click.echo(f"stopped: {result.stopped}; {count_noun(result.left, 'trial')} left", err=True)
        return SOME_FAILED
    planned = {trial.trial_id for trial in plan.trials}
    latest = {row["trial_id"]: row for row in sorted(rows, key=lambda row: row["attempt"]) if row["trial_id"] in planned}
    failed = sum(row["status"] == "failed" for row in latest.values())
    if failed:
        click.echo(f"{count_noun(failed, 'trial')} failed; --retry-failed tries them again, llem-ray logs says more", err=True)
        return SOME_FAILED
    invalid = sum(not row["power_valid"] for row in latest.values())
    if require_energy and invalid:
        message = f"{invalid} of {count_noun(len(latest), 'trial')} without a valid measured energy"
        raise EnergyGateError(message, f"llem-ray show {rundir.name} gives the reasons")
    return 0
