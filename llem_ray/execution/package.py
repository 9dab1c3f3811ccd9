"""A sweep and the files it names as one small folder, to be run on another machine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, TypeVar

from llem_ray.config.resolved import dump_sweep, load_resolved
from llem_ray.core.errors import ConfigError
from llem_ray.core.identity import digest
from llem_ray.core.spec import Cell, EngineSpec, ModelSpec, Sweep
from llem_ray.core.workload_spec import LengthSpec, PromptSpec, WorkloadSpec

Lengths = TypeVar("Lengths", int | LengthSpec, int | LengthSpec | None, int | LengthSpec | Literal["recorded"])

SWEEP_FILE: Final = "sweep.json"
MAX_BYTES: Final = 100 * 2**20
"""A package is copied to every node; models go by their hub id, or by a path that all nodes know."""


def pack_sweep(sweep: Sweep, folder: Path) -> None:
    """Write the resolved sweep and copies of its prompt files, traces and model configs to ``folder``.

    Files that lie beside or below the sweep file keep their relative path. Others get a new one, which the packed sweep names
    in place of theirs. A path that is absolute and not there is left as it is: it may be there where the sweep will run.

    Raises:
        ConfigError: A file is missing or too large, or the sweep names a folder or interpreter relative to the sweep file.
    """
    packer = _Packer(Path(sweep.base_dir), folder)
    cells = tuple(packer.pack_cell(cell) for cell in sweep.cells)
    packed = replace(sweep, cells=cells, base_dir=".")
    (folder / SWEEP_FILE).write_text(dump_sweep(packed), encoding="utf-8")


def unpack_sweep(path: Path) -> Sweep:
    """The sweep that ``pack_sweep`` wrote to ``path``; relative paths start from that file's folder.

    Raises:
        ConfigError: There is no such file, or it is not a resolved sweep.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"the resolved sweep cannot be read: {reason}", file=str(path)) from error
    return replace(load_resolved(text), base_dir=str(path.parent))


class _Packer:
    """Copies files, each once, and names them anew where their own name has no meaning elsewhere."""

    def __init__(self, base_dir: Path, folder: Path) -> None:
        self._base_dir = base_dir
        self._folder = folder
        self._names: dict[str, str] = {}
        self._bytes = 0
        # Cells share their sections: each is looked at once and stays shared.
        self._models: dict[int, ModelSpec] = {}
        self._engines: set[int] = set()
        self._workloads: dict[int, WorkloadSpec] = {}

    def pack_cell(self, cell: Cell) -> Cell:
        """The cell as it is on another machine. It keeps its id: what it measures is the same."""
        found = cell.experiment
        if id(found.engine) not in self._engines:
            self._check_engine(found.engine)
            self._engines.add(id(found.engine))
        if id(found.model) not in self._models:
            self._models[id(found.model)] = self._pack_model(found.model)
        if id(found.workload) not in self._workloads:
            self._workloads[id(found.workload)] = self._pack_workload(found.workload)
        model, workload = self._models[id(found.model)], self._workloads[id(found.workload)]
        return replace(cell, experiment=replace(found, model=model, workload=workload))

    def _pack_workload(self, found: WorkloadSpec) -> WorkloadSpec:
        trace = found.load.trace
        return replace(
            found,
            load=found.load if trace is None else replace(found.load, trace=self._pack("workload.load.trace", trace)),
            prompts=self._pack_prompts(found.prompts),
            input_tokens=self._pack_lengths("workload.input_tokens.path", found.input_tokens),
            output_tokens=self._pack_lengths("workload.output_tokens.path", found.output_tokens),
            turns=self._pack_lengths("workload.turns.path", found.turns),
        )

    def _pack_prompts(self, found: PromptSpec) -> PromptSpec:
        if found.path is not None:
            return replace(found, path=self._pack("workload.prompts.path", found.path))
        if found.dataset is None or not self._path(found.dataset).exists():
            return found
        field = "workload.prompts.dataset"
        if self._path(found.dataset).is_file():
            return replace(found, dataset=self._pack(field, found.dataset))
        if not _is_absolute(found.dataset):
            allowed = "a hub id, a file, or an absolute path that exists where the sweep runs"
            raise ConfigError("a data set's folder is not sent along", field=field, found=found.dataset, allowed=allowed)
        return found

    def _pack_lengths(self, field: str, found: Lengths) -> Lengths:
        if not isinstance(found, LengthSpec) or found.path is None:
            return found
        return replace(found, path=self._pack(field, found.path))

    def _pack_model(self, found: ModelSpec) -> ModelSpec:
        for field, text in (("model.id", found.id), ("model.tokenizer", found.tokenizer)):
            if text is not None and not _is_absolute(text) and self._path(text).is_dir():
                allowed = "a hub id, or an absolute path that exists on every node"
                raise ConfigError("a model folder is not sent along", field=field, found=text, allowed=allowed)
        if found.config is None or not self._path(found.config).is_file():
            return found
        return replace(found, config=self._pack("model.config", found.config))

    def _check_engine(self, found: EngineSpec) -> None:
        if found.python is None or _is_absolute(found.python) or "/" not in found.python.split(" ", 1)[0]:
            return
        allowed = "a command on the PATH, or an absolute path that exists on every node"
        raise ConfigError("an interpreter is not sent along", field="engine.python", found=found.python, allowed=allowed)

    def _path(self, text: str) -> Path:
        return self._base_dir / Path(text).expanduser()

    def _pack(self, field: str, text: str) -> str:
        """The name of the file ``text`` within the package."""
        if text not in self._names:
            self._names[text] = self._copy(field, text)
        return self._names[text]

    def _copy(self, field: str, text: str) -> str:
        path = self._path(text)
        if not path.is_file():
            if _is_absolute(text):
                return text
            raise ConfigError("the file to be sent along is not there", field=field, found=str(path))
        self._bytes += path.stat().st_size
        if self._bytes > MAX_BYTES:
            allowed = f"{MAX_BYTES >> 20} MiB together, or an absolute path that exists on the cluster only"
            raise ConfigError("the files to be sent along are too large", field=field, found=str(path), allowed=allowed)
        stays = not _is_absolute(text) and not text.startswith("~") and ".." not in Path(text).parts and text != SWEEP_FILE
        name = text if stays else f"files/{digest(str(path.resolve()), 8)}-{path.name}"
        target = self._folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(path, target)
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", field=field, found=str(path)) from error
        return name


def _is_absolute(text: str) -> bool:
    return Path(text).is_absolute()
