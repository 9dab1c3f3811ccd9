"""What KubeRay 1.7 would refuse, or Kubernetes silently drop, in a manifest: its CRDs made strict, and its operator's rules."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import yaml

Manifest = dict[str, Any]

START_PARAMS: Final = {"num-cpus", "num-gpus", "memory", "resources"}
"""Of rayStartParams: what `resources` of a group says too."""
NAME_LIMITS: Final = {"RayCluster": 53, "RayJob": 47}
DNS_1035: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DNS_1123: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
LABEL_KEY: Final = re.compile(r"([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")
LABEL_VALUE: Final = re.compile(r"([A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?)?")


@functools.cache
def schema(kind: str) -> dict[str, Any]:
    """The strict schema of a kind of KubeRay's. Skips the test where the CRDs are absent."""
    folder = os.environ.get("LLEM_RAY_TEST_DATA")
    path = Path(folder or "/absent") / "kuberay" / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip("LLEM_RAY_TEST_DATA names no folder with kuberay/, the CRDs of KubeRay")
    crd = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    (version,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
    found: dict[str, Any] = _strict(version["schema"]["openAPIV3Schema"])
    return found


def _strict(node: Any) -> Any:
    """Kubernetes drops unknown keys in silence; a number or a string may stand where the CRD says so."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _strict(value) for key, value in node.items()}
    if node.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    keeps = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
    if isinstance(node.get("properties"), dict) and node.get("type") == "object" and not keeps:
        made["additionalProperties"] = False
    return made


def pod_schema() -> dict[str, Any]:
    """The schema of a pod's spec, as KubeRay's CRD has it."""
    found: dict[str, Any] = _cluster_schema()["headGroupSpec"]["properties"]["template"]["properties"]["spec"]
    return found


def claim_schema() -> dict[str, Any]:
    """The schema of a PersistentVolumeClaim's spec."""
    volume = pod_schema()["properties"]["volumes"]["items"]["properties"]["ephemeral"]
    found: dict[str, Any] = volume["properties"]["volumeClaimTemplate"]["properties"]["spec"]
    return found


def ingress_schema() -> dict[str, Any]:
    """The schema of a NetworkPolicy's ingress rules."""
    found: dict[str, Any] = _cluster_schema()["networkPolicy"]["properties"]["head"]["properties"]["ingressRules"]
    return found


def _cluster_schema() -> dict[str, Any]:
    found: dict[str, Any] = schema("RayCluster")["properties"]["spec"]["properties"]
    return found


def schema_problems(value: Any, against: Mapping[str, Any]) -> list[str]:
    """Path and message of what the schema refuses."""
    errors = jsonschema.Draft202012Validator(against).iter_errors(value)
    return [f"{error.json_path}: {error.message}" for error in errors]


def problems(manifest: Manifest) -> list[str]:
    """All that is wrong with a RayCluster or RayJob."""
    found = schema_problems(manifest, schema(manifest["kind"]))
    return found or [*_name_problems(manifest), *_job_problems(manifest), *_cluster_problems(cluster_of(manifest))]


def cluster_of(manifest: Manifest) -> Manifest:
    """The cluster that a RayCluster or RayJob describes."""
    spec: Manifest = manifest["spec"]
    return spec if manifest["kind"] == "RayCluster" else spec.get("rayClusterSpec", {})


def groups_of(manifest: Manifest) -> dict[str, Manifest]:
    """The head, by that name, and the groups of workers by theirs."""
    cluster = cluster_of(manifest)
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster.get("workerGroupSpecs", [])}


def _name_problems(manifest: Manifest) -> Iterator[str]:
    name, limit = manifest["metadata"]["name"], NAME_LIMITS[manifest["kind"]]
    if len(name) > limit or not DNS_1035.fullmatch(name):
        yield f"metadata.name: {name!r} is no DNS-1035 label of at most {limit} characters"


def _job_problems(manifest: Manifest) -> Iterator[str]:
    if manifest["kind"] != "RayJob":
        return
    spec = manifest["spec"]
    mode, selects = spec.get("submissionMode", "K8sJobMode"), bool(spec.get("clusterSelector"))
    if selects == ("rayClusterSpec" in spec):
        yield "one of rayClusterSpec and clusterSelector"
    if selects and (spec.get("backoffLimit") or spec.get("suspend") or mode == "SidecarMode"):
        yield "clusterSelector excludes backoffLimit, suspend and SidecarMode"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished", 0) and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished", 0) < 0 or spec.get("backoffLimit", 0) < 0:
        yield "ttlSecondsAfterFinished and backoffLimit must not be negative"
    if (spec.get("deletionStrategy") or {}).get("deletionRules") is not None and spec.get("shutdownAfterJobFinishes"):
        yield "deletionStrategy.deletionRules exclude shutdownAfterJobFinishes"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(name, 1) <= 0:
            yield f"{name} must be positive"
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield "SidecarMode excludes submitterPodTemplate and submitterConfig"
    if (spec.get("rayClusterSpec", {}).get("authOptions") or {}).get("enableK8sTokenAuth"):
        yield "a RayJob has no enableK8sTokenAuth"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"


def _cluster_problems(cluster: Manifest) -> Iterator[str]:
    if not cluster:
        return
    auth = cluster.get("authOptions") or {}
    version = tuple(int(part) for part in cluster.get("rayVersion", "0.0").split(".")[:2])
    if auth.get("mode") == "token" and version < (2, 52):
        yield "authOptions.mode token needs rayVersion 2.52 or later"
    if auth.get("enableK8sTokenAuth") and version < (2, 55):
        yield "enableK8sTokenAuth needs rayVersion 2.55 or later"
    groups = [("head", cluster["headGroupSpec"])]
    groups += [(group["groupName"], group) for group in cluster.get("workerGroupSpecs", [])]
    if len({name for name, _ in groups}) < len(groups):
        yield "two groups of one name"
    for name, group in groups:
        yield from (f"group {name}: {problem}" for problem in _group_problems(group))
    scales = cluster.get("enableInTreeAutoscaling", False)
    v2 = scales and (cluster.get("autoscalerOptions") or {}).get("version") == "v2"
    environment = {entry["name"] for entry in cluster["headGroupSpec"]["template"]["spec"]["containers"][0].get("env", [])}
    if "RAY_enable_autoscaler_v2" in environment:
        yield "autoscalerOptions.version instead of RAY_enable_autoscaler_v2"
    if "RAY_REDIS_ADDRESS" in environment:
        yield "gcsFaultToleranceOptions instead of RAY_REDIS_ADDRESS"
    for name, group in groups:
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if v2 and policy != "Never":
            yield f"group {name}: autoscaler v2 wants restartPolicy Never or none, not {policy}"
        if scales and group.get("suspend"):
            yield f"group {name}: cannot be suspended with an autoscaler"


def _group_problems(group: Manifest) -> Iterator[str]:
    params, resources = group.get("rayStartParams", {}), group.get("resources", {})
    if resources and START_PARAMS & params.keys():
        yield f"resources beside rayStartParams {', '.join(sorted(START_PARAMS & params.keys()))}"
    if "labels" in params:
        yield "labels go into the group's labels, not into rayStartParams"
    for key, value in group.get("labels", {}).items():
        if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
            yield f"label {key}={value} is malformed"
    if "groupName" in group:
        if not DNS_1123.fullmatch(group["groupName"]):
            yield "groupName is no DNS-1123 label"
        if not group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]:
            yield "replicas are not between minReplicas and maxReplicas"
    yield from pod_problems(group["template"]["spec"])


def pod_problems(spec: Manifest) -> Iterator[str]:
    """What the API server refuses, or a scheduler never places, although the schema has nothing against it."""
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    if len(set(volumes)) < len(volumes):
        yield "two volumes of one name"
    for container in spec["containers"]:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"volumeMounts: there is no volume {mount['name']}"
        names = [entry["name"] for entry in container.get("env", [])]
        if len(set(names)) < len(names):
            yield "env: one name twice"
        if any("/" in entry["name"] or not isinstance(entry.get("value", ""), str) for entry in container.get("env", [])):
            yield "env: names and values are strings"
        limits, requests = (container.get("resources", {}).get(part, {}) for part in ("limits", "requests"))
        for name, amount in requests.items():
            if name in limits and _amount(amount) > _amount(limits[name]):
                yield f"requests.{name} exceeds its limit"
        if limits.get("nvidia.com/gpu") != requests.get("nvidia.com/gpu", limits.get("nvidia.com/gpu")):
            yield "nvidia.com/gpu: requests and limits must be equal"
        memory = _amount(limits["memory"]) if "memory" in limits else float("inf")
        for volume in spec.get("volumes", []):
            size = (volume.get("emptyDir") or {}).get("sizeLimit")
            if size is not None and volume["emptyDir"].get("medium") == "Memory" and _amount(size) > memory:
                yield f"volume {volume['name']} is larger than the memory of its container"


def _amount(text: str | float) -> float:
    match = re.fullmatch(r"([\d.]+)(m|[KMGT]i?)?", str(text))
    assert match is not None, f"{text!r} is no quantity"
    unit = match[2] or ""
    if unit == "m":
        return float(match[1]) / 1000
    return float(match[1]) * (1024 if unit.endswith("i") else 1000) ** (" KMGT".index(unit[0]) if unit else 0)
