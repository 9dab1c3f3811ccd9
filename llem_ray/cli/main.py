"""The `llem-ray` command."""

from __future__ import annotations

import logging
import os
import sys
from typing import Final

import click

from llem_ray import __version__
from llem_ray.cli.doctor import doctor
from llem_ray.cli.measure import measure
from llem_ray.cli.runs import export, logs, show, status, stop, watch
from llem_ray.cli.submit import submit
from llem_ray.cli.sweeps import init, plan, schema, validate
from llem_ray.core.errors import LlemRayError

INTERRUPTED: Final = 130


class Commands(click.Group):
    """A group whose commands keep the order they are listed in, and whose errors are one clear message."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names in the order of registration."""
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="llem-ray")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens inside, on stderr.")
def cli(verbose: bool) -> None:
    """Measure what LLM inference costs in energy, on this machine or a whole cluster."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.ERROR,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


for command in (init, validate, schema, plan, doctor, submit, measure, status, watch, logs, stop, show, export):
    cli.add_command(command)


def main() -> None:
    """Run the command; errors of ours become one message on stderr and their exit code."""
    try:
        code = cli.main(standalone_mode=False)
    except LlemRayError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader went away; Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        logging.getLogger(__name__).debug("internal error", exc_info=True)
        click.echo(f"internal error: {type(error).__name__}: {error}\n  hint: run again with --verbose and report it", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
