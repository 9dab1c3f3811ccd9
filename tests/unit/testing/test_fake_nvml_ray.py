"""Ray takes the fake GPUs for real ones: placement and identity are testable without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llem_ray.testing.nvml import Gpu, Scenario, Waveform, build, default_cache, environment

CLUSTER = """
import json, os
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # binds to the loopback; read when ray is imported
import ray

@ray.remote(num_gpus=2, num_cpus=1)
class Engine:
    def ids(self):
        return ray.get_runtime_context().get_accelerator_ids()["GPU"], os.environ["CUDA_VISIBLE_DEVICES"]

@ray.remote(num_cpus=0)
class Sampler:
    def read(self):
        from llem_ray.power.nvml import NvmlSource
        source = NvmlSource()
        return [[sample.device_uuid, sample.power_mw, sample.error] for sample in source.read()]

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
resources = {name: count for name, count in ray.cluster_resources().items() if name.startswith(("GPU", "accelerator"))}
print(json.dumps([resources, ray.get(Engine.remote().ids.remote()), ray.get(Sampler.remote().read.remote())]))
ray.shutdown()
"""


@pytest.mark.ray
def test_ray_places_on_the_fake_gpus_and_a_sampler_reads_all_of_them(tmp_path: Path) -> None:
    gpus = tuple(Gpu(uuid=f"GPU-{i}", waveform=Waveform.constant(200.0 + i)) for i in range(4))
    path = Scenario(gpus=gpus, clock="realtime", origin_ns=1_700_000_000_000_000_000).write(tmp_path / "scenario.txt")
    env = {**os.environ, **environment(build(default_cache()), path), "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "-c", CLUSTER], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resources, engine, sampler = json.loads(done.stdout.splitlines()[-1])
    assert resources == {"GPU": 4.0, "accelerator_type:H200": 1.0}
    assert engine == [["0", "1"], "0,1"]
    assert sampler == [[f"GPU-{i}", 200_000 + 1000 * i, None] for i in range(4)]
