"""docker/ is well formed, pins what the rest of the repository pins, and starts nodes as it says. Builds nothing."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from llem_ray.core.plugins import plugin_names

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
IMAGES = {"transformers": "transformers", "vllm": "vllm", "tensorrt-llm": "tensorrt"}
"""Image -> the engine that it has."""
START = DOCKER / "start-node"


def dockerfile(image: str) -> str:
    return (DOCKER / f"{image}.Dockerfile").read_text()


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def example_env() -> dict[str, str]:
    lines = (DOCKER / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def compose(*names: str, **env: str) -> dict[str, Any]:
    """The file as docker compose reads it: variables replaced, a later file over an earlier one, services key by key."""
    values = example_env() | env

    def replaced(match: re.Match[str]) -> str:
        name, _, problem = match[1].partition(":?")
        if name not in values:
            raise AssertionError(f"{name} is not in .env.example: {problem}")
        return values[name]

    files = [yaml.safe_load(re.sub(r"\$\{([^}]+)\}", replaced, (DOCKER / name).read_text())) for name in names]
    whole = files[0]
    for file in files[1:]:
        for service, keys in file["services"].items():
            environment = whole["services"][service].get("environment", {}) | keys.get("environment", {})
            whole["services"][service] |= keys | {"environment": environment}
    return whole


def validate(spec: dict[str, Any]) -> None:
    """Raises ValueError for what the Compose specification does not know."""
    PyCompose.from_yaml(yaml.safe_dump(spec)).validate()


class TestDockerfiles:
    def test_there_is_one_for_every_engine_of_ours(self) -> None:
        assert {path.name.removesuffix(".Dockerfile") for path in DOCKER.glob("*.Dockerfile")} == set(IMAGES)
        assert set(IMAGES.values()) | {"fake"} >= set(plugin_names("llem_ray.backends"))

    def test_hadolint_has_nothing_to_say(self) -> None:
        command = Path(sys.executable).parent / "hadolint"
        files = sorted(map(str, DOCKER.glob("*.Dockerfile")))
        done = subprocess.run([command, "--no-color", *files], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_bases_are_pinned(self) -> None:
        for image in IMAGES:
            bases = re.findall(r"^FROM (\S+)", dockerfile(image), re.MULTILINE)
            assert len(bases) == 2
            for base in bases:
                assert re.search(r":v?\d+(\.\d+)+(-[\w.-]+)?(@sha256:[0-9a-f]{64})?$", base), base

    def test_engines_are_those_of_constraints_and_extras(self) -> None:
        extras = {
            requirement.name: requirement.specifier
            for entries in project()["optional-dependencies"].values()
            for requirement in map(Requirement, entries)
        }
        for image, package, base in (
            ("vllm", "vllm", "vllm/vllm-openai:v"),
            ("tensorrt-llm", "tensorrt-llm", "nvcr.io/nvidia/tensorrt-llm/release:"),
        ):
            version = pins("tensorrt" if image == "tensorrt-llm" else "vllm")[package]
            assert f"\nFROM {base}{version}\n" in dockerfile(image)
            assert f'== "{version}"' in dockerfile(image)
            assert version in extras[package]
        assert "source=constraints/transformers.txt" in dockerfile("transformers")
        assert pins("transformers")["transformers"] in extras["transformers"]

    def test_what_is_installed_is_compiled_as_its_user_cannot_write_there(self) -> None:
        for image in IMAGES:
            for stage in dockerfile(image).split("\nFROM "):
                for options in re.findall(r"uv pip install (.*)", stage):
                    assert "UV_COMPILE_BYTECODE=1" in stage or "--compile-bytecode" in options, image

    def test_the_node_is_the_same_in_all_images(self) -> None:
        stages = {dockerfile(image).partition("AS node\n")[2].partition("\nFROM ")[0] for image in IMAGES}
        assert len(stages) == 1
        (stage,) = stages
        python = re.search(r"^ARG NODE_PYTHON=(\d+\.\d+)\.\d+$", stage, re.MULTILINE)
        assert python is not None
        assert python[1] == "3.12"  # the only one that TensorRT-LLM is tested with
        assert f"{python[1]}.0" in SpecifierSet(project()["requires-python"])
        assert "COPY constraints/transformers.txt constraints.txt" in stage
        assert len({pins(name)["ray"] for name in ("transformers", "vllm", "vllm-cpu", "tensorrt")}) == 1

    @pytest.mark.parametrize("image", IMAGES)
    def test_nodes_are_unprivileged_watched_and_labelled(self, image: str) -> None:
        last = dockerfile(image).rpartition("\nFROM ")[2]
        assert "\nUSER 10001:10001\n" in last
        assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in last
        assert "RAY_AUTH_MODE=token" in last
        assert "\nHEALTHCHECK " in last
        assert 'ENTRYPOINT ["start-node"]' in last
        assert f'io.llem-ray.engine="{IMAGES[image]}"' in last
        for label in ("title", "description", "licenses", "version"):
            assert f"org.opencontainers.image.{label}=" in last
        assert f'licenses="{project()["license"]}"' in last

    def test_what_is_copied_is_not_ignored_and_secrets_are(self) -> None:
        lines = (ROOT / ".dockerignore").read_text().splitlines()
        rules = [line for line in lines if line and not line.startswith("#")]
        assert rules[0] == "*"
        kept = {rule[1:] for rule in rules if rule.startswith("!")}
        for image in IMAGES:
            for line in re.findall(r"^COPY (?:--chmod=\S+ )?(?!--from)(.+)$", dockerfile(image), re.MULTILINE):
                for source in line.split()[:-1]:
                    assert (ROOT / source).exists(), source
                    assert source in kept or source.partition("/")[0] in kept, source
        assert not any(".env" in name or "token" in name or name == "docker" for name in kept)
        ignored = (ROOT / ".gitignore").read_text().splitlines()
        assert {"/docker/.env", "/docker/ray-token"} <= set(ignored)


class TestCompose:
    def test_files_are_valid(self) -> None:
        for names in (["compose.yaml"], ["compose.yaml", "compose.hosts.yaml"]):
            validate(compose(*names, LLEM_RAY_NODE_IP="10.0.0.2", LLEM_RAY_HEAD="10.0.0.1"))

    def test_the_validator_sees_a_mistake(self) -> None:
        wrong = compose("compose.yaml")
        wrong["services"]["head"]["shm_sized"] = "1gb"
        with pytest.raises(ValueError, match="shm_sized"):
            validate(wrong)

    def test_every_variable_is_explained_and_used(self) -> None:
        used = set(re.findall(r"\$\{(\w+)\}", (DOCKER / "compose.yaml").read_text()))
        assert used == set(example_env())

    @pytest.mark.parametrize("image", IMAGES)
    def test_every_image_can_be_built(self, image: str) -> None:
        for service in compose("compose.yaml", LLEM_RAY_IMAGE=image)["services"].values():
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()

    def test_only_the_worker_has_gpus_and_nobody_has_more_rights_than_needed(self) -> None:
        services = compose("compose.yaml")["services"]
        assert "deploy" not in services["head"]
        assert services["head"]["environment"].pop("NVIDIA_VISIBLE_DEVICES") == "void"
        assert "NVIDIA_VISIBLE_DEVICES" not in services["worker"]["environment"]
        (gpus,) = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
        assert gpus["driver"] == "nvidia"
        assert {"gpu", "utility"} <= set(gpus["capabilities"])
        for service in services.values():
            assert "privileged" not in service
            assert service["cap_drop"] == ["ALL"]
            assert service["secrets"] == ["ray_token"]
            assert "results:/results" in service["volumes"]
            assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
            assert "RAY_AUTH_TOKEN" not in service["environment"]
        assert all(port.startswith("127.0.0.1:") for port in services["head"]["ports"])

    def test_a_machine_without_rapl_has_what_is_mounted(self) -> None:
        for service in compose("compose.yaml")["services"].values():
            (bound,) = (volume for volume in service["volumes"] if isinstance(volume, dict))
            assert bound == {"type": "bind", "source": "/sys/devices/virtual", "target": "/host/virtual", "read_only": True}
            assert service["environment"]["LLEM_RAY_POWERCAP_ROOT"] == "/host/virtual/powercap"


class TestStartNode:
    @pytest.fixture
    def start(self, tmp_path: Path):
        """Runs start-node with a ``ray`` that prints its arguments."""
        ray = tmp_path / "bin" / "ray"
        ray.parent.mkdir()
        ray.write_text('#!/bin/sh\necho ray "$@"\n')
        ray.chmod(0o755)
        token = tmp_path / "token"
        token.write_text("secret")

        def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
            base = {"PATH": f"{ray.parent}:{os.environ['PATH']}", "RAY_AUTH_TOKEN_PATH": str(token)}
            return subprocess.run([START, *args], env=base | env, capture_output=True, text=True, check=False)

        return run

    def test_a_head_has_no_gpus(self, start) -> None:
        words = start("head", LLEM_RAY_NODE_IP="10.0.0.1").stdout.split()
        assert {"--head", "--block", "--num-gpus=0", "--node-ip-address=10.0.0.1", "--port=6379"} <= set(words)

    def test_a_worker_joins_the_head_with_the_gpus_that_ray_finds(self, start) -> None:
        words = start("worker", LLEM_RAY_HEAD="head").stdout.split()
        assert "--address=head:6379" in words
        assert not any(word.startswith(("--num-gpus", "--head")) for word in words)
        assert "--num-gpus=2" in start("worker", LLEM_RAY_HEAD="head", LLEM_RAY_NUM_GPUS="2").stdout.split()

    def test_any_other_command_runs_as_it_is(self, start) -> None:
        assert start("echo", "a b", RAY_AUTH_TOKEN_PATH="").stdout == "a b\n"

    @pytest.mark.parametrize(
        ("args", "env", "says"),
        [
            (["head"], {"RAY_AUTH_TOKEN_PATH": "/absent"}, "RAY_AUTH_TOKEN_PATH must name a file"),
            (["worker"], {}, "LLEM_RAY_HEAD: address of the head"),
        ],
    )
    def test_what_is_missing_is_named(self, start, args: list[str], env: dict[str, str], says: str) -> None:
        done = start(*args, **env)
        assert done.returncode != 0
        assert says in done.stderr
        assert done.stdout == ""

    def test_options_are_those_of_ray(self) -> None:
        options = set(re.findall(r"--[a-z-]+(?==|[ )\"])", START.read_text())) - {"--block"}
        ray = shutil.which("ray", path=str(Path(sys.executable).parent))
        assert ray is not None
        told = subprocess.run([ray, "start", "--help"], capture_output=True, text=True, check=True).stdout
        assert options
        assert {option for option in options if option not in told} == set()
