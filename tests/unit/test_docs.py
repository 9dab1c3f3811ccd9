"""The documentation tells the truth: generated pages are current, links resolve, commands exist, examples run."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import pytest
import yaml

from llem_ray.cli.main import cli
from llem_ray.config import load_sweep
from llem_ray.core.energy import Phase
from llem_ray.results.reader import read_table

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
WRITTEN = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES = [*WRITTEN, *sorted(DOCS.rglob("*.md"))]
RUN = "quickstart-c91ef73f"
"""The run that docs/dataset.md speaks of."""

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(path.read_text(encoding="utf-8")) if found == language]


def generate_docs(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "generate-docs"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


class TestGeneratedPages:
    def test_they_are_current(self) -> None:
        done = generate_docs("--check")
        assert done.returncode == 0, done.stdout + done.stderr

    def test_a_stale_missing_or_unknown_page_is_found(self, tmp_path: Path) -> None:
        assert generate_docs("--to", str(tmp_path)).returncode == 0
        assert generate_docs("--to", str(tmp_path), "--check").returncode == 0
        errors = tmp_path / "reference" / "errors.md"
        errors.write_text(errors.read_text(encoding="utf-8").replace("| 130 |", "| 131 |"), encoding="utf-8")
        (tmp_path / "reference" / "cli.md").unlink()
        (tmp_path / "reference" / "old.md").write_text("# Old\n", encoding="utf-8")
        done = generate_docs("--to", str(tmp_path), "--check")
        assert done.returncode == 1
        assert "-| 131 |" in done.stdout
        assert "+| 130 |" in done.stdout
        assert "+# Command line" in done.stdout
        assert "old.md: nothing writes this page" in done.stdout
        assert "3 of " in done.stderr

    def test_scripts_check_calls_it(self) -> None:
        assert "scripts/generate-docs --check" in (ROOT / "scripts" / "check").read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_relative_link_resolves(path: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert not broken


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
        todo += [(page.parent / link.partition("#")[0]).resolve() for link in links if not re.match(r"[a-z]+:|#", link)]
    assert set(PAGES) <= seen


def commands_in(text: str) -> Iterator[list[str]]:
    """Words after `llem-ray` wherever a command is shown: in code, or indented or fenced with nothing before it."""
    lines = [*re.findall(r"`([^`\n]+)`", text), *(line for line in text.splitlines() if line.startswith("    "))]
    lines += [line for _, block in FENCE.findall(text) for line in block.splitlines()]
    for line in lines:
        for part in re.split(r"&&|\|", line.partition(" # ")[0]):
            words = part.strip().removeprefix("$ ").removeprefix(".venv/bin/").split()
            if len(words) > 1 and words[0] == "llem-ray" and re.fullmatch(r"-{0,2}[a-z][a-z-]*", words[1]):
                yield words[1:]


def long_options(command: click.Command) -> set[str]:
    return {name for param in command.params for name in param.opts} | {"--help", "-h"}


@pytest.mark.parametrize("path", [path for path in PAGES if path.parent.name != "reference"], ids=page_id)
def test_every_command_and_option_shown_exists(path: Path) -> None:
    for name, *words in commands_in(path.read_text(encoding="utf-8")):
        if name.startswith("-"):
            assert name in long_options(cli)
            continue
        assert name in cli.commands, f"llem-ray {name}"
        own = words[: words.index("--")] if "--" in words else words
        shown = {word.strip("[]").partition("=")[0] for word in own if word.strip("[]").startswith("-")}
        assert shown <= long_options(cli.commands[name]), f"llem-ray {name} {' '.join(words)}"


def test_the_readme_shows_commands_at_all() -> None:
    names = {name for name, *_ in commands_in((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {"submit", "measure", "plan", "show"} <= names


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_script_and_sample_named_exists(path: Path) -> None:
    named = re.findall(r"(?<![\w/.])((?:scripts|configs)/[\w.-]*\w)", path.read_text(encoding="utf-8"))
    assert all((ROOT / name).exists() for name in named), named


def test_the_readme_s_sweep_loads(tmp_path: Path) -> None:
    excerpts = blocks(ROOT / "README.md", "yaml")
    assert excerpts
    for number, excerpt in enumerate(excerpts):
        path = tmp_path / f"sweep-{number}.yaml"
        path.write_text(excerpt, encoding="utf-8")
        sweep = load_sweep(path, environ={})
        assert len(sweep.cells) > 1


@pytest.mark.parametrize("page", ["README.md", "docs/slurm.md", "docs/docker.md"])
def test_every_override_shown_is_taken(tmp_path: Path, page: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("{schema_version: 1, name: shown, base: {model: {config: llama-tiny}}}", encoding="utf-8")
    shown = re.findall(r"--set\s+'?([\w.]+)=([^\s'`]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert shown
    for key, value in shown:
        load_sweep(path, overrides=[f"{key}={'fake' if value == '...' else value}"], environ={})


def test_the_readme_s_accuracy_is_that_of_the_method_page() -> None:
    claims = re.findall(r"(\d[\d.]*) to\s+(\d[\d.]*) %", (ROOT / "README.md").read_text(encoding="utf-8"))
    report = (DOCS / "method.md").read_text(encoding="utf-8").partition("bench-accuracy: begin")[2]
    assert len(claims) == 2
    for claim, row in zip(claims, ("counter difference", "llem-ray"), strict=True):
        lowest, highest = re.search(rf"^{row} +\S+ +([\d.]+)-([\d.]+) ", report, re.MULTILINE).groups()  # type: ignore[union-attr]
        assert claim == (f"{float(lowest):.2g}" if float(lowest) >= 1 else f"{float(lowest):.2f}", f"{float(highest):.2g}")


def test_every_benchmark_is_on_the_performance_page() -> None:
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    scripts = [path.name for path in (ROOT / "scripts").glob("bench-*")]
    assert scripts
    assert all(f"    .venv/bin/python scripts/{name}\n" in page for name in scripts)


def test_every_environment_variable_is_documented() -> None:
    folders = ("scripts", "cluster", "docker", ".ci")
    scripts = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    sources = [*(ROOT / "llem_ray").rglob("*.py"), *scripts]
    used = {name for path in sources for name in re.findall(r"\bLLEM_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8"))}
    documented = set(re.findall(r"\bLLEM_[A-Z_]+\b", (DOCS / "environment.md").read_text(encoding="utf-8")))
    set_by_ourselves = {"LLEM_RAY_FAKE_NVML_SCENARIO", "LLEM_RAY_EMBEDDED", "LLEM_RAY_ENGINE"}
    compose = set(re.findall(r"^(LLEM_[A-Z_]+)=", (ROOT / "docker" / ".env.example").read_text(encoding="utf-8"), re.MULTILINE))
    build_arguments = {"LLEM_RAY_VERSION"}
    assert used - documented <= set_by_ourselves | compose | build_arguments
    assert documented <= used


def test_the_ledger_s_phases_are_those_of_the_code() -> None:
    section = (DOCS / "method.md").read_text(encoding="utf-8").partition("## The ledger")[2].partition("\n## ")[0]
    assert set(get_args(Phase)) <= set(re.findall(r"`(\w+)`", section))


def test_pre_commit_hooks_need_no_network() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    assert all(hook["language"] == "system" for repo in config["repos"] for hook in repo["hooks"])


SWEEP = """
schema_version: 1
name: quickstart
base:
  model: {config: llama-tiny}
  engine: {backend: fake}
  workload: {input_tokens: 8, output_tokens: 8}
sweep:
  workload.batch_size: [1, 4]
repeats: 2
measure: {sources: [replay], min_window_s: 0.5, idle_baseline_s: 0.5, gates: {min_coverage: 0.01}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs/<RUN>`: the fake engine, measured by a recorded CPU package of 50 W to 150 W."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    energy_j, rows = 0.0, ["t_s,device_uuid,power_w,energy_j,scope"]
    for number in range(400):
        power_w = 50.0 + number % 21 * 5.0
        energy_j += power_w * 0.05
        rows.append(f"{number * 0.05:.2f},cpu-0,{power_w},{energy_j:.3f},cpu_package")
    (folder / "recording.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", "from llem_ray.cli.main import main; main()", "submit", "sweep.yaml", "--inline"],
        cwd=folder,
        env={**os.environ, "LLEM_RAY_REPLAY": "recording.csv", "LLEM_RAY_REPLAY_LOOP": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (folder / "runs").iterdir()
    shutil.move(made, folder / "runs" / RUN)
    return folder


EXAMPLES = blocks(DOCS / "dataset.md", "python")


def test_the_examples_are_of_every_reader() -> None:
    text = "\n".join(EXAMPLES)
    assert all(f"import {name}" in text for name in ("pyarrow.parquet", "duckdb", "pandas", "polars"))


def test_every_example_of_the_dataset_page_runs_and_agrees(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("POLARS_FMT_STR_LEN", "100")
    columns = ["batch_size", "joules_per_output_token", "power_valid"]
    rows = read_table(folder / "runs" / RUN, "trials", columns).to_pylist()
    assert all(row["power_valid"] for row in rows), "the examples leave out what is not valid"
    means = [sum(costs) / len(costs) for size in (1, 4) if (costs := [r[columns[1]] for r in rows if r[columns[0]] == size])]
    assert len(rows) == 4
    assert len(means) == 2
    names: dict[str, object] = {}
    agreeing = 0
    for example in EXAMPLES:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example, "docs/dataset.md", "exec"), names)
        text = printed.getvalue()
        assert text.strip(), example
        if "joules_per_output_token" in example:
            numbers = [float(number) for number in re.findall(r"\d+\.\d+(?:e-\d+)?", text)]
            agreeing += all(any(abs(number / mean - 1) < 1e-3 for number in numbers) for mean in means)
    assert agreeing == 4  # pyarrow, duckdb, pandas, polars
