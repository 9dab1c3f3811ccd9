"""Runs as Ray jobs: submitted to the head over HTTP, followed from anywhere, going on without us."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from llem_ray.core.errors import PlacementError
from llem_ray.execution.ray.address import Address
from llem_ray.execution.ray.connect import TCP_TIMEOUT_S, check_listens, token_refused

JobState = Literal["pending", "running", "succeeded", "failed", "stopped"]

PREFIX: Final = "llem-"
RUN_KEY: Final = "llem.run"
REQUEST_TIMEOUT_S: Final = 30.0
SILENCE_S: Final = 10.0
"""A log that is silent for so long makes us ask whether the job still runs."""
LOST_TIMEOUT_S: Final = 120.0
"""How long the head may be out of reach before we stop following."""
SETTLE_TIMEOUT_S: Final = 60.0
"""How long the state of a job may lag behind the end of its log."""
RETRY_S: Final = 2.0
AGENT_TIMEOUT_S: Final = 60.0
"""A head that has only just started has nobody yet who runs jobs."""
PACKAGING_LOG: Final = "ray._private.runtime_env.packaging"
STOP_WAIT_S: Final = 15
"""What Ray waits between SIGTERM and SIGKILL when it stops a job; its own default of 3 s is short for the last rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunJob:
    """A Ray job that runs a sweep."""

    job_id: str
    run: str
    """The run's name, without the number of a second run of the same sweep."""
    state: JobState
    exit_code: int | None
    """The run driver's, once it ended by itself."""
    message: str
    begin_s: float
    """When it was submitted, in s since 1970 by the head's clock."""

    @property
    def is_over(self) -> bool:
        """It will not go on."""
        return self.state in {"succeeded", "failed", "stopped"}


class RunJobs:
    """The llem-ray jobs of a cluster. Call ``prepare_environment`` first.

    Args:
        address: Of kind ``jobs``.

    Raises:
        PlacementError: Nothing answers there, it is not Ray, or it refuses our token.
    """

    def __init__(self, address: Address) -> None:
        assert address.host is not None
        assert address.port is not None
        self._address = address
        self.address = address.text
        check_listens(address.host, address.port, TCP_TIMEOUT_S)
        from ray.job_submission import JobSubmissionClient  # noqa: PLC0415 - settings must be in the environment before

        for name in (PACKAGING_LOG, *(part.__module__ for part in JobSubmissionClient.__mro__)):
            logging.getLogger(name).setLevel(logging.WARNING)  # they tell of uploads and sockets

        class Client(JobSubmissionClient):
            """Ray's client, that waits for ever no more."""

            def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                return super()._do_request(method, endpoint, **{"timeout": REQUEST_TIMEOUT_S, **options})

        with self._told():
            self._client = Client(address.text, verify=os.environ.get("REQUESTS_CA_BUNDLE") or True)

    def list(self) -> tuple[RunJob, ...]:
        """All jobs that run or ran sweeps, oldest first."""
        with self._told():
            found = self._client.list_jobs()
        jobs = [_run_job(details) for details in found if (details.metadata or {}).get(RUN_KEY)]
        return tuple(sorted(jobs, key=lambda job: (job.begin_s, job.job_id)))

    def of_run(self, run: str) -> tuple[RunJob, ...]:
        """Jobs of the run of that very name, oldest first."""
        return tuple(job for job in self.list() if job.run == run)

    def find(self, text: str) -> RunJob:
        """The newest job of the run a user means: a name, the beginning of exactly one name, or a job id.

        Raises:
            PlacementError: There is none, or several.
        """
        jobs = self.list()
        if exact := [job for job in jobs if text in {job.run, job.job_id}]:
            return exact[-1]
        names = sorted({job.run for job in jobs if job.run.startswith(text)})
        if len(names) == 1:
            return [job for job in jobs if job.run == names[0]][-1]
        if names:
            raise PlacementError(f"{text!r} may be any of {len(names)} runs", "one of: " + ", ".join(names[:10]))
        known = list(dict.fromkeys(job.run for job in jobs))[-10:]
        raise PlacementError(f"no run {text!r} at {self._address}", f"runs there: {', '.join(known) or 'none'}")

    def get(self, job_id: str) -> RunJob:
        """A job as it is now."""
        with self._told():
            return _run_job(self._client.get_job_info(job_id))

    def submit(
        self, run: str, earlier: Sequence[RunJob], folder: Path | None, command: Sequence[str], variables: Mapping[str, str]
    ) -> RunJob:
        """Start a job for the run, under the first id that no earlier one has: `llem-RUN`, `llem-RUN-2` and so on.

        When another submission has taken the id since ``earlier`` was looked up, its job is the answer.

        Args:
            run: The run's name.
            earlier: The run's jobs that the decision to submit went by.
            folder: What the job finds in its working directory.
            command: The run driver's command line; a shell on the head runs it.
            variables: Its environment, on top of the head's.
        """
        taken = {job.job_id for job in earlier}
        first = f"{PREFIX}{run}"
        ids = (first, *(f"{first}-{number}" for number in range(2, len(taken) + 3)))
        job_id = next(name for name in ids if name not in taken)
        self._start(job_id, folder, command, variables, {RUN_KEY: run})
        return self.get(job_id)

    def call(self, job_id: str, command: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
        """Run a short command on the head; returns its exit code and what it printed.

        Raises:
            PlacementError: It did not end within ``timeout_s``.
        """
        self._start(job_id, None, command, {}, {})
        deadline = time.monotonic() + timeout_s
        while True:
            with self._told():
                info = self._client.get_job_info(job_id)
                if info.status.is_terminal():
                    return info.driver_exit_code, _without_preamble(self._client.get_job_logs(job_id))
            if time.monotonic() > deadline:
                raise PlacementError(f"{command[-1]!r} did not end on the head within {timeout_s:g} s")
            time.sleep(0.2)

    def logs(self, job_id: str) -> str:
        """All that a job printed so far."""
        with self._told():
            return _without_preamble(self._client.get_job_logs(job_id))

    def stop(self, job_id: str) -> None:
        """Ask Ray to end the job: SIGTERM, and SIGKILL ``STOP_WAIT_S`` later."""
        with self._told():
            self._client.stop_job(job_id)

    def follow(self, job_id: str, write: Callable[[str], None]) -> RunJob:
        """Pass on what the job prints, from its beginning, until it ends; returns it as it ended.

        Raises:
            PlacementError: The head was out of reach for ``LOST_TIMEOUT_S``; the job may go on.
        """
        printed = _Printed(write)
        lost_ns: int | None = None
        while True:
            try:
                heard = printed.total
                with self._told():
                    asyncio.run(self._tail(job_id, printed))
                job = self._settle(job_id)
            except PlacementError as error:
                now_ns = time.monotonic_ns()
                lost_ns = now_ns if lost_ns is None or printed.total > heard else lost_ns
                if now_ns - lost_ns > LOST_TIMEOUT_S * 1e9:
                    raise PlacementError(
                        f"lost sight of {job_id}: {error.message}", "it may go on; `watch` follows it"
                    ) from error
                time.sleep(RETRY_S)
                continue
            lost_ns = None
            if job.is_over:
                printed.finish()
                return job
            time.sleep(RETRY_S)

    def _settle(self, job_id: str) -> RunJob:
        """The job once its end is known, or as it is when it goes on."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            job = self.get(job_id)
            if job.is_over or time.monotonic() > deadline:
                return job
            time.sleep(0.3)

    async def _tail(self, job_id: str, printed: _Printed) -> None:
        printed.restart()
        stream: Any = self._client.tail_job_logs(job_id)
        chunk = asyncio.ensure_future(anext(stream))
        try:
            while True:
                done, _ = await asyncio.wait({chunk}, timeout=SILENCE_S)
                if not done:
                    if (await asyncio.to_thread(self._client.get_job_info, job_id)).status.is_terminal():
                        return
                    continue
                try:
                    text = chunk.result()
                except StopAsyncIteration:
                    return
                printed.add(text)
                chunk = asyncio.ensure_future(anext(stream))
        finally:
            chunk.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await chunk
            with contextlib.suppress(Exception):
                await stream.aclose()

    def _start(
        self,
        job_id: str,
        folder: Path | None,
        command: Sequence[str],
        variables: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> None:
        environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **variables}}
        if folder is not None:
            environment["working_dir"] = str(folder)
        deadline = time.monotonic() + AGENT_TIMEOUT_S
        while True:
            with self._told():
                try:
                    self._client.submit_job(
                        entrypoint=shlex.join(command),
                        submission_id=job_id,
                        runtime_env=environment,
                        metadata=dict(metadata),
                    )
                except RuntimeError as error:
                    if "No available agent" in str(error):
                        if time.monotonic() > deadline:
                            hint = "on the head: is the port of its dashboard agent, 52365, taken by another Ray?"
                            raise PlacementError(f"the head of {self._address} has no agent to run jobs", hint) from error
                        time.sleep(RETRY_S)
                        continue
                    if "already exists" not in str(error):
                        raise
                return

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What Ray's client and its HTTP libraries raise, in our words."""
        import aiohttp  # noqa: PLC0415 - comes with Ray
        import ray  # noqa: PLC0415
        import requests  # noqa: PLC0415 - comes with Ray

        try:
            yield
        except ray.exceptions.AuthenticationError as error:
            raise token_refused(self._address) from error
        except requests.exceptions.SSLError as error:
            hint = "REQUESTS_CA_BUNDLE names the file of certificates to trust"
            raise PlacementError(f"no TLS connection to {self._address}: {_first_line(error)}", hint) from error
        except (requests.exceptions.Timeout, TimeoutError) as error:
            raise PlacementError(f"{self._address} gave no answer within {REQUEST_TIMEOUT_S:g} s") from error
        except (ConnectionError, requests.exceptions.RequestException, aiohttp.ClientError) as error:
            hint = "is it the dashboard of a Ray head? its port is 8265 unless chosen otherwise"
            raise PlacementError(f"{self._address} does not answer as Ray does: {_first_line(error)}", hint) from error
        except (RuntimeError, ValueError) as error:
            raise PlacementError(f"Ray at {self._address} refused: {_first_line(error)}") from error


class _Printed:
    """Passes whole lines on, each once, although every new connection tells them from the start."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._begun = ""
        self._told = 0
        self.total = 0

    def restart(self) -> None:
        """The text begins anew."""
        self._told = 0

    def add(self, text: str) -> None:
        """The next piece of text."""
        fresh = text[max(0, self.total - self._told) :]
        self._told += len(text)
        self.total = max(self.total, self._told)
        lines, newline, self._begun = (self._begun + fresh).rpartition("\n")
        if newline:
            self._write(_without_preamble(lines + newline))

    def finish(self) -> None:
        """No more text comes: pass on a last line without an end."""
        if self._begun:
            self._write(self._begun + "\n")
            self._begun = ""


def _run_job(details: Any) -> RunJob:
    metadata = details.metadata or {}
    return RunJob(
        job_id=details.submission_id,
        run=metadata.get(RUN_KEY, ""),
        state=details.status.value.lower(),
        exit_code=details.driver_exit_code,
        message=details.message or "",
        begin_s=(details.start_time or 0) / 1000,
    )


def _without_preamble(text: str) -> str:
    """Ray writes the command line and its own log into the job's log."""
    kept = (line for line in text.splitlines(keepends=True) if not _PREAMBLE.match(line))
    return "".join(kept)


_PREAMBLE: Final = re.compile(
    r"Running entrypoint for job |\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s+INFO \S+\.py:\d+ -- |\[[^\]]+ W \d+ \d+\]"
)


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) < 300 else text[:299] + "…"
