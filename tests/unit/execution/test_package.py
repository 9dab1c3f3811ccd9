"""A sweep packed for another machine: which files go along, under which names, and what is refused."""

from pathlib import Path

import pytest

from llem_ray.config.sweep import load_sweep
from llem_ray.core.errors import ConfigError
from llem_ray.core.spec import Sweep
from llem_ray.execution import package
from llem_ray.execution.package import pack_sweep, unpack_sweep
from llem_ray.planning.plan import run_hash

SWEEP = """
schema_version: 1
name: packed
base:
  model: {model}
  engine: {{backend: fake, device: cpu{engine}}}
  workload: {{prompts: {prompts}}}
sweep: {{workload.batch_size: [1, 2]}}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where the sweep lies, with a prompts file beside, above and elsewhere."""
    (tmp_path / "home" / "texts").mkdir(parents=True)
    for path in (tmp_path / "home" / "texts" / "in.jsonl", tmp_path / "up.jsonl"):
        path.write_text(f'"{path.name}"\n')
    return tmp_path / "home"


def load(home: Path, prompts: str = "{}", *, model: str = "{config: llama-tiny}", engine: str = "") -> Sweep:
    path = home / "sweep.yaml"
    path.write_text(SWEEP.format(prompts=prompts, model=model, engine=engine))
    return load_sweep(path)


def pack(sweep: Sweep, tmp_path: Path) -> tuple[Sweep, Path]:
    folder = tmp_path / "package"
    folder.mkdir(parents=True)
    pack_sweep(sweep, folder)
    return unpack_sweep(folder / "sweep.json"), folder


def prompt_path(sweep: Sweep) -> str:
    (path,) = {cell.experiment.workload.prompts.path for cell in sweep.cells}
    assert path is not None
    return path


def test_a_file_beside_the_sweep_keeps_its_name(home: Path, tmp_path: Path) -> None:
    sweep = load(home, "{source: file, path: texts/in.jsonl}")
    packed, folder = pack(sweep, tmp_path)
    assert prompt_path(packed) == "texts/in.jsonl"
    assert (Path(packed.base_dir) / "texts/in.jsonl").read_text() == '"in.jsonl"\n'
    assert packed.base_dir == str(folder)
    assert (packed.cells, packed.repeats, packed.measure) == (sweep.cells, sweep.repeats, sweep.measure)


@pytest.mark.parametrize("absolute", [True, False])
def test_any_other_file_gets_a_new_name_and_the_run_stays_the_same(home: Path, tmp_path: Path, absolute: bool) -> None:
    sweep = load(home, f"{{source: file, path: {tmp_path / 'up.jsonl' if absolute else '../up.jsonl'}}}")
    packed, folder = pack(sweep, tmp_path)
    assert prompt_path(packed).startswith("files/")
    assert (folder / prompt_path(packed)).read_text() == '"up.jsonl"\n'
    assert [cell.cell_id for cell in packed.cells] == [cell.cell_id for cell in sweep.cells]
    assert run_hash(packed) == run_hash(sweep)
    assert str(home) not in (folder / "sweep.json").read_text()


def test_an_absolute_path_that_only_the_cluster_knows(home: Path, tmp_path: Path) -> None:
    packed, folder = pack(load(home, "{source: file, path: /only/there.jsonl}"), tmp_path)
    assert prompt_path(packed) == "/only/there.jsonl"
    assert [path.name for path in folder.iterdir()] == ["sweep.json"]


def test_a_model_config_goes_along(home: Path, tmp_path: Path) -> None:
    (home / "own.json").write_text("{}")
    packed, folder = pack(load(home, model="{config: own.json}"), tmp_path)
    assert packed.cells[0].experiment.model.config == "own.json"
    assert (folder / "own.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("told", "field", "says"),
    [
        ({"prompts": "{source: file, path: none.jsonl}"}, "workload.prompts.path", "is not there"),
        ({"prompts": "{source: dataset, dataset: texts}"}, "workload.prompts.dataset", "folder is not sent along"),
        ({"model": "{id: ./texts}"}, "model.id", "a model folder is not sent along"),
        ({"engine": ", python: venv/bin/python"}, "engine.python", "an interpreter is not sent along"),
    ],
)
def test_what_cannot_go_along(home: Path, tmp_path: Path, told: dict[str, str], field: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        pack(load(home, **told), tmp_path)
    assert error.value.field == field


def test_data_sets_and_lengths_go_along(home: Path, tmp_path: Path) -> None:
    (home / "in.csv").write_text("3\n")
    sweep = load(home, "{source: dataset, dataset: texts/in.jsonl}, input_tokens: {distribution: empirical, path: in.csv}")
    packed, folder = pack(sweep, tmp_path)
    workload = packed.cells[0].experiment.workload
    assert (workload.prompts.dataset, getattr(workload.input_tokens, "path", None)) == ("texts/in.jsonl", "in.csv")
    assert (folder / "texts/in.jsonl").read_text() == '"in.jsonl"\n'
    assert (folder / "in.csv").read_text() == "3\n"
    hub, _ = pack(load(home, "{source: dataset, dataset: someone/something}"), tmp_path / "hub")
    assert hub.cells[0].experiment.workload.prompts.dataset == "someone/something"


@pytest.mark.parametrize("field", ["input_tokens", "output_tokens", "turns"])
def test_every_file_of_lengths_goes_along(home: Path, tmp_path: Path, field: str) -> None:
    (home / "in.csv").write_text("3\n")
    _, folder = pack(load(home, f"{{}}, {field}: {{distribution: empirical, path: in.csv}}"), tmp_path)
    assert (folder / "in.csv").read_text() == "3\n"


def test_too_much_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_BYTES", 4)
    with pytest.raises(ConfigError, match="too large"):
        pack(load(home, "{source: file, path: texts/in.jsonl}"), tmp_path)


@pytest.mark.parametrize(("content", "says"), [(None, "No such file"), (b"\xff", "cannot be read"), (b"{", "is not JSON")])
def test_a_packed_sweep_that_is_none(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "sweep.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        unpack_sweep(path)


def test_a_trace_goes_along(home: Path, tmp_path: Path) -> None:
    (home / "texts" / "arrivals.csv").write_text("timestamp_s\n1\n")
    path = home / "sweep.yaml"
    path.write_text(SWEEP.format(prompts="{}", model="{config: llama-tiny}", engine="").replace("[1, 2]", "[1]"))
    sweep = load_sweep(path, overrides=["workload.load={pattern: trace, trace: texts/arrivals.csv}"])
    packed, folder = pack(sweep, tmp_path)
    assert packed.cells == sweep.cells
    assert (folder / "texts" / "arrivals.csv").read_text() == "timestamp_s\n1\n"
