"""Copies of runs: whole and readable at every instant, restartable, never in the run's way, and enough to go on from."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from failing_store import FailingStore, wait_until

from llem_ray.core.errors import ConfigError, ResultsError, RunInUse
from llem_ray.results import copied, copy
from llem_ray.results.copied import Owner, fetch_run
from llem_ray.results.copy import RunCopy
from llem_ray.results.destination import Destination, destination_error, holds_secret, open_destination
from llem_ray.results.journal import Journal, JournalEvent
from llem_ray.results.reader import read_table, settled_state
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.writer import DatasetWriter

Make = Callable[..., Any]
TABLES = ("trials", "requests", "phases")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "runs", "demo")
    for name in ("plan", "environment"):
        made.write_json(name, {"name": name})
    made.write_text("sweep.json", "{}\n")
    return made


@pytest.fixture
def store(tmp_path: Path) -> FailingStore:
    (tmp_path / "store").mkdir()
    return FailingStore(tmp_path / "store")


@pytest.fixture
def target(tmp_path: Path) -> Destination:
    (tmp_path / "target").mkdir()
    return open_destination((tmp_path / "target").as_uri())


def add_trials(run: RunDirectory, make_trial: Make, numbers: range, compact_trials: int = 1000) -> None:
    """A session that does these trials and is killed."""
    with Journal.open(run.journal_path) as journal:
        journal.append(JournalEvent(event="run_started", pid=1, host="h"))
        writer = DatasetWriter(run, compact_trials)
        for number in numbers:
            journal.append(JournalEvent(event="leased", trial_id=f"cell{number:04d}-r0", attempt=1))
            writer.write_trial(*make_trial(number))
            journal.append(JournalEvent(event="done", trial_id=f"cell{number:04d}-r0", attempt=1))


def rows(path: Path) -> dict[str, Counter[str]]:
    return {name: Counter(read_table(path, name).column("trial_id").to_pylist()) for name in TABLES}  # type: ignore[arg-type]


def data(path: Path) -> set[str]:
    return copied.data_files(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


class TestDestination:
    @pytest.mark.parametrize(
        ("uri", "part"),
        [
            ("runs/copies", "not a place"),
            ("ftp://host/folder", "not a place"),
            ("s3:///folder", "Missing bucket name"),
            ("s3://bucket/folder?colour=blue", "colour"),
            ("file:relative", "relative"),
            ("file://[bad/folder", "not a URI"),
            ("/", "folder is missing"),
        ],
    )
    def test_what_is_no_destination_is_refused(self, uri: str, part: str) -> None:
        with pytest.raises(ConfigError) as raised:
            open_destination(uri)
        assert part in str(raised.value)
        assert "s3://bucket/folder" in str(raised.value)

    def test_a_folder_that_is_not_mounted_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ResultsError, match="no such folder") as raised:
            open_destination((tmp_path / "mnt").as_uri())
        assert raised.value.exit_code == 5
        assert not (tmp_path / "mnt").exists()

    def test_an_unreachable_server_is_one_sentence_without_the_password(self) -> None:
        uri = "s3://someone:hunter2@bucket/folder?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1"
        with pytest.raises(ResultsError) as raised:
            open_destination(uri)
        assert "cannot copy to s3://bucket/folder: it cannot be reached" in str(raised.value)
        assert "hunter2" not in str(raised.value)

    def test_a_server_that_does_not_answer_is_given_up(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            uri = f"s3://a:b@bucket/folder?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
            with pytest.raises(ResultsError, match=r"no answer within 0\.5 s"):
                open_destination(uri, timeout_s=0.5)

    @pytest.mark.slow
    def test_an_operation_on_a_server_that_does_not_answer_ends_by_itself(self) -> None:
        """Otherwise the process could not exit after it gave up."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            uri = f"s3://a:b@bucket/folder?endpoint_override=127.0.0.1:{server.getsockname()[1]}&scheme=http&region=us-east-1"
            with pytest.raises(ResultsError, match="it cannot be reached"):
                open_destination(uri, timeout_s=60.0)

    @pytest.mark.slow
    def test_a_google_server_that_refuses_is_unreachable(self) -> None:
        with pytest.raises(ResultsError, match="it cannot be reached"):
            open_destination("gs://anonymous@bucket/folder?endpoint_override=127.0.0.1:1&scheme=http", timeout_s=60.0)

    @pytest.mark.parametrize(
        ("uri", "secret"),
        [
            ("s3://bucket/folder?region=eu-west-1", False),
            ("s3://key:secret@bucket/folder", True),
            ("s3://key@bucket/folder", True),
            ("gs://anonymous@bucket/folder", False),
            ("abfs://account@container/folder", False),
            ("abfs://account:key@container/folder", True),
            ("abfs://account@container/folder?tenant_id=t&client_id=c&client_secret=s", True),
            ("file:///folder", False),
        ],
    )
    def test_secrets_in_a_uri_are_found(self, uri: str, secret: bool) -> None:
        assert holds_secret(uri) is secret

    def test_missing_credentials_for_azure_are_said(self) -> None:
        message = destination_error(
            "abfs://a@c/f", OSError("N5Azure4Core11Credentials23AuthenticationExceptionE: Failed to get token")
        )
        assert "access is denied" in message.message
        assert "AZURE_CLIENT_ID" in str(message)

    def test_nothing_of_the_check_remains(self, tmp_path: Path, target: Destination) -> None:
        assert list((tmp_path / "target").iterdir()) == []

    def test_the_results_folder_itself_is_refused(self, run: RunDirectory) -> None:
        with pytest.raises(ResultsError, match="is the run directory itself"):
            RunCopy(run, open_destination(str(run.path.parent)))


class TestCopying:
    def test_a_copy_is_a_readable_dataset_and_a_second_one_sends_nothing_again(
        self, run: RunDirectory, target: Destination, make_trial: Make
    ) -> None:
        add_trials(run, make_trial, range(5), compact_trials=3)
        run.log_path.write_text("a log\n")
        RunCopy(run, target).copy_once()
        there = Path(target.path) / "demo"
        assert rows(there) == rows(run.path)
        assert data(there) == data(run.path)
        assert (there / "journal" / "00000001.jsonl").read_bytes()[:20] == run.journal_path.read_bytes()[:20]
        assert (there / "run.log").read_text() == "a log\n"
        assert not list(there.rglob("*.tmp"))
        before = {path: path.stat().st_mtime_ns for path in there.rglob("*.arrows")}
        again = RunCopy(run, target).copy_once()
        assert before == {path: path.stat().st_mtime_ns for path in there.rglob("*.arrows")}
        assert again.files == 4  # sweep, plan, environment, log

    @pytest.mark.parametrize("type_name", ["mount", "s3"])
    def test_at_every_change_the_copy_is_readable_and_loses_nothing(
        self, run: RunDirectory, store: FailingStore, make_trial: Make, type_name: str
    ) -> None:
        store = FailingStore(store.folder, type_name)
        there = store.folder / "copies" / "demo"
        seen: set[str] = set()

        def look(change: str) -> None:
            nonlocal seen
            if data(there):
                found = rows(there)
                assert set(found["trials"].values()) <= {1}, change
                assert seen <= set(found["trials"]), change
                seen = set(found["trials"])
                check_journal(there)

        def check_journal(path: Path) -> None:
            shutil.copytree(path, path.parent / "look")
            (path.parent / "look" / "journal.jsonl").write_bytes(
                copied.join_journal(
                    store.destination().child("demo"), [f"journal/{p.name}" for p in path.glob("journal/*.jsonl")]
                )
            )
            done = RunDirectory(path.parent / "look").replay().done
            shutil.rmtree(path.parent / "look")
            assert done.keys() <= rows(path)["trials"].keys(), "the journal is ahead of the rows"

        store.watcher = look
        copying = RunCopy(run, store.destination())
        copying.claim()
        with Journal.open(run.journal_path) as journal:
            journal.append(JournalEvent(event="run_started", pid=1, host="h"))
            writer = DatasetWriter(run, compact_trials=3)
            for number in range(8):
                journal.append(JournalEvent(event="leased", trial_id=f"cell{number:04d}-r0", attempt=1))
                writer.write_trial(*make_trial(number))
                journal.append(JournalEvent(event="done", trial_id=f"cell{number:04d}-r0", attempt=1))
                if number % 2:
                    copying._bring_up_to_date()
            writer.finish()
        copying._bring_up_to_date()
        assert rows(there) == rows(run.path)
        assert data(there) == data(run.path)
        assert len(seen) == 8

    def test_a_failure_at_any_change_is_made_good_by_the_next_copy(
        self, run: RunDirectory, store: FailingStore, make_trial: Make
    ) -> None:
        add_trials(run, make_trial, range(2))
        RunCopy(run, store.destination()).copy_once()
        add_trials(run, make_trial, range(2, 4))
        DatasetWriter(run).compact()
        there = store.folder / "copies" / "demo"
        kept = store.folder / "kept"
        shutil.copytree(store.folder / "copies", kept)
        failed = 0
        for at in range(1, 200):
            shutil.rmtree(store.folder / "copies")
            shutil.copytree(kept, store.folder / "copies")
            store.changes, store.fail_at = 0, at
            try:
                RunCopy(run, store.destination(), take_over=True).copy_once()
            except ResultsError as error:
                assert "cannot be reached" in error.message  # noqa: PT017 - the loop ends by a success
                failed += 1
            else:
                break
            finally:
                store.fail_at = None
            assert set(rows(there)["trials"].values()) == {1}
            RunCopy(run, store.destination(), take_over=True).copy_once()
            assert rows(there) == rows(run.path)
            assert data(there) == data(run.path)
            assert copied.join_journal(store.destination().child("demo"), names(there)) == run.journal_path.read_bytes()
        assert failed > 10

    def test_many_pieces_of_the_journal_are_merged(
        self, run: RunDirectory, target: Destination, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(copy, "JOURNAL_PIECES", 3)
        copying = RunCopy(run, target)
        copying.claim()
        there = Path(target.path) / "demo"
        pieces = []
        with Journal.open(run.journal_path) as journal:
            for _ in range(6):
                journal.append(JournalEvent(event="interrupted"))
                copying._bring_up_to_date()
                pieces.append(sorted(path.name for path in there.glob("journal/*")))
                assert copied.join_journal(target.child("demo"), names(there)) == run.journal_path.read_bytes()
        assert pieces[2] == ["00000001.jsonl", "00000002.jsonl", "00000003.jsonl"]
        assert pieces[3] == ["00000001.jsonl"]
        assert pieces[5] == ["00000001.jsonl", "00000005.jsonl", "00000006.jsonl"]

    def test_a_torn_line_is_not_copied(self, run: RunDirectory, target: Destination, make_trial: Make) -> None:
        add_trials(run, make_trial, range(1))
        whole = run.journal_path.read_bytes()
        run.journal_path.write_bytes(whole + b'{"event":"le')
        RunCopy(run, target).copy_once()
        assert copied.join_journal(target.child("demo"), names(Path(target.path) / "demo")) == whole

    def test_a_missing_piece_of_the_journal_is_damage(self, run: RunDirectory, target: Destination, make_trial: Make) -> None:
        there = Path(target.path) / "demo"
        for numbers in (range(1), range(1, 2), range(2, 3)):
            add_trials(run, make_trial, numbers)
            RunCopy(run, target).copy_once()
        sorted(there.glob("journal/*"))[1].unlink()
        with pytest.raises(ResultsError, match="of its journal are missing"):
            fetch_run(target, Path(target.path), "demo")

    def test_compaction_between_listing_and_copying(
        self, run: RunDirectory, target: Destination, make_trial: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_trials(run, make_trial, range(3))
        copying = RunCopy(run, target)
        listed = copying._local_parts
        compacted = []

        def list_and_compact() -> dict[str, Path]:
            found = listed()
            if not compacted:
                compacted.append(DatasetWriter(run).compact())
            return found

        monkeypatch.setattr(copying, "_local_parts", list_and_compact)
        copying.copy_once()
        assert compacted == [3]
        assert rows(Path(target.path) / "demo") == rows(run.path)


def names(path: Path) -> list[str]:
    return [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]


class TestInTheBackground:
    def test_new_files_appear_while_the_run_goes_on(self, run: RunDirectory, target: Destination, make_trial: Make) -> None:
        there = Path(target.path) / "demo"
        with RunCopy(run, target, pause_s=0.01):
            add_trials(run, make_trial, range(3))
            wait_until(lambda: data(there) == data(run.path))
            owner = Owner.read(target.child("demo"))
            assert owner is not None
            assert owner.heartbeat_s is not None
            DatasetWriter(run).finish()
        assert data(there) == data(run.path)
        ended = Owner.read(target.child("demo"))
        assert ended is not None
        assert ended.heartbeat_s is None

    def test_a_destination_that_fails_in_the_middle_is_told_once_and_again_when_it_recovers(
        self, run: RunDirectory, store: FailingStore, make_trial: Make
    ) -> None:
        told: list[str] = []
        with RunCopy(run, store.destination(), tell=told.append, pause_s=0.01):
            store.failing = OSError("NETWORK_CONNECTION: gone")
            add_trials(run, make_trial, range(3))
            wait_until(lambda: bool(told))
            store.failing = None
            wait_until(lambda: len(told) > 1)
        assert [message.partition(" (")[0] for message in told] == [
            "cannot copy to store://copies/demo: it cannot be reached",
            "copying to store://copies/demo works again",
        ]
        assert rows(store.folder / "copies" / "demo") == rows(run.path)

    def test_a_destination_that_stays_dead_is_reported_at_the_end_and_completed_later(
        self, run: RunDirectory, store: FailingStore, make_trial: Make
    ) -> None:
        told: list[str] = []
        with RunCopy(run, store.destination(), tell=told.append, pause_s=0.01, stall_s=0.3):
            store.failing = OSError("NETWORK_CONNECTION: gone")
            add_trials(run, make_trial, range(3))
        assert len(told) == 2
        assert "is not complete: 7 files are missing" in told[1]  # three documents, three segments, the journal
        assert f"llem-ray copy {run.path} 'store://copies'" in told[1]
        store.failing = None
        RunCopy(run, store.destination()).copy_once()
        assert rows(store.folder / "copies" / "demo") == rows(run.path)

    def test_who_was_taken_over_stops(self, run: RunDirectory, target: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(copy, "HEARTBEAT_S", 0.0)
        told: list[str] = []
        with RunCopy(run, target, tell=told.append, pause_s=0.01):
            RunCopy(run, target, take_over=True).claim()
            wait_until(lambda: bool(told))
        assert "has taken over" in told[0]
        assert "is not complete" in told[1]


def owner_file(target: Destination, **more: Any) -> None:
    owner = {"host": "elsewhere", "pid": 7, "session": "s", "heartbeat_s": time.time(), **more}
    target.child("demo").write("owner.json", Owner(**owner).encode())


class TestOwner:
    def test_an_active_one_elsewhere_is_left_alone(self, run: RunDirectory, target: Destination, make_trial: Make) -> None:
        add_trials(run, make_trial, range(1))
        RunCopy(run, target).copy_once()
        owner_file(target)
        with pytest.raises(RunInUse, match="process 7 on elsewhere works on") as raised:
            RunCopy(run, target).claim()
        assert "--take-over" in str(raised.value)
        with pytest.raises(RunInUse):
            fetch_run(target, Path(target.path).parent / "other", "demo")
        assert fetch_run(target, Path(target.path).parent / "other", "demo", take_over=True) is not None
        RunCopy(run, target, take_over=True).claim()

    @pytest.mark.parametrize(
        "more", [{"heartbeat_s": None}, {"heartbeat_s": 0.0}, {"host": socket.gethostname(), "pid": 2**22 + 1}]
    )
    def test_one_that_ended_fell_silent_or_died_here_is_not_active(self, more: dict[str, Any], target: Destination) -> None:
        owner_file(target, **more)
        owner = Owner.read(target.child("demo"))
        assert owner is not None
        assert not owner.is_active()

    def test_one_that_lives_here_is(self, target: Destination) -> None:
        owner_file(target, host=socket.gethostname(), pid=os.getppid())
        owner = Owner.read(target.child("demo"))
        assert owner is not None
        assert owner.is_active()

    def test_a_damaged_file_is_no_owner(self, target: Destination) -> None:
        target.child("demo").write("owner.json", b"[]")
        assert Owner.read(target.child("demo")) is None


class TestFetching:
    def test_the_run_goes_on_elsewhere_and_the_first_place_is_told_so(
        self, run: RunDirectory, target: Destination, tmp_path: Path, make_trial: Make
    ) -> None:
        add_trials(run, make_trial, range(3), compact_trials=2)
        run.log_path.write_text("a log\n")
        RunCopy(run, target).copy_once()
        other = fetch_run(target, tmp_path / "other", "demo")
        assert other is not None
        assert rows(other.path) == rows(run.path)
        assert other.journal_path.read_bytes() == run.journal_path.read_bytes()
        assert settled_state(other) == settled_state(run)
        assert other.log_path.read_text() == "a log\n"
        assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["demo"]
        add_trials(other, make_trial, range(3, 5))
        RunCopy(other, target).copy_once()
        assert rows(Path(target.path) / "demo") == rows(other.path)
        before = names(Path(target.path) / "demo")
        with pytest.raises(ResultsError, match="went on elsewhere") as raised:
            RunCopy(run, target).claim()
        assert f"move {run.path} away" in str(raised.value)
        assert names(Path(target.path) / "demo") == before

    def test_both_went_on(self, run: RunDirectory, target: Destination, tmp_path: Path, make_trial: Make) -> None:
        add_trials(run, make_trial, range(1))
        RunCopy(run, target).copy_once()
        other = fetch_run(target, tmp_path / "other", "demo")
        assert other is not None
        add_trials(run, make_trial, range(1, 2))
        add_trials(other, make_trial, range(1, 2))
        RunCopy(other, target).copy_once()
        with pytest.raises(ResultsError, match="went on elsewhere"):
            RunCopy(run, target).claim()

    def test_what_was_not_copied_in_time_is_sent_by_the_first_place_when_it_goes_on(
        self, run: RunDirectory, target: Destination, make_trial: Make
    ) -> None:
        add_trials(run, make_trial, range(2))
        RunCopy(run, target).copy_once()
        DatasetWriter(run).compact()
        RunCopy(run, target).copy_once()
        stray = Path(target.path) / "demo" / "trials" / "part-00000001-00000001.parquet"
        shutil.copy(next((run.path / "trials").iterdir()), stray)
        add_trials(run, make_trial, range(2, 3))
        RunCopy(run, target).copy_once()
        assert not stray.exists()
        assert rows(Path(target.path) / "demo") == rows(run.path)

    def test_another_run_of_the_same_name_is_not_overwritten(
        self, run: RunDirectory, target: Destination, tmp_path: Path, make_trial: Make
    ) -> None:
        add_trials(run, make_trial, range(1))
        RunCopy(run, target).copy_once()
        other = RunDirectory.create(tmp_path / "other", "demo")
        with pytest.raises(ResultsError, match="holds another run of this name"):
            RunCopy(other, target).claim()

    def test_data_without_a_journal_is_not_touched(self, run: RunDirectory, target: Destination) -> None:
        target.child("demo").write("segments/00000001.arrows", b"x")
        with pytest.raises(ResultsError, match="holds another run"):
            RunCopy(run, target).claim()

    def test_the_latest_of_several_runs_is_fetched_and_none_where_there_is_none(
        self, target: Destination, tmp_path: Path, make_trial: Make
    ) -> None:
        assert fetch_run(target, tmp_path / "other", "demo") is None
        for name in ("demo", "demo-2", "demo-10", "demography"):
            made = RunDirectory.create(tmp_path / "runs2", name)
            add_trials(made, make_trial, range(1))
            RunCopy(made, target).copy_once()
        found = fetch_run(target, tmp_path / "other", "demo")
        assert found is not None
        assert found.name == "demo-10"

    def test_a_store_that_fails_leaves_nothing_behind(
        self, run: RunDirectory, store: FailingStore, tmp_path: Path, make_trial: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_trials(run, make_trial, range(1))
        RunCopy(run, store.destination()).copy_once()
        monkeypatch.setattr(store, "open_input_stream", lambda path: (_ for _ in ()).throw(OSError("broken")))
        with pytest.raises(ResultsError, match="cannot fetch store://copies/demo"):
            fetch_run(store.destination(), tmp_path / "other", "demo")
        assert not (tmp_path / "other").exists() or list((tmp_path / "other").iterdir()) == []
