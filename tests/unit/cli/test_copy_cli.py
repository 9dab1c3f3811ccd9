"""`copy` and `submit --copy-to` with a folder as the destination, and every URI that is none."""

import shutil
import time
from pathlib import Path

import pytest

from llem_ray.results.copied import Owner
from llem_ray.results.destination import open_destination
from llem_ray.results.reader import read_table


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def only_run(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


def test_a_run_is_copied_goes_on_elsewhere_and_is_completed(
    llem, sweep: Path, recording: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLEM_RAY_COPY_TO", target.as_uri())
    ended = llem("submit", "--inline", sweep)
    assert ended.code == 0, ended
    run = only_run(Path("runs"))
    there = only_run(target)
    assert there.name == run.name
    assert read_table(there, "trials").equals(read_table(run, "trials"))
    elsewhere = llem("submit", "--inline", "--results", "elsewhere", sweep)
    assert elsewhere.code == 0
    assert f"no run {run.name} in elsewhere: going on from its copy in {target.as_uri()}/{run.name}" in elsewhere.err
    assert "is finished" in elsewhere.err
    again = llem("submit", "--inline", "--results", "third", "--again", sweep)
    assert again.code == 0, again
    assert only_run(Path("third")).name == f"{run.name}-2"
    monkeypatch.delenv("LLEM_RAY_COPY_TO")
    shutil.rmtree(there)
    copied = llem("copy", "tiny", target)
    assert copied.code == 0, copied
    assert copied.out.startswith(f"{run.name}: ")
    assert f"copied to {target}/{run.name}" in copied.out
    assert read_table(there, "requests").equals(read_table(run, "requests"))


def test_a_copy_that_another_process_writes_is_left_alone(llem, sweep: Path, recording: Path, target: Path) -> None:
    assert llem("submit", "--inline", sweep, "--set", "repeats=1", "--copy-to", target).code == 0
    name = only_run(Path("runs")).name
    owner = Owner(host="elsewhere", pid=7, session="s", heartbeat_s=time.time())
    open_destination(str(target)).child(name).write("owner.json", owner.encode())
    for command in (("submit", "--inline", sweep, "--set", "repeats=1", "--copy-to", target), ("copy", name, target)):
        for more in ((), ("--results", "other")) if command[0] == "submit" else ((),):
            refused = llem(*command, *more)
            assert refused.code == 5, refused
            assert f"process 7 on elsewhere works on {target}/{name}" in refused.err
            assert "--take-over" in refused.err
    assert llem("copy", name, target, "--take-over").code == 0


@pytest.mark.parametrize(
    ("uri", "code", "part"),
    [
        ("ftp://host/folder", 2, "found: ftp://host/folder"),
        ("copies", 2, "allowed: s3://bucket/folder"),
        ("s3:///folder", 2, "Missing bucket name"),
        ("/nowhere/copies", 5, "no such folder"),
    ],
)
def test_a_bad_destination_is_refused_before_anything_is_measured(
    llem, sweep: Path, recording: Path, uri: str, code: int, part: str
) -> None:
    refused = llem("submit", "--inline", sweep, "--copy-to", uri)
    assert refused.code == code, refused
    assert part in refused.err
    assert not Path("runs").exists()


def test_a_password_is_not_given_to_a_ray_job(llem, sweep: Path) -> None:
    address = ("--address", "http://127.0.0.1:1")
    refused = llem("submit", sweep, *address, "--copy-to", "s3://key:hunter2@bucket/folder")
    assert refused.code == 2, refused
    assert "password" in refused.err
    assert "hunter2" not in refused.err
