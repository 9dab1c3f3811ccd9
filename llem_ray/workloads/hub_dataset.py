"""Prompts from the Hugging Face hub, or from local files and folders, by the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from llem_ray.core.errors import ConfigError, PluginError
from llem_ray.core.plugins import install_command
from llem_ray.core.workload_spec import PromptSpec
from llem_ray.workloads.prompt_files import FIELD, Entry, PromptSet, prompts_of, require_columns, wanted_columns

_BUILDERS: Final[Mapping[str, str]] = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def read_dataset(spec: PromptSpec, base_dir: Path, *, all_turns: bool = False) -> PromptSet:
    """The prompts of a data set.

    Args:
        spec: Which data set, configuration, split, revision and columns.
        base_dir: Folder that a relative local path starts from.
        all_turns: Keep all turns of conversations.

    Raises:
        PluginError: The library is not installed; the hint is the pip command.
        ConfigError: The data set, its configuration, split or column is not there, or a row has no prompt.
    """
    assert spec.dataset is not None
    table = _load(spec, spec.dataset, base_dir)
    wanted = wanted_columns(spec)
    require_columns(wanted, table.column_names, spec.dataset)
    return prompts_of(_rows(table.select_columns(list(wanted))), spec, spec.dataset, all_turns=all_turns)


def _rows(table: Any) -> Iterator[Entry]:
    for number, row in enumerate(table):
        yield Entry(row, None, f"row {number}: ")


def _load(spec: PromptSpec, name: str, base_dir: Path) -> Any:
    try:
        import datasets  # noqa: PLC0415 - an extra, and heavy
    except ImportError as error:
        message = f"`source: dataset` needs the datasets library, which cannot be imported: {error}"
        raise PluginError(message, install_command("datasets")) from error
    datasets.disable_progress_bars()
    path = base_dir / Path(name).expanduser()
    try:
        if path.is_file():
            return _local_file(datasets, spec, name, path)
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved(datasets, spec, name, path)
        if path.is_dir():
            return datasets.load_dataset(str(path), name=spec.config, split=spec.split)
        if _is_path(name):
            raise ConfigError("the data set does not exist", file=str(path), field=f"{FIELD}.dataset", found=name)
        return datasets.load_dataset(name, name=spec.config, split=spec.split, revision=spec.revision)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, StopIteration) as error:  # the last: an empty JSON file
        raise _refused(spec, name, error) from error


def _local_file(datasets: Any, spec: PromptSpec, name: str, path: Path) -> Any:
    builder = _BUILDERS.get(path.suffix)
    if builder is None:
        allowed = ", ".join(_BUILDERS)
        raise ConfigError("not a data file", file=str(path), field=f"{FIELD}.dataset", found=path.suffix or name, allowed=allowed)
    return datasets.load_dataset(builder, data_files={"train": str(path)}, split=spec.split)


def _saved(datasets: Any, spec: PromptSpec, name: str, path: Path) -> Any:
    """A folder that ``save_to_disk`` wrote: a data set, or one for each split."""
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if spec.split not in saved:
        message = f"data set {name!r} has no such split"
        raise ConfigError(message, field=f"{FIELD}.split", found=spec.split, allowed=", ".join(map(str, saved)))
    return saved[spec.split]


def is_local(name: str, base_dir: Path) -> bool:
    """It is there as a file or folder, or could be nothing else."""
    return (base_dir / Path(name).expanduser()).exists() or _is_path(name)


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).suffix in _BUILDERS


def _refused(spec: PromptSpec, name: str, error: Exception) -> ConfigError:
    """The library's own message, blamed on the field it speaks of."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    field, found = "dataset", name
    if isinstance(error, StopIteration):
        text = "it is empty"
    elif "split" in text.lower() or "instruction format" in text:
        field, found = "split", spec.split
    elif "BuilderConfig" in text or "config name" in text.lower():
        field, found = "config", str(spec.config)
    message = f"data set {name!r} cannot be read: {text[:300] or type(error).__name__}"
    return ConfigError(message, field=f"{FIELD}.{field}", found=found)
