"""Features of the transformers engine that cannot be had together, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llem_ray.backends.engine_args import FIELD
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _Asked:
    """A feature that the sweep file asks for."""

    name: str
    field: str
    found: str


EXCLUDED: Final = (
    ("device_map", "split", "a device map spreads the layers over the GPUs of one process"),
    ("device_map", "replicas", "a device map spreads the layers over the GPUs of one process"),
    ("quantization", "split", "weights that bitsandbytes quantised cannot be shared by several processes"),
    ("lora", "split", "an adapter is not split with the layers it belongs to"),
    ("compile", "split", "a step that waits for other processes is not compiled"),
    ("static cache", "split", "the cache of a shared model is a dynamic one"),
    ("online", "split", "requests that come one by one are served by one process"),
    ("online", "replicas", "requests that come one by one are served by one process"),
    ("online", "device_map", "the cache of continuous batching lies on one device"),
    ("online", "compile", "the steps of continuous batching are not compiled"),
    ("online", "static cache", "continuous batching has a cache of its own"),
    ("compile", "device_map", "the hooks that carry activations from device to device are not compiled"),
    ("compile", "quantization", "the arithmetic of bitsandbytes is not compiled"),
    ("merge_lora", "quantization", "merging would round the adapter to the few bits of the quantised weights"),
)
"""The second feature is the one that stays; the error names the first."""


def check_combinations(
    config: BackendConfig, *, device_map: str | None, lora: bool, merge_lora: bool, static_cache: bool, compiled: bool
) -> None:
    """Refuse features that exclude each other.

    Args:
        config: Says the rest.
        device_map: Of the arguments.
        lora: There is an adapter.
        merge_lora: It is merged into the weights.
        static_cache: The cache has a fixed size.
        compiled: Steps are compiled.

    Raises:
        ConfigError: Two of them were asked for; the message says why they exclude each other.
    """
    engine = config.engine
    sizes = {name: getattr(engine, name) for name in ("tensor_parallel", "pipeline_parallel", "data_parallel")}
    split = next((name for name in ("tensor_parallel", "pipeline_parallel") if sizes[name] > 1), None)
    asked = [
        (split is not None, _Asked("split", f"engine.{split}", str(sizes.get(split or "")))),
        (sizes["data_parallel"] > 1, _Asked("replicas", "engine.data_parallel", str(sizes["data_parallel"]))),
        (device_map is not None, _Asked("device_map", f"{FIELD}.device_map", str(device_map))),
        (config.model.quantization is not None, _Asked("quantization", "model.quantization", str(config.model.quantization))),
        (lora, _Asked("lora", f"{FIELD}.lora", "an adapter")),
        (merge_lora, _Asked("merge_lora", f"{FIELD}.merge_lora", "true")),
        (compiled, _Asked("compile", f"{FIELD}.compile", "compilation")),
        (static_cache, _Asked("static cache", f"{FIELD}.cache_implementation", "static")),
        (config.online, _Asked("online", "workload.load", "requests that come one by one")),
    ]
    features = {feature.name: feature for is_asked, feature in asked if is_asked}
    for first, second, reason in EXCLUDED:
        if first in features and second in features:
            one, other = features[first], features[second]
            raise ConfigError(
                reason, field=one.field, found=f"{one.found} with {other.field}: {other.found}", allowed="one or the other"
            )
