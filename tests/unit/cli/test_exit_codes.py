"""Every error of ours through the real command: one message on stderr, and the documented exit code."""

import json
from collections.abc import Iterator

import click
import pytest

from llem_ray.cli.main import cli
from llem_ray.core import errors

CODES = {
    "LlemRayError": 1,
    "ConfigError": 2,
    "PlanError": 2,
    "PlacementError": 5,
    "PluginError": 5,
    "BackendError": 3,
    "LoadError": 3,
    "GenerationError": 3,
    "DeviceMemoryError": 3,
    "NumericsError": 3,
    "HangError": 3,
    "EngineDied": 3,
    "NodeLost": 3,
    "Unreachable": 3,
    "PowerError": 4,
    "SourceUnavailable": 4,
    "PowerPermissionDenied": 4,
    "ReadFailed": 4,
    "ResultsError": 5,
    "RunInUse": 5,
    "EnergyGateError": 4,
    "TilingError": 1,
}


def all_errors(cls: type[errors.LlemRayError] = errors.LlemRayError) -> Iterator[type[errors.LlemRayError]]:
    if cls.__module__ == errors.__name__:
        yield cls
    for child in cls.__subclasses__():
        yield from all_errors(child)


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch):
    """Adds a command that raises what it is given."""

    def add(error: BaseException) -> None:
        def callback() -> None:
            raise error

        monkeypatch.setitem(cli.commands, "boom", click.Command("boom", callback=callback))

    return add


def test_the_table_is_complete() -> None:
    assert {cls.__name__ for cls in all_errors()} == set(CODES)


@pytest.mark.parametrize("cls", sorted(set(all_errors()), key=lambda cls: cls.__name__))
def test_an_error_of_ours_is_one_message_and_its_code(llem, raising, cls: type[errors.LlemRayError]) -> None:
    raising(cls("it went wrong", "try this"))
    ended = llem("boom")
    assert ended.code == CODES[cls.__name__]
    assert ended.err == "error: it went wrong\n  hint: try this\n"
    assert ended.out == ""


def test_bad_input_is_located(llem, raising) -> None:
    raising(errors.ConfigError("must be whole", file="s.yaml", line=3, field="repeats", found="x", allowed="1 and more"))
    assert llem("boom").err == "error: s.yaml:3: repeats: must be whole\n  found: x\n  allowed: 1 and more\n"


@pytest.mark.parametrize("error", [ValueError("surprise"), OSError(5, "Input/output error"), KeyError("k")])
def test_a_bug_is_an_internal_error_without_a_traceback(llem, raising, error: Exception) -> None:
    raising(error)
    ended = llem("boom")
    assert ended.code == 1
    assert ended.err.startswith(f"internal error: {type(error).__name__}: ")
    assert "--verbose" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_interrupted(llem, raising, error: BaseException) -> None:
    raising(error)
    ended = llem("boom")
    assert ended.code == 130
    assert ended.err.strip() == "interrupted"


def test_a_commands_own_code_is_kept(llem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.commands, "boom", click.Command("boom", callback=lambda: 3))
    assert llem("boom").code == 3


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["submitt"], "Did you mean 'submit'?"),
        (["valid"], "Did you mean 'validate'?"),
        (["xyzzy"], "No such command 'xyzzy'."),
        (["plan"], "Missing argument 'SWEEP'"),
        (["plan", "a", "--jsn"], "--json"),
        (["export", "r", "--to", "xml", "d"], "'csv', 'json', 'parquet'"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage(llem, args: list[str], says: str) -> None:
    ended = llem(*args)
    assert ended.code == 2
    assert says in ended.err
    assert ended.out == ""


def test_help_lists_every_command_in_the_order_of_use(llem) -> None:
    ended = llem("--help")
    assert ended.code == 0
    listed = [line.split()[0] for line in ended.out.partition("Commands:\n")[2].splitlines() if line.strip()]
    assert listed == list(cli.commands)
    assert listed[:4] == ["init", "validate", "schema", "plan"]


@pytest.mark.parametrize("name", list(cli.commands))
def test_every_command_has_a_help_text_that_fits(llem, name: str) -> None:
    ended = llem(name, "--help")
    assert ended.code == 0
    assert max(len(line) for line in ended.out.splitlines()) <= 80
    summary = cli.commands[name].get_short_help_str(limit=66)
    assert summary
    assert not summary.endswith("...")


def test_the_version(llem) -> None:
    assert llem("--version").out.startswith("llem-ray, version ")


def test_json_is_all_there_is_on_stdout(llem, sweep, only_fake) -> None:
    for args in (["schema"], ["plan", sweep, "--json"], ["doctor", "--json"]):
        ended = llem(*args)
        assert ended.code == 0
        assert isinstance(json.loads(ended.out), dict)
