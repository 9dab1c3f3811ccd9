"""`submit --inline` with distributions, conversations and prompts of every source: what lands in the dataset."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SAMPLE = Path(__file__).parents[2] / "data" / "sharegpt.json"
SWEEP = """\
schema_version: 1
name: asked
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, engine_args: {prefill_ms: 0.1, decode_ms: 0.1}}
  workload: {output_tokens: 4, batch_size: 4}
experiments:
- workload:
    prompts: {source: synthetic}
    input_tokens: {distribution: lognormal, mean: 40, std: 20, max: 90}
    output_tokens: {distribution: empirical, path: lengths.csv}
    requests: 8
- workload:
    prompts: {source: file, path: chats.json, format: sharegpt, chat_template: true}
    output_tokens: {distribution: answer}
- workload: {prompts: {source: file, path: table.parquet, column: text}, shared_prefix_tokens: 10, turns: 2}
- workload: {prompts: {source: dataset, dataset: table.parquet, column: text}}
- workload:
    prompts: {source: file, path: chats.json, format: sharegpt}
    turns: recorded
    conversations: 3
    batch_size: 2
    output_tokens: {distribution: answer}
- workload:
    prompts: {source: file, path: chats.json, format: sharegpt, chat_template: true}
    turns: recorded
    conversations: 6
    batch_size: 1
    think_time_s: {distribution: uniform, min: 0.01, max: 0.03}
    load: {pattern: saturated, concurrency: 2}
repeats: 1
measure: {min_window_s: 0.01, idle_baseline_s: 0, edge_guard_s: 0, sources: [replay], gates: {min_coverage: 0.05}}
"""


def test_realised_lengths_are_recorded(llem, recording: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.yaml").write_text(SWEEP)
    (tmp_path / "lengths.csv").write_text("3\n9,2\n")
    shutil.copyfile(SAMPLE, tmp_path / "chats.json")
    pq.write_table(pa.table({"text": ["a b c", "d e", "f"]}), tmp_path / "table.parquet")
    ended = llem("submit", "--inline", "asked.yaml")
    assert ended.code == 0, ended
    (run,) = Path("runs").iterdir()
    trials = {row["cell_id"]: row for row in pq.read_table(run / "trials").to_pylist()}
    requests = pq.read_table(run / "requests").to_pylist()
    assert len(trials) == 6
    for row in trials.values():
        assert row["failure_message"] is None
        assert "token_count_mismatch" not in row["invalid_reasons"]
        mine = [request for request in requests if request["trial_id"] == row["trial_id"]]
        for name in ("prompt_tokens", "output_tokens"):
            lengths = [request[name] for request in mine]
            assert (row[f"{name}_min"], row[f"{name}_max"]) == (min(lengths), max(lengths))
            assert row[f"{name}_mean"] * len(mine) == sum(lengths) == row[name]
        assert all(request["output_tokens"] == request["output_tokens_requested"] for request in mine)

    replayed = {row["load_pattern"]: row for row in trials.values() if '"workload.turns":"recorded"' in row["settings"]}
    check_replay(replayed["batch"], requests)
    check_online_replay(replayed["saturated"], requests)
    by_source = {row["prompt_source"]: row for row in trials.values() if row["turns"] is not None}
    drawn, chats = by_source["synthetic"], by_source["chats.json"]
    assert drawn["input_tokens"] is drawn["output_tokens_requested"] is None
    assert 1 <= drawn["prompt_tokens_min"] < drawn["prompt_tokens_max"] <= 90
    assert (drawn["output_tokens_min"], drawn["output_tokens_max"]) == (3, 9)
    assert chats["output_tokens_min"] == 1
    conversations = next(row for row in trials.values() if '"workload.turns":2' in row["settings"])
    assert conversations["requests"] == 8 * conversations["passes"]
    assert conversations["prompt_tokens_max"] > 10 + 4


def check_replay(row: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    """The file's three conversations of 2, 1 and 1 turns, two at a time; answers are its own."""
    assert (row["turns"], row["turn_answers"], row["turns_max"]) == (None, "known", 2)
    assert row["conversations"] == 3 * row["passes"]
    assert row["turns_mean"] == pytest.approx(4 / 3)
    assert row["requests"] == 4 * row["passes"]
    mine = [request for request in requests if request["trial_id"] == row["trial_id"] and request["request_id"].startswith("0-")]
    (later,) = [request for request in mine if request["turn"] == 1]
    first = next(r for r in mine if r["conversation"] == later["conversation"] and r["turn"] == 0)
    assert first["prompt_tokens"] == 1 + 7  # How long does a green tea need?
    assert first["output_tokens"] == 10  # Two to three minutes, in water of about 75 degrees.
    assert later["prompt_tokens"] == 8 + 10 + 4  # And a black one?
    assert later["shared_prompt_tokens"] == 8


def check_online_replay(row: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    """Six conversations of 8 turns, each a time of its own after the answer before."""
    assert (row["turns"], row["turn_answers"], row["think_time_s"], row["conversations"]) == (None, "generated", None, 6)
    mine = {(r["conversation"], r["turn"]): r for r in requests if r["trial_id"] == row["trial_id"]}
    waits = [r["scheduled_ns"] - mine[number, turn - 1]["last_token_ns"] for (number, turn), r in mine.items() if turn]
    assert len(mine) == 8
    assert len(set(waits)) == 2
    assert all(10_000_000 <= wait_ns <= 30_000_000 for wait_ns in waits)
    for (number, turn), request in mine.items():
        if turn:
            before = mine[number, turn - 1]
            assert request["shared_prompt_tokens"] == before["prompt_tokens"] + before["output_tokens"]


def test_a_missing_file_is_refused_before_anything_runs(llem, recording: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.yaml").write_text(SWEEP)
    ended = llem("submit", "--inline", "asked.yaml")
    assert ended.code == 2
    assert "lengths.csv" in ended.err
    assert "the file of lengths does not exist" in ended.err
    assert not Path("runs").exists()
