"""What is refused before anything starts."""

import json
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from model_configs import LLAMA_3_70B

from llem_ray.config.sweep import load_sweep
from llem_ray.core.errors import ConfigError, DeviceMemoryError, PlacementError, PluginError
from llem_ray.core.plan import Plan
from llem_ray.core.power import Device
from llem_ray.execution import context
from llem_ray.execution.context import unsure_workloads
from llem_ray.execution.memory import Devices, cluster_devices, group_memory, local_devices, require_memory, require_placed
from llem_ray.execution.preflight import check_plan, check_prompts, process_start_ns
from llem_ray.execution.sampler_host import SamplerHost
from llem_ray.planning.plan import make_plan
from llem_ray.testing.backend import FakeBackend
from llem_ray.testing.nvml import Gpu, Scenario, Waveform, fake_nvml

SWEEP = """\
schema_version: 1
name: study
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu}
sweep:
  workload.batch_size: [1, 2]
"""


def plan_of(tmp_path: Path, *overrides: str, gpus: int = 0) -> Plan:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return make_plan(load_sweep(tmp_path / "sweep.yaml", overrides=overrides), gpus_available=gpus)


def test_a_good_plan_passes_and_touches_nothing(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    check_plan(plan, 0, str(tmp_path / "cache"))
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("engine.backend=nothing", PluginError, "unknown engine 'nothing'"),
        ("engine.engine_args={decode_ms: -1}", ConfigError, "engine.engine_args"),
        ("sweep.engine.engine_args=[{decode_ms: 1}, {nonsense: 1}]", ConfigError, "nonsense"),
        ("workload.prompts={source: file, path: absent.jsonl}", ConfigError, "absent.jsonl"),
        ("engine={backend: fake, device: cuda}", PlacementError, "needs 1 GPU, this host has 0"),
        ("engine={backend: fake, device: cuda, tensor_parallel: 4}", PlacementError, "needs 4 GPUs, this host has 0"),
    ],
)
def test_a_bad_plan_is_refused(tmp_path: Path, override: str, error: type[Exception], says: str) -> None:
    plan = plan_of(tmp_path, override)
    with pytest.raises(error, match=says.replace("[", r"\[")):
        check_plan(plan, 0, str(tmp_path))


def test_gpus_that_are_there_are_enough(tmp_path: Path) -> None:
    check_plan(plan_of(tmp_path, "engine={backend: fake, device: cuda, tensor_parallel: 2}", gpus=2), 2, str(tmp_path))


def test_the_process_began_when_the_kernel_says() -> None:
    age_s = (time.monotonic_ns() - process_start_ns()) / 1e9
    assert age_s == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.5)


LARGE = ("base.model.config=large/config.json", "base.engine.backend=transformers", "base.engine.device=cuda")


@pytest.fixture
def large(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large/config.json").write_text(json.dumps(LLAMA_3_70B))


def gpus(*gib: int) -> Scenario:
    wave = Waveform.constant(100.0)
    sizes = enumerate(gib)
    return Scenario(gpus=tuple(Gpu(uuid=f"GPU-{n}", waveform=wave, memory_total_bytes=size * 2**30) for n, size in sizes))


def test_a_model_that_no_gpu_can_hold_is_refused_with_the_arithmetic(tmp_path: Path, large: None) -> None:
    groups = plan_of(tmp_path, *LARGE, gpus=1).groups
    with fake_nvml(gpus(80, 40)):
        with pytest.raises(PlacementError, match=r"at least 141 GB on each GPU, which has 85\.9 GB.*70,553,706,496") as refused:
            require_memory(groups, str(tmp_path), local_devices())
        assert "tensor_parallel" in (refused.value.hint or "")
    with fake_nvml(gpus(80, 141)):
        require_memory(groups, str(tmp_path), local_devices())


def test_what_is_not_known_is_not_refused(tmp_path: Path, large: None) -> None:
    groups = plan_of(tmp_path, *LARGE, gpus=1).groups
    unknown = Devices(gpu_bytes=(2**30, None), host_bytes=(2**30,))
    require_memory(groups, str(tmp_path), unknown)
    require_memory(groups, str(tmp_path), Devices(gpu_bytes=(), host_bytes=()))
    hub = plan_of(tmp_path, "base.model={id: org/model}", "base.engine.backend=vllm").groups
    told = group_memory(hub[0], str(tmp_path), unknown)
    assert told.need is None
    assert "config of org/model is not on this host" in (told.unknown or "")


def test_a_gang_is_not_loaded_on_gpus_that_are_too_small(tmp_path: Path, large: None) -> None:
    group = plan_of(tmp_path, *LARGE, gpus=1).groups[0]
    small = Device(uuid="GPU-a", name="A", source="nvml", scope="gpu", method="measured_counter", memory_bytes=80 * 2**30)
    with pytest.raises(DeviceMemoryError, match="needs at least 141 GB on each GPU"):
        require_placed(group, str(tmp_path), [small])
    require_placed(group, str(tmp_path), [replace(small, memory_bytes=None)])
    require_placed(group, str(tmp_path), [replace(small, memory_bytes=150 * 10**9)])
    on_cpu = plan_of(tmp_path, *LARGE, "base.engine.device=cpu").groups[0]
    require_placed(on_cpu, str(tmp_path), [])
    with pytest.raises(PlacementError, match="on each host, which has 64 GB") as refused:
        require_memory([on_cpu], str(tmp_path), Devices(gpu_bytes=(), host_bytes=(32 * 10**9, 64 * 10**9)))
    assert "engine.nodes" in (refused.value.hint or "")
    with pytest.raises(PlacementError) as refused:  # its ranks would share the one host's memory
        require_memory([on_cpu], str(tmp_path), Devices(gpu_bytes=(), host_bytes=(64 * 10**9,)))
    assert refused.value.hint == "take a smaller model.dtype or a quantised checkpoint, or run it where there is more memory"


def test_hosts_of_a_cluster_are_judged_as_this_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_nvml(gpus(80)):
        there = SamplerHost("auto", 20.0)
        try:
            info = there.describe()
        finally:
            there.close()
        assert cluster_devices([info]) == local_devices()
    limited = replace(info, host={**info.host, "memory_limit_bytes": 5 * 10**9})
    assert cluster_devices([limited]).host_bytes == (5 * 10**9,)


def test_an_engine_for_batches_is_not_asked_to_serve_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, "sweep.workload.batch_size=[1]", "workload.requests=4", "workload.load.pattern=saturated")
    check_plan(plan, 0, str(tmp_path))
    monkeypatch.setattr(FakeBackend, "serves_online", False)
    with pytest.raises(
        ConfigError, match=r"workload.load.pattern: fake runs batches only.*\n  found: saturated\n  allowed: batch"
    ):
        check_plan(plan, 0, str(tmp_path))


def test_a_trace_is_read_before_anything_starts(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "sweep.workload.batch_size=[1]", "workload.load={pattern: trace, trace: t.csv}")
    with pytest.raises(ConfigError, match="the trace does not exist"):
        check_plan(plan, 0, str(tmp_path))
    (tmp_path / "t.csv").write_text("timestamp_s\n2\n1\n")
    with pytest.raises(ConfigError, match="out of order"):
        check_plan(plan, 0, str(tmp_path))


def test_a_trace_that_outlasts_the_deadline_of_its_trial_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("timestamp_s\n100\n3700\n")
    load = "workload.load={pattern: trace, trace: t.csv, trace_speed: %d}"
    with pytest.raises(ConfigError, match=r"measure.trial_timeout_s: .*t.csv lasts 3600 s\n  found: 1800 s"):
        check_plan(plan_of(tmp_path, "sweep.workload.batch_size=[1]", load % 1), 0, str(tmp_path))
    check_plan(plan_of(tmp_path, "sweep.workload.batch_size=[1]", load % 4), 0, str(tmp_path))
    check_plan(plan_of(tmp_path, "sweep.workload.batch_size=[1]", load % 1, "workload.requests=1"), 0, str(tmp_path))


CONTEXT = ("base.engine.backend=transformers", "workload.input_tokens=2000", "workload.output_tokens=40")


def test_requests_beyond_the_context_are_refused_by_the_config_alone(tmp_path: Path) -> None:
    (tmp_path / "short.json").write_text(json.dumps(LLAMA_3_70B | {"max_position_embeddings": 2039}))
    with pytest.raises(ConfigError, match=r"2000 prompt \+ 40 output = 2040 tokens"):
        check_prompts(plan_of(tmp_path, *CONTEXT, "base.model.config=short.json"))
    check_prompts(plan_of(tmp_path, *CONTEXT))


def test_a_workload_is_measured_once_for_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(context, "require_context", lambda workload, *_: asked.append(workload.batch_size))
    check_prompts(plan_of(tmp_path, *CONTEXT, "repeats=3", "sweep.sampling.temperature=[0.5, 1.0]"))
    assert sorted(asked) == [1, 2]


def test_a_model_that_cannot_be_looked_at_is_nobody_s_fault(tmp_path: Path) -> None:
    check_prompts(plan_of(tmp_path, *CONTEXT, "base.model={id: org/model}", "workload.output_tokens=1000000"))


def test_only_what_needs_a_tokenizer_is_left_to_the_engine(tmp_path: Path) -> None:
    def unsure(*overrides: str) -> tuple[list[int], bool]:
        found, alone = unsure_workloads(plan_of(tmp_path, *overrides).groups[0], str(tmp_path))
        return [workload.batch_size for workload in found], alone

    assert unsure(*CONTEXT) == ([], False)
    assert unsure() == ([1, 2], True)  # of the fake engine nobody else knows the context
    assert unsure("base.engine.backend=transformers") == ([1, 2], True)
    assert unsure(*CONTEXT, "workload.prompts.chat_template=true") == ([1, 2], True)
    assert unsure(*CONTEXT, "experiments=[{workload: {prompts: {chat_template: true}, batch_size: 4}}]") == ([4], False)


def test_online_and_batch_workloads_of_an_engine_are_loaded_apart(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "experiments=[{workload: {requests: 4, load: {pattern: saturated}}}]")
    assert [group.online for group in plan.groups] == [False, True]
    assert len({group.load_key for group in plan.groups}) == 2
