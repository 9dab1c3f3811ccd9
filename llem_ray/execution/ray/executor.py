"""Runs gangs and samplers as Ray actors: an embedded, loopback-only Ray that lives and dies with this process."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from llem_ray.core.errors import EngineDied, LlemRayError, PlacementError
from llem_ray.core.outcome import Outcome
from llem_ray.core.plan import LoadGroup
from llem_ray.core.power import SampleBatch, SamplerInfo
from llem_ray.execution.calls import Gang, Leased, Loaded, Sampler, TrialOrder
from llem_ray.execution.engine_host import EngineHost
from llem_ray.execution.sampler_host import SamplerHost

T = TypeVar("T")

OBJECT_STORE_BYTES = 256 * 2**20
SAMPLER_LEASE_S = 120.0
LOG_TAIL_BYTES = 4000
MARK = "LLEM_RAY_EMBEDDED"
"""Environment variable that every process of an embedded Ray carries."""
REAPER_TIMEOUT_S = 10.0


_EMBEDDED: Final = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # bind to 127.0.0.1 only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # an actor without GPUs sees them all: right for samplers
    "RAY_worker_niceness": "0",  # Ray's 15 would let any other process slow the engine and delay the sampler
}
"""Settings of an embedded Ray that must be in the environment before Ray is imported."""


def _import_ray() -> Any:
    """Import Ray; in the run driver with our settings, and a token that is known to nobody else."""
    if "ray" not in sys.modules:
        os.environ.update(_EMBEDDED)
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # Ray names GPUs by number; CUDA's own order is the fastest first, which is not NVML's.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    import ray  # noqa: PLC0415 - the settings above must come first

    return ray


class RayCall(Generic[T]):
    """A Call that an actor answers."""

    def __init__(self, ref: Any, what: str) -> None:
        self._ref = ref
        self._what = what

    def result(self, timeout_s: float) -> T:
        """The actor's answer; EngineDied when the actor is gone."""
        ray = _import_ray()
        try:
            answer: T = ray.get(self._ref, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(f"no answer to {self._what} within {timeout_s} s") from error
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, LlemRayError):
                raise cause from error
            raise LlemRayError(f"{self._what} failed: {cause!r}", str(error)) from error
        except ray.exceptions.RayError as error:  # its actor died, or Ray killed it because the host's memory was nearly full
            raise EngineDied(f"the process died during {self._what}: {_first_line(error)}") from error
        return answer


class RayGang:
    """An engine host in an actor of its own."""

    def __init__(self, actor: Any, logs: Path) -> None:
        self._actor = actor
        self._logs = logs
        self._pid: int | None = None

    def lease(self) -> RayCall[Leased]:
        """Answered once the actor runs."""
        return _LeaseCall(self._actor.lease.remote(), self)

    def load(self) -> RayCall[Loaded]:
        """Load the model in the actor."""
        return RayCall(self._actor.load.remote(), "load")

    def run(self, order: TrialOrder) -> RayCall[Outcome]:
        """Run one attempt in the actor."""
        return RayCall(self._actor.run.remote(order), f"trial {order.trial_id}")

    def phase(self) -> str | None:
        """What the actor does now; asked on its second lane, so that a busy engine answers too."""
        ray = _import_ray()
        try:
            answer: str | None = ray.get(self._actor.phase.options(concurrency_group="watch").remote(), timeout=0.5)
        except ray.exceptions.RayError:
            return None
        return answer

    def close(self, timeout_s: float) -> None:
        """Unload, then kill the actor."""
        ray = _import_ray()
        with contextlib.suppress(Exception):
            ray.get(self._actor.close.remote(), timeout=timeout_s)
        with contextlib.suppress(Exception):
            ray.kill(self._actor)

    def last_words(self) -> str | None:
        """End of the actor's stderr."""
        if self._pid is None:
            return None
        for path in sorted(self._logs.glob(f"worker-*-{self._pid}.err")):
            text = path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
            if text:
                return text
        return None

    def remember(self, leased: Leased) -> None:
        """Keep the process id: its log is named after it."""
        self._pid = leased.pid


class _LeaseCall(RayCall[Leased]):
    """A lease answer that the gang remembers the process id of."""

    def __init__(self, ref: Any, gang: RayGang) -> None:
        super().__init__(ref, "placement")
        self._gang = gang

    def result(self, timeout_s: float) -> Leased:
        leased = super().result(timeout_s)
        self._gang.remember(leased)
        return leased


class RaySampler:
    """A sampler host in an actor of its own."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def describe(self) -> RayCall[SamplerInfo]:
        """Answered when calibrated."""
        return RayCall(self._actor.describe.remote(), "sampler start")

    def fetch(self, after_seq: int) -> RayCall[list[SampleBatch]]:
        """Batches after ``after_seq``."""
        return RayCall(self._actor.fetch.remote(after_seq), "sampler fetch")

    def close(self) -> None:
        """Stop polling, then kill the actor."""
        ray = _import_ray()
        with contextlib.suppress(Exception):
            ray.get(self._actor.close.remote(), timeout=5.0)
        with contextlib.suppress(Exception):
            ray.kill(self._actor)


class _EngineActor(EngineHost):
    """EngineHost that learns its GPUs from Ray."""

    def __init__(self, *args: Any, threads_are_ours: bool, **kwargs: Any) -> None:
        if not threads_are_ours:
            # Ray sets it to the actor's CPUs, of which we ask none: one thread, where the engine would choose its own number.
            os.environ.pop("OMP_NUM_THREADS", None)
        super().__init__(*args, **kwargs)

    def lease(self, gpu_ids: tuple[str, ...] = ()) -> Leased:
        ray = _import_ray()
        ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return super().lease(gpu_ids or tuple(str(gpu) for gpu in ids))


class EmbeddedRayExecutor:
    """A Ray of our own on this host: bound to 127.0.0.1, with a random token, gone when this process is."""

    def __init__(self) -> None:
        self._temp_dir: Path | None = None
        self._logs = Path()
        self._reaper: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start Ray.

        Raises:
            PlacementError: It did not start, or something imported Ray before us, so that our settings came too late.
        """
        if "ray" in sys.modules and any(os.environ.get(name) != value for name, value in _EMBEDDED.items()):
            raise PlacementError(
                "Ray was imported before llem-ray could bind it to this host alone", "an engine plug-in imports it"
            )
        ray = _import_ray()
        self._temp_dir = Path(tempfile.mkdtemp(prefix="llem-ray-", dir="/tmp"))
        # What Ray starts inherits the mark, so that the reaper knows it; the reaper itself must not.
        self._reaper = _start_reaper(self._temp_dir)
        os.environ[MARK] = str(self._temp_dir)
        try:
            context = ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                object_store_memory=OBJECT_STORE_BYTES,
                namespace="llem-ray",
                _temp_dir=str(self._temp_dir),
            )
        except Exception as error:
            self.close()
            raise PlacementError(f"Ray did not start on this host: {_first_line(error)}") from error
        self._logs = Path(context.address_info["session_dir"]) / "logs"

    def gpus_free(self) -> int:
        """Whole GPUs Ray sees on this host."""
        return int(_import_ray().cluster_resources().get("GPU", 0))

    def open_samplers(self, sources: Sequence[str] | str, sample_hz: float, epoch: int) -> tuple[Sampler, ...]:
        """One sampler actor on this host."""
        ray = _import_ray()
        actor = ray.remote(num_cpus=0, num_gpus=0, max_concurrency=2)(SamplerHost)
        return (RaySampler(actor.remote(sources, sample_hz, epoch, SAMPLER_LEASE_S)),)

    def open_gang(self, group: LoadGroup, base_dir: str, cache_dir: str) -> Gang:
        """One engine actor that holds the group's GPUs.

        Raises:
            PlacementError: This host has fewer GPUs than the group needs.
        """
        ray = _import_ray()
        free = self.gpus_free()
        if group.gpus > free:
            raise PlacementError(f"the gang needs {group.gpus} GPUs, this host has {free}")
        experiment = group.experiment
        hidden = {} if group.gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
        actor = ray.remote(
            num_cpus=0,
            num_gpus=group.gpus,
            max_restarts=0,
            concurrency_groups={"watch": 1},
            runtime_env=hidden,
        )(_EngineActor)
        made = actor.remote(
            experiment.model,
            experiment.engine,
            group.gpus,
            base_dir,
            cache_dir,
            threads_are_ours="OMP_NUM_THREADS" in os.environ,
        )
        return RayGang(made, self._logs)

    def facts(self) -> Mapping[str, str]:
        """For the environment record."""
        return {"executor": "ray-embedded", "ray": str(_import_ray().__version__)}

    def close(self) -> None:
        """Stop Ray and remove its files."""
        with contextlib.suppress(Exception):
            _import_ray().shutdown()
        os.environ.pop(MARK, None)
        if self._temp_dir is not None:
            shutil.rmtree(self._temp_dir, ignore_errors=True)
            self._temp_dir = None
        if self._reaper is not None and self._reaper.stdin is not None:
            self._reaper.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._reaper.wait(timeout=REAPER_TIMEOUT_S)
            self._reaper = None


def _start_reaper(folder: Path) -> subprocess.Popen[bytes]:
    """The process that cleans up after us however we end."""
    script = Path(__file__).with_name("reaper.py")
    command = [sys.executable, "-I", "-S", str(script), f"{MARK}={folder}", str(folder), str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
