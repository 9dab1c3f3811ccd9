"""`llem-ray submit`: run a sweep, or resume it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console

from llem_ray import __version__
from llem_ray.cli.sweeps import RESULTS_DIR, SET, SWEEP, build_plan, load
from llem_ray.config.resolved import dump_sweep
from llem_ray.core.errors import EnergyGateError
from llem_ray.core.plan import Plan
from llem_ray.core.progress import Progress
from llem_ray.core.spec import Sweep
from llem_ray.execution.calls import Executor
from llem_ray.execution.driver import RunDriver, RunOptions, RunResult
from llem_ray.execution.inline import InlineExecutor
from llem_ray.execution.preflight import check_plan, process_start_ns
from llem_ray.execution.ray.executor import EmbeddedRayExecutor
from llem_ray.planning.serialise import plan_to_dict
from llem_ray.power.sources import count_gpus
from llem_ray.reporting.progress import open_progress
from llem_ray.reporting.summary import summarise_run
from llem_ray.reporting.tables import run_table
from llem_ray.results.reader import read_table, settled_state
from llem_ray.results.rundir import RunDirectory, latest_run

SOME_FAILED = 3
INTERRUPTED = 130


@click.command()
@click.argument("sweep", type=SWEEP)
@SET
@RESULTS_DIR
@click.option("--again", is_flag=True, help="Start a new run although one of this sweep exists.")
@click.option("--retry-failed", is_flag=True, help="Try trials again that failed for good.")
@click.option("--allow-mixed", is_flag=True, help="Resume although engine, driver, GPUs or llem-ray changed since.")
@click.option("--require-energy", is_flag=True, help="Exit with 4 unless every trial has a valid measured energy.")
@click.option("--inline", is_flag=True, help="Run engine and sampler in this process, without Ray: for debugging.")
def submit(
    sweep: Path,
    overrides: tuple[str, ...],
    results_dir: Path,
    again: bool,
    retry_failed: bool,
    allow_mixed: bool,
    require_energy: bool,
    inline: bool,
) -> None:
    """Run SWEEP on this machine, or resume it where it was interrupted."""
    begin_ns = process_start_ns()
    gpus = 0 if inline else count_gpus()
    loaded = load(sweep, overrides)
    plan = build_plan(loaded, results_dir, gpus)
    cache_dir = Path(os.environ.get("LLEM_RAY_CACHE") or Path.home() / ".cache" / "llem-ray")
    check_plan(plan, gpus, str(cache_dir))
    rundir = _open_rundir(results_dir, plan, loaded, again)
    with rundir.lock(), _log_to(rundir.log_path):
        if _is_settled(rundir, plan, retry_failed):
            click.echo(f"{rundir.name} is finished; --again starts a new run of the same sweep", err=True)
            result = None
        else:
            options = RunOptions(
                begin_ns=begin_ns,
                cache_dir=str(cache_dir),
                retry_failed=retry_failed,
                allow_mixed=allow_mixed,
                facts={"llem_ray": __version__},
            )
            executor: Executor = InlineExecutor() if inline else EmbeddedRayExecutor()
            with open_progress(Console(stderr=True)) as progress:
                result = _run(plan, rundir, executor, options, progress)
    _report(rundir, plan, result, require_energy)


def _run(plan: Plan, rundir: RunDirectory, executor: Executor, options: RunOptions, progress: Progress) -> RunResult:
    progress.message(f"run {rundir.name}: {len(plan.trials)} trials, {len(plan.groups)} model loads, results in {rundir.path}")
    return RunDriver(plan, rundir, executor, options, progress).run()


def _open_rundir(results_dir: Path, plan: Plan, sweep: Sweep, again: bool) -> RunDirectory:
    """The run to resume, or a new one with its sweep and plan written down."""
    existing = None if again else latest_run(results_dir, plan.run_name)
    rundir = RunDirectory.create(results_dir, plan.run_name, again=again) if existing is None else RunDirectory.open(existing)
    if not rundir.has_json("plan"):
        rundir.check_writable()
        rundir.write_text("sweep.json", dump_sweep(sweep))
        rundir.write_json("plan", plan_to_dict(plan))
    return rundir


def _is_settled(rundir: RunDirectory, plan: Plan, retry_failed: bool) -> bool:
    state = settled_state(rundir)
    if retry_failed:
        return all(trial.trial_id in state.done for trial in plan.trials)
    return all(state.is_settled(trial.trial_id) for trial in plan.trials)


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Keep our log in the run directory."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("llem_ray")
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
        handler.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _report(rundir: RunDirectory, plan: Plan, result: RunResult | None, require_energy: bool) -> None:
    """Print the results and leave with the documented exit code."""
    rows = read_table(rundir.path, "trials").to_pylist()
    Console().print(run_table(summarise_run(rundir.name, rows), rundir.path))
    if result is not None and result.interrupted:
        click.echo(f"interrupted with {result.left} trials left; submit the same sweep again to resume", err=True)
        raise SystemExit(INTERRUPTED)
    if result is not None and result.stopped:
        click.echo(f"stopped: {result.stopped}; {result.left} trials left", err=True)
        raise SystemExit(SOME_FAILED)
    latest = {row["trial_id"]: row for row in sorted(rows, key=lambda row: row["attempt"])}
    if any(latest[trial.trial_id]["status"] == "failed" for trial in plan.trials if trial.trial_id in latest):
        raise SystemExit(SOME_FAILED)
    invalid = [trial_id for trial_id, row in latest.items() if not row["power_valid"]]
    if require_energy and invalid:
        message = f"{len(invalid)} of {len(latest)} trials have no valid measured energy"
        raise EnergyGateError(message, f"see: llem-ray show {rundir.name}")
