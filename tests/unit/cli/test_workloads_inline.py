"""`submit --inline` with distributions, conversations and prompts of every source: what lands in the dataset."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

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
    assert len(trials) == 4
    for row in trials.values():
        assert row["failure_message"] is None
        assert "token_count_mismatch" not in row["invalid_reasons"]
        mine = [request for request in requests if request["trial_id"] == row["trial_id"]]
        for name in ("prompt_tokens", "output_tokens"):
            lengths = [request[name] for request in mine]
            assert (row[f"{name}_min"], row[f"{name}_max"]) == (min(lengths), max(lengths))
            assert row[f"{name}_mean"] * len(mine) == sum(lengths) == row[name]
        assert all(request["output_tokens"] == request["output_tokens_requested"] for request in mine)

    by_source = {row["prompt_source"]: row for row in trials.values()}
    drawn, chats = by_source["synthetic"], by_source["chats.json"]
    assert drawn["input_tokens"] is drawn["output_tokens_requested"] is None
    assert 1 <= drawn["prompt_tokens_min"] < drawn["prompt_tokens_max"] <= 90
    assert (drawn["output_tokens_min"], drawn["output_tokens_max"]) == (3, 9)
    assert chats["output_tokens_min"] == 1
    conversations = next(row for row in trials.values() if "turns" in row["settings"])
    assert conversations["requests"] == 8 * conversations["passes"]
    assert conversations["prompt_tokens_max"] > 10 + 4


def test_a_missing_file_is_refused_before_anything_runs(llem, recording: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.yaml").write_text(SWEEP)
    ended = llem("submit", "--inline", "asked.yaml")
    assert ended.code == 2
    assert "lengths.csv" in ended.err
    assert "the file of lengths does not exist" in ended.err
    assert not Path("runs").exists()
