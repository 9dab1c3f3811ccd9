"""The `llem-ray` command."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

import click

from llem_ray import __version__
from llem_ray.cli.copy import copy
from llem_ray.cli.doctor import doctor
from llem_ray.cli.measure import measure
from llem_ray.cli.output import INTERNAL, INTERRUPTED, tell_error
from llem_ray.cli.runs import export, logs, show, status, stop, watch
from llem_ray.cli.submit import run, submit
from llem_ray.cli.sweeps import init, plan, schema, validate


class Commands(click.Group):
    """Commands in the order of their use; a misspelt one is answered with the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names in the order of registration."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that ``args`` begin with.

        Raises:
            UsageError: There is none of that name.
        """
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = get_close_matches(name, self.commands, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="llem-ray")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens inside, on stderr.")
def cli(verbose: bool) -> None:
    """Measure what LLM inference costs in energy.

    \b
    A first look:  llem-ray init && llem-ray plan sweep.yaml && llem-ray submit sweep.yaml
    Any command:   llem-ray measure -- python train.py

    Exit codes: 0 all is well; 1 internal error; 2 wrong usage or input; 3 some trials failed; 4 an energy is missing or
    invalid under --require-energy, or a power source failed; 5 an engine, GPUs or the results folder are not available; 130
    interrupted, what is done is kept. `measure` gives the exit code of its command.
    """  # noqa: D301 - click's mark of lines to be left as they are
    _log_to_stderr(verbose)


for command in (init, validate, schema, plan, doctor, submit, run, measure, status, watch, logs, stop, show, export, copy):
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit; whatever goes wrong is one message on stderr and its exit code.

    Args:
        args: Command line without the program's name; default: this process's.
    """
    if args is None:
        atexit.register(gc.freeze)  # Python would search all that lives for cycles before it exits: 0.4 s after a run with Ray
    sys.exit(_run(args))


def _run(args: Sequence[str] | None) -> int:
    try:
        code = cli.main(args, prog_name="llem-ray", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away; Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERNAL
    except Exception as error:  # noqa: BLE001 - the outermost border: no traceback reaches the user
        return tell_error(error)
    return code if isinstance(code, int) else 0


def _log_to_stderr(verbose: bool) -> None:
    """Ours only with ``--verbose``: messages and the run's log tell it otherwise. Other packages' errors always."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if not verbose:
        handler.setLevel(logging.ERROR)
        handler.addFilter(lambda record: not record.name.startswith("llem_ray."))
    logging.basicConfig(handlers=[handler], level=logging.DEBUG if verbose else logging.ERROR)
