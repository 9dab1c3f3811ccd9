"""The table of latencies and rates below a run's energies."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from llem_ray.reporting.intervals import LATENCIES
from llem_ray.reporting.latency import latency_table
from llem_ray.reporting.summary import LATENCY_COLUMNS, summarise_run
from llem_ray.results.schema import SCHEMAS


def row(batch: int, repeat: int, **more: Any) -> dict[str, Any]:
    return {
        "cell_id": f"c{batch}",
        "trial_id": f"c{batch}-r{repeat}",
        "status": "completed",
        "settings": json.dumps({"workload.batch_size": batch}),
        "ttft_s_p50": 0.0521 * (1 + repeat),
        "ttft_s_p99": 0.25,
        "tpot_s_p50": 0.011,
        "tpot_s_p99": 0.0194,
        "e2e_latency_s_p50": 1.5,
        "e2e_latency_s_p99": 2.25,
        "request_throughput_req_s": 12.5,
        "total_token_throughput_tok_s": 2048.0,
        "failed_requests": 0,
        **more,
    }


def render(rows: list[dict[str, Any]], width: int = 80) -> str:
    table = latency_table(summarise_run("run", rows))
    if table is None:
        return ""
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_percentiles_are_means_over_trials_and_the_columns_exist() -> None:
    text = render([row(4, 0), row(4, 1)])
    (ttft,) = [line for line in text.splitlines() if "TTFT ms" in line]
    assert "78 ±331" in ttft  # (52.1 + 104.2) / 2; 12.7062 x 36.84 / sqrt(2)
    assert "250" in ttft
    (tpot,) = [line for line in text.splitlines() if "TPOT ms" in line]
    assert tpot.split()[-2:] == ["11.0", "19.4"]
    (e2e,) = [line for line in text.splitlines() if "E2E ms" in line]
    assert e2e.split()[-2:] == ["1500", "2250"]
    assert "12.5" in text
    assert "2048" in text
    assert "all tok/s" in text  # tok/s of the other table leaves prompts out
    assert "good" not in text
    assert "Some requests failed" not in text
    assert "t-interval of the mean over a cell's repeats" in " ".join(text.split())
    assert set(LATENCY_COLUMNS) <= set(SCHEMAS["trials"].names)


def test_a_single_repeat_shows_the_interval_over_its_requests() -> None:
    text = render([row(4, 0, ttft_s_p50_lo=0.0501, ttft_s_p50_hi=0.0543, e2e_latency_s_p99=12.25)])
    assert "52.1 (50.1-54.3)" in text
    assert "95 % interval of a single repeat, over its requests" in text
    assert "±" not in text
    assert "E2E s" in text
    assert "12.2" in text


def test_gaps_between_tokens_are_shown_of_online_loads() -> None:
    gaps = {"inter_chunk_s_p50": 0.011, "inter_chunk_s_p99": 0.03, "inter_chunk_s_p99_lo": 0.02, "inter_chunk_s_p99_hi": 0.041}
    (line,) = [line for line in render([row(4, 0, run_s=3.0, **gaps)]).splitlines() if "ITL" in line]
    assert line.split() == ["ITL", "ms", "11.0", "30.0", "(20.0-41.0)"]
    assert "ITL" not in render([row(4, 0, **gaps)])


def test_a_single_repeat_without_an_interval_says_why() -> None:
    why = {"latency_interval_reason": "60 requests, p50 takes 100"}
    assert "No interval of a single repeat: 60 requests, p50 takes 100." in render([row(4, 0, **why)])
    assert "No interval" not in render([row(4, 0, **why), row(4, 1, **why)])


def test_goodput_failures_and_what_is_missing() -> None:
    good = {"goodput_req_s": 10.0, "slo_attainment": 0.8, "failed_requests": 3}
    text = render([row(4, 0, **good), row(8, 0, tpot_s_p50=None, tpot_s_p99=None, goodput_req_s=0.0, slo_attainment=0.0)])
    lines = [line.split() for line in text.splitlines()]
    assert ["10.0", "80%"] in [words[-2:] for words in lines]
    assert ["0", "0%"] in [words[-2:] for words in lines]
    assert ["TPOT", "ms", "-", "-"] in [words[-4:] for words in lines]
    assert "adj_*" in text


@pytest.mark.parametrize("width", [80, 100])
def test_labels_keep_their_words_beside_every_column(width: int) -> None:
    """With goodput and an interval everywhere, of cells that differ in three settings."""
    ends = {f"{name}_{end}": 0.123 for name in LATENCIES for end in ("lo", "hi")}
    settings = json.dumps({"workload.load.concurrency": 16, "model.dtype": "bfloat16", "engine.tensor_parallel": 2})
    other = json.dumps({"workload.load.concurrency": 8, "model.dtype": "float32", "engine.tensor_parallel": 1})
    more = {"goodput_req_s": 10.25, "slo_attainment": 0.875, "output_throughput_tok_s": 1234.5, **ends}
    single = [row(4, 0, settings=settings, **more), row(8, 0, settings=other, **more)]
    spread = [row(4, n, settings=settings, **{**more, "output_throughput_tok_s": 1234.5 + 10 * n}) for n in range(3)]
    for rows in (single, [*spread, *single[1:]]):
        text = render(rows, width)
        assert max(map(len, text.splitlines())) <= width
        words = text.split()
        assert words.count("concurrency=16") == words.count("dtype=bfloat16") == words.count("tensor_parallel=2") == 2


def test_nothing_where_no_trial_has_latencies() -> None:
    assert render([{"cell_id": "a", "trial_id": "a-r0", "status": "failed", "failure_kind": "hang", "settings": "{}"}]) == ""
