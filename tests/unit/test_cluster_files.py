"""cluster/ is what Kubernetes, Slurm and Ray's launcher take, and agrees with the images, the constraints and the code."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import click
import jsonschema
import kuberay
import pytest
import yaml
from kuberay import Manifest, cluster_of, groups_of, pod_problems, problems, schema_problems

from llem_ray.cli.main import cli
from llem_ray.config import load_sweep
from llem_ray.core.plugins import plugin_names
from llem_ray.execution.ray.base import BACKEND_LABEL, as_node

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
ENGINES = {"transformers": "transformers", "vllm": "vllm", "tensorrt-llm": "tensorrt"}
"""Image of docker/ -> its engine."""
DELETION = {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}
SECRETS = {"llem-ray-token", "llem-ray-hub", "llem-ray-store"}


def load(path: Path) -> Manifest:
    found: Manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def ray_cluster() -> Manifest:
    return load(KUBERAY / "cluster" / "raycluster.yaml")


def ray_job() -> Manifest:
    return load(KUBERAY / "job" / "rayjob.yaml")


def pods() -> Iterator[tuple[str, Manifest]]:
    """Every pod that a manifest leads to."""
    for manifest in (ray_cluster(), ray_job()):
        for name, group in groups_of(manifest).items():
            yield f"{manifest['kind']} {name}", group["template"]["spec"]
    yield "submitter", ray_job()["spec"]["submitterPodTemplate"]["spec"]
    yield "results", load(KUBERAY / "results-pod.yaml")["spec"]
    for patch in patches(KUBERAY / "components" / "sampler"):
        yield "sampler", patch[0]["value"]["template"]["spec"]


def patches(component: Path) -> list[list[dict[str, Any]]]:
    return [yaml.safe_load(patch["patch"]) for patch in load(component / "kustomization.yaml")["patches"]]


def environment(pod: Manifest) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in pod["containers"][0].get("env", [])}


def head(manifest: Manifest) -> Manifest:
    found: Manifest = manifest["spec"]["headGroupSpec"]["template"]["spec"]
    return found


def worker(manifest: Manifest) -> Manifest:
    found: Manifest = manifest["spec"]["workerGroupSpecs"][0]
    return found


def autoscaled(manifest: Manifest) -> None:
    manifest["spec"] |= {"enableInTreeAutoscaling": True, "autoscalerOptions": {"version": "v2"}}
    worker(manifest)["template"]["spec"]["restartPolicy"] = "Always"


class TestManifests:
    @pytest.mark.parametrize("manifest", [ray_cluster(), ray_job()], ids=lambda manifest: manifest["kind"])
    def test_kuberay_takes_them(self, manifest: Manifest) -> None:
        assert problems(manifest) == []

    def test_kubernetes_takes_the_others(self) -> None:
        results = load(KUBERAY / "results-pod.yaml")["spec"]
        assert schema_problems(results, kuberay.pod_schema()) == []
        assert list(pod_problems(results)) == []
        assert schema_problems(load(KUBERAY / "base" / "results.yaml")["spec"], kuberay.claim_schema()) == []
        policy = load(KUBERAY / "base" / "network-policy.yaml")["spec"]
        assert schema_problems(policy["ingress"], kuberay.ingress_schema()) == []
        assert set(policy) == {"podSelector", "policyTypes", "ingress"}

    @pytest.mark.parametrize(
        ("plant", "says"),
        [
            (lambda m: m["spec"].update(rayVersoin="2.60.0"), "'rayVersoin' was unexpected"),
            (lambda m: head(m)["containers"][0].update(imagePullPolcy="Always"), "'imagePullPolcy' was unexpected"),
            (lambda m: head(m)["containers"][0]["env"].append({"name": "A", "value": 1}), "1 is not of type 'string'"),
            (lambda m: worker(m).update(replicas="2"), "'2' is not of type 'integer'"),
            (lambda m: worker(m).pop("maxReplicas"), "'maxReplicas' is a required property"),
            (lambda m: m["spec"]["headGroupSpec"].update(resources={"CPU": 0}), "0 is not of type 'string'"),
            (lambda m: m["spec"]["authOptions"].update(mode="tokens"), "'tokens' is not one of"),
            (lambda m: m["spec"].update(rayVersion="2.51.0"), "needs rayVersion 2.52"),
            (lambda m: m["metadata"].update(name="Llem"), "no DNS-1035 label"),
            (lambda m: m["metadata"].update(name="l" * 54), "at most 53"),
            (lambda m: m["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": "0"}), "resources beside rayStartParams"),
            (lambda m: worker(m)["rayStartParams"].update(labels="a=b"), "labels go into"),
            (lambda m: worker(m)["labels"].update({BACKEND_LABEL: "vllm,transformers"}), "is malformed"),
            (lambda m: worker(m).update(replicas=9), "replicas are not between"),
            (lambda m: worker(m)["template"]["spec"]["volumes"].pop(), "there is no volume shm"),
            (lambda m: worker(m)["template"]["spec"]["volumes"][1]["emptyDir"].update(sizeLimit="1Ti"), "larger than the memory"),
            (lambda m: m["spec"]["workerGroupSpecs"].append(worker(m)), "two groups of one name"),
            (autoscaled, "wants restartPolicy Never"),
        ],
    )
    def test_mistakes_are_found(self, plant: Callable[[Manifest], object], says: str) -> None:
        manifest = ray_cluster()
        plant(manifest)
        assert any(says in problem for problem in problems(manifest)), problems(manifest)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"entrypoints": "x"}, "'entrypoints' was unexpected"),
            ({"shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished needs"),
            ({"clusterSelector": {"ray.io/cluster": "llem-ray"}}, "one of rayClusterSpec and clusterSelector"),
            ({"submissionMode": "SidecarMode"}, "SidecarMode excludes"),
            ({"deletionStrategy": {"deletionRules": [DELETION]}}, "exclude shutdownAfterJobFinishes"),
            ({"activeDeadlineSeconds": 0}, "must be positive"),
            ({"runtimeEnvYAML": "[1]"}, "runtimeEnvYAML is no mapping"),
        ],
    )
    def test_mistakes_in_a_job_are_found(self, changes: dict[str, Any], says: str) -> None:
        manifest = ray_job()
        manifest["spec"] |= changes
        assert any(says in problem for problem in problems(manifest)), problems(manifest)

    def test_the_job_s_cluster_is_the_cluster_with_the_sweep(self) -> None:
        cluster, job = cluster_of(ray_cluster()), cluster_of(ray_job())
        pod = job["headGroupSpec"]["template"]["spec"]
        sweep = [volume for volume in pod["volumes"] if volume["name"] == "sweep"]
        assert sweep == [{"name": "sweep", "configMap": {"name": "llem-ray-sweep"}}]
        pod["volumes"].remove(sweep[0])
        pod["containers"][0]["volumeMounts"].remove({"name": "sweep", "mountPath": "/sweep"})
        assert job == cluster


class TestAgreement:
    def test_ray_is_that_of_the_images(self) -> None:
        pins = (ROOT / "constraints" / "transformers.txt").read_text(encoding="utf-8")
        (version,) = re.findall(r"^ray==(.+)$", pins, re.MULTILINE)
        assert {cluster_of(manifest)["rayVersion"] for manifest in (ray_cluster(), ray_job())} == {version}

    def test_each_engine_has_a_group_with_its_image_and_its_label(self) -> None:
        assert set(ENGINES.values()) | {"fake"} >= set(plugin_names("llem_ray.backends"))
        groups = groups_of(ray_cluster())
        workers = {name: group for name, group in groups.items() if name != "head"}
        assert list(workers) == list(ENGINES)
        for name, group in workers.items():
            dockerfile = (ROOT / "docker" / f"{name}.Dockerfile").read_text(encoding="utf-8")
            assert f'io.llem-ray.engine="{ENGINES[name]}"' in dockerfile
            assert group["template"]["spec"]["containers"][0]["image"] == f"llem-ray/{name}"
            assert group["labels"] == {BACKEND_LABEL: ENGINES[name]}
            node = {"NodeID": "n", "NodeManagerHostname": "h", "NodeManagerAddress": "1.2.3.4", "Labels": group["labels"]}
            assert as_node(node).backend == ENGINES[name]
        assert groups["head"]["labels"] == {BACKEND_LABEL: "none"}
        assert groups["head"]["resources"] == {"CPU": "0"}
        assert "none" not in plugin_names("llem_ray.backends")

    def test_every_image_is_chosen_in_the_settings(self) -> None:
        settings = {image["name"]: image["newTag"] for image in load(KUBERAY / "settings" / "kustomization.yaml")["images"]}
        assert settings == {f"llem-ray/{name}": name for name in ENGINES}
        used = {container["image"] for name, pod in pods() for container in pod["containers"] if name != "results"}
        assert used == set(settings)

    def test_pods_are_unprivileged_as_the_images_are(self) -> None:
        for image in ENGINES:
            assert "\nUSER 10001:10001\n" in (ROOT / "docker" / f"{image}.Dockerfile").read_text(encoding="utf-8")
        for name, pod in pods():
            user = pod["securityContext"]
            assert (user["runAsNonRoot"], user["runAsUser"], user["runAsGroup"]) == (True, 10001, 10001), name
            assert user["seccompProfile"] == {"type": "RuntimeDefault"}, name
            assert pod["automountServiceAccountToken"] is False, name
            assert not any("hostPath" in volume for volume in pod.get("volumes", [])), name
            for container in pod["containers"]:
                assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, (
                    name
                )
                assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), name

    def test_every_ray_node_tells_its_host_and_lets_engines_be(self) -> None:
        for name, pod in pods():
            if name in {"submitter", "results"}:
                continue
            found = environment(pod)
            assert found["LLEM_RAY_HOST_ID"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}, name
            assert found["RAY_worker_niceness"] == "0", name
            assert any(mount["mountPath"] == "/dev/shm" for mount in pod["containers"][0]["volumeMounts"]), name

    def test_workers_hold_all_gpus_of_a_node_and_the_head_has_the_results(self) -> None:
        for name, group in groups_of(ray_cluster()).items():
            pod = group["template"]["spec"]
            gpus = pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
            mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
            assert (gpus is None) == (name == "head") == ("/results" in mounts)
            assert (environment(pod).get("NVIDIA_VISIBLE_DEVICES") == "void") == (name == "head")
            assert "/models" in mounts  # HF_HOME of the images

    def test_variables_are_known(self) -> None:
        documented = set(re.findall(r"\bLLEM_[A-Z_]+\b", (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")))
        files = [path for path in CLUSTER.rglob("*") if path.is_file()]
        used = {name for path in files for name in re.findall(r"\bLLEM_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8"))}
        assert {"LLEM_RAY_HOST_ID", "LLEM_RAY_POWERCAP_ROOT", "LLEM_RAY_START_TIMEOUT_S"} <= used
        assert used <= documented

    def test_commands_parse(self) -> None:
        entrypoint = shlex.split(ray_job()["spec"]["entrypoint"])
        shown = [entrypoint]
        for path in CLUSTER.rglob("*"):
            if path.is_file():
                text = path.read_text(encoding="utf-8").replace('"$@"', "")
                shown += [
                    ["llem-ray", *shlex.split(line)]
                    for line in re.findall(r"^[# ]*(?:\w+=\S+ )?llem-ray ([a-z][^`&#\n]*)", text, re.M)
                ]
        assert len(shown) >= 3
        for program, name, *words in shown:
            assert program == "llem-ray"
            command = cli.commands[name]
            command.make_context(name, words)
        context = cli.commands["submit"].make_context("submit", entrypoint[2:])
        assert isinstance(context, click.Context)
        assert str(context.params["results_dir"]) == "/results"
        assert "LLEM_RAY_RESULTS=/results" in (ROOT / "docker" / "vllm.Dockerfile").read_text(encoding="utf-8")

    def test_the_sample_sweep_loads_and_names_an_interpreter_that_images_have(self) -> None:
        sweep = load_sweep(KUBERAY / "job" / "sweep.yaml", environ={})
        engines = {cell.experiment.engine.python for cell in sweep.cells}
        assert engines == {"engine-python"}
        assert "/usr/local/bin/engine-python" in (ROOT / "docker" / "vllm.Dockerfile").read_text(encoding="utf-8")
        assert load(KUBERAY / "job" / "kustomization.yaml")["configMapGenerator"] == [
            {"name": "llem-ray-sweep", "files": ["sweep.yaml"]}
        ]

    def test_secrets_are_named_in_the_docs_and_none_lies_here(self) -> None:
        text = json.dumps([ray_cluster(), ray_job()])
        page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
        assert all(name in text and name in page for name in SECRETS)
        assert not any(load(path).get("kind") == "Secret" for path in KUBERAY.rglob("*.yaml"))


class TestKustomize:
    """Built by kubectl where it is there; the operations of patches are applied by ourselves everywhere."""

    def test_every_patch_hits_what_it_names(self) -> None:
        for component, kinds in (
            ("settings", ("RayCluster", "RayJob")),
            ("components/sampler", ("RayCluster", "RayJob")),
            ("components/rapl", ("RayCluster", "RayJob")),
            ("components/autoscaling", ("RayCluster",)),
        ):
            assert tuple(p["target"]["kind"] for p in load(KUBERAY / component / "kustomization.yaml")["patches"]) == kinds
            for kind, operations in zip(kinds, patches(KUBERAY / component), strict=True):
                manifest = ray_cluster() if kind == "RayCluster" else ray_job()
                patched = copy.deepcopy(manifest)
                for operation in operations:
                    apply(patched, operation)
                assert problems(patched) == [], component
                assert (patched == manifest) == (component == "settings"), "settings say what the manifests say"

    def test_the_numbers_are_for_the_groups_that_the_comments_name(self) -> None:
        text = (KUBERAY / "settings" / "kustomization.yaml").read_text(encoding="utf-8")
        named = re.findall(r"workerGroupSpecs/(\d)/replicas, value: \d+\} # (\S+)$", text, re.MULTILINE)
        assert named == [(str(number), name) for number, name in enumerate(ENGINES)] * 2

    def test_an_autoscaled_cluster_begins_without_workers(self) -> None:
        manifest = ray_cluster()
        for operation in patches(KUBERAY / "components" / "autoscaling")[0]:
            apply(manifest, operation)
        spec = manifest["spec"]
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert [(group["replicas"], group["minReplicas"]) for group in spec["workerGroupSpecs"]] == [(0, 0)] * 3
        assert head(manifest)["automountServiceAccountToken"] is True
        text = (KUBERAY / "cluster" / "kustomization.yaml").read_text(encoding="utf-8")
        assert text.index("../settings") < text.index("../components/autoscaling"), "the later one says how many replicas"

    @pytest.mark.parametrize("folder", ["cluster", "job"])
    @pytest.mark.parametrize("optional", [False, True], ids=["as it is", "with everything"])
    def test_kustomize_builds_it(self, tmp_path: Path, folder: str, *, optional: bool) -> None:
        kubectl = shutil.which("kubectl")
        if kubectl is None:
            pytest.skip("kubectl, which has kustomize, is not here")
        shutil.copytree(KUBERAY, tmp_path / "kuberay")
        file = tmp_path / "kuberay" / folder / "kustomization.yaml"
        if optional:
            file.write_text(file.read_text(encoding="utf-8").replace("# - ../components", "- ../components"), encoding="utf-8")
        command = [kubectl, "kustomize", str(file.parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HOME": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        built = list(yaml.safe_load_all(done.stdout))
        kind = "RayCluster" if folder == "cluster" else "RayJob"
        kinds = {"PersistentVolumeClaim", "NetworkPolicy", kind} | ({"ConfigMap"} if folder == "job" else set())
        assert {manifest["kind"] for manifest in built} == kinds
        (manifest,) = (manifest for manifest in built if manifest["kind"] == kind)
        assert problems(manifest) == []
        assert ("sampler" in groups_of(manifest)) == optional
        replicas = [groups_of(manifest)[name]["replicas"] for name in ENGINES]
        assert replicas == ([0, 0, 0] if optional and folder == "cluster" else [0, 1, 0]), "autoscaling begins without workers"
        images = re.findall(r"image: (\S+)", done.stdout)
        assert set(images) == {f"registry.example.com/llem-ray:{name}" for name in ENGINES}
        if folder == "job":
            (sweep,) = (manifest for manifest in built if manifest["kind"] == "ConfigMap")
            assert sweep["metadata"]["name"] == "llem-ray-sweep"
            assert sweep["data"]["sweep.yaml"] == (KUBERAY / "job" / "sweep.yaml").read_text(encoding="utf-8")


def apply(manifest: Manifest, operation: dict[str, Any]) -> None:
    """One operation of a JSON patch (RFC 6902): add or replace."""
    *path, last = operation["path"].strip("/").split("/")
    node: Any = manifest
    for part in path:
        node = node[int(part)] if isinstance(node, list) else node[part]
    if last == "-":
        assert operation["op"] == "add"
        node.append(copy.deepcopy(operation["value"]))
        return
    assert operation["op"] == "add" or last in node, operation["path"]
    node[last] = copy.deepcopy(operation["value"])


class TestLauncher:
    def test_ray_s_schema_takes_it(self) -> None:
        config = load(CLUSTER / "ray" / "hosts.yaml")
        schema = distribution("ray").locate_file("ray/autoscaler/ray-schema.json")  # an imported Ray could not be embedded
        against = json.loads(Path(str(schema)).read_text(encoding="utf-8"))
        jsonschema.validate(config, against)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(config | {"file_mount": {}}, against)

    def test_options_are_those_of_ray_start(self) -> None:
        command = Path(sys.executable).with_name("ray")
        told = subprocess.run([command, "start", "--help"], capture_output=True, text=True, check=True).stdout
        config = load(CLUSTER / "ray" / "hosts.yaml")
        starts = [
            line
            for key in ("head_start_ray_commands", "worker_start_ray_commands")
            for line in config[key]
            if "ray start" in line
        ]
        assert len(starts) == 2
        starts.append((CLUSTER / "slurm" / "llem-ray.sbatch").read_text(encoding="utf-8"))
        used = {
            option
            for line in starts
            for option in re.findall(r"--[a-z-]+", re.sub(r"^#.*|.*srun.*|.*usage:.*", "", line, flags=re.M))
        }
        ours = {"--address", "--head", "--block", "--temp-dir"}
        assert ours <= used
        # Those of srun, and one that Ray does not tell, which tests/cluster/test_slurm.py uses.
        hidden = {"--node-name", "--nodes", "--ntasks", "--nodelist", "--cpus-per-task", "--cpu-bind", "--overlap"}
        assert {option for option in used - hidden if option not in told} == set()


class TestSlurm:
    def test_shellcheck_has_nothing_to_say(self) -> None:
        command = Path(sys.executable).with_name("shellcheck")
        files = [CLUSTER / "slurm" / "llem-ray.sbatch", ROOT / "docker" / "start-node"]
        done = subprocess.run([command, *files], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_the_job_has_whole_nodes_and_is_told_before_its_time_is_over(self) -> None:
        options = re.findall(
            r"^#SBATCH (\S+)$", (CLUSTER / "slurm" / "llem-ray.sbatch").read_text(encoding="utf-8"), re.MULTILINE
        )
        assert {"--exclusive", "--ntasks-per-node=1", "--signal=B:TERM@600", "--mem=0"} <= set(options)
