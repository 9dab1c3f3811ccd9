from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llem_ray.reporting.loads import LOAD_PARTS, summarise_loads
from llem_ray.reporting.numbers import format_bytes
from llem_ray.reporting.summary import summarise_run
from llem_ray.reporting.tables import run_table
from llem_ray.results.schema import SCHEMAS

PARTS = [column for columns in LOAD_PARTS.values() for column in columns]


def load(backend: str = "vllm", **more: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"backend": backend, **dict.fromkeys(PARTS, 1.0), "compile_s": None, **more}
    return {"submit_to_first_token_s": sum(row[part] or 0.0 for part in PARTS), **row}


def failed(backend: str = "vllm") -> dict[str, Any]:
    return {"backend": backend, **dict.fromkeys(PARTS), "submit_to_first_token_s": None}


def test_the_parts_are_all_columns_of_the_way() -> None:
    names = SCHEMAS["loads"].names
    way = names[names.index("startup_s") : names.index("load_s")]
    assert sorted(PARTS) == sorted(way)


def test_means_of_parts_add_up_to_the_mean_of_the_whole() -> None:
    [summary] = summarise_loads([load(import_s=7.0), load(import_s=None, compile_s=5.0), failed()])
    assert (summary.loads, summary.failed) == (2, 1)
    assert (summary.parts_s["import"], summary.parts_s["compile"], summary.parts_s["idle baselines and guard"]) == (3.5, 2.5, 3.0)
    assert sum(value or 0.0 for value in summary.parts_s.values()) == pytest.approx(summary.submit_to_first_token_s)
    assert "(mean of 2 loads, 1 without one)" in summary.text()


def test_engines_stand_side_by_side_and_one_without_a_token_says_so() -> None:
    mine, other = summarise_loads([load("transformers", queue_s=0.001), failed(), failed()])
    assert mine.text().startswith("transformers: 13.00 s from submit to first token (1 load): startup 1.00, placement 1.00, ")
    assert "compile" not in mine.text()
    assert other.text() == "vllm: no first token after 2 loads"


def test_show_tells_loads_and_sizes() -> None:
    trial = {"cell_id": "c", "trial_id": "c-r0", "status": "completed", "settings": "{}"}
    console = Console(file=io.StringIO(), width=80)
    sizes = {"trials": 950, "steps": 12_340_000, "token_times": 4_000}
    console.print(run_table(summarise_run("demo", [trial], loads=[load()], dataset_bytes=sizes), Path("runs/demo")))
    assert isinstance(console.file, io.StringIO)
    text = " ".join(console.file.getvalue().split())
    assert "vllm: 14.00 s from submit to first token (1 load): " in text
    assert text.endswith("Dataset: runs/demo, 12.3 MB: steps 12.3 MB, token_times 4.00 kB, trials 950 B")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345_678, "12.3 MB"), (3 * 10**12, "3000 GB")]
)
def test_bytes_are_readable(size: int, text: str) -> None:
    assert format_bytes(size) == text
