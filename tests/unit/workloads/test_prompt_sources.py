"""Prompts from Parquet files, ShareGPT files and the `datasets` library."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llem_ray.core.backend import ChatMessage
from llem_ray.core.errors import ConfigError, PluginError
from llem_ray.core.plugins import install_command
from llem_ray.core.workload_spec import LengthSpec, PromptSpec, WorkloadSpec
from llem_ray.workloads.prompt_files import PromptSet
from llem_ray.workloads.prompts import build_requests, load_prompts

SAMPLE = Path(__file__).parents[2] / "data" / "sharegpt.json"
FIRST_TURNS = PromptSet(
    texts=("How long does a green tea need?", "Name a prime number above ninety.", "Which is the longest river of Europe?"),
    answers=("Two to three minutes, in water of about 75 degrees.", "97", "The Volga."),
)


def encode(texts: Sequence[str]) -> list[list[int]]:
    """A begin token (1), then one id for each word."""
    return [[1, *(3 + sum(word.encode()) % 997 for word in text.split())] for text in texts]


def refused(spec: PromptSpec, folder: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_prompts(spec, folder)
    return caught.value


class TestParquet:
    @pytest.fixture
    def table(self, tmp_path: Path) -> Path:
        columns = {"question": ["a b", "c", "d e f"], "reply": ["x", "y z", "w"], "n": [1, 2, 3]}
        pq.write_table(pa.table(columns), tmp_path / "p.parquet", row_group_size=2)
        return tmp_path

    def test_a_column_and_its_answers(self, table: Path) -> None:
        spec = PromptSpec(source="file", path="p.parquet", column="question")
        assert load_prompts(spec, table) == PromptSet(texts=("a b", "c", "d e f"))
        both = PromptSpec(source="file", path="p.parquet", column="question", answer_column="reply", limit=2)
        assert load_prompts(both, table) == PromptSet(texts=("a b", "c"), answers=("x", "y z"))

    def test_a_missing_column_gets_a_suggestion(self, table: Path) -> None:
        error = refused(PromptSpec(source="file", path="p.parquet", column="questions"), table)
        assert error.hint == "did you mean `column: question`?"
        assert error.found == "columns question, reply, n"
        assert (error.file, error.field) == (str(table / "p.parquet"), "workload.prompts.column")
        answer = refused(PromptSpec(source="file", path="p.parquet", column="question", answer_column="relpy"), table)
        assert (answer.field, answer.hint) == ("workload.prompts.answer_column", "did you mean `answer_column: reply`?")

    def test_rows_that_are_no_prompts(self, table: Path) -> None:
        error = refused(PromptSpec(source="file", path="p.parquet", column="n"), table)
        assert error.message == "row 0: is not a prompt"
        pq.write_table(pa.table({"prompt": ["a", None]}), table / "null.parquet")
        assert refused(PromptSpec(source="file", path="null.parquet"), table).message == "row 1: is not a prompt"

    def test_an_empty_missing_or_broken_file(self, table: Path) -> None:
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), table / "empty.parquet")
        assert "is empty" in refused(PromptSpec(source="file", path="empty.parquet"), table).message
        assert "does not exist" in refused(PromptSpec(source="file", path="none.parquet"), table).message
        (table / "text.parquet").write_text("not a table")
        error = refused(PromptSpec(source="file", path="text.parquet"), table)
        assert "cannot be read" in error.message
        assert error.file == str(table / "text.parquet")


class TestShareGpt:
    SPEC = PromptSpec(source="file", path="s.json", format="sharegpt")

    def test_first_human_turns_and_their_answers(self, tmp_path: Path) -> None:
        shutil.copyfile(SAMPLE, tmp_path / "s.json")
        assert load_prompts(self.SPEC, tmp_path) == FIRST_TURNS

    def test_one_conversation_a_line_is_the_same(self, tmp_path: Path) -> None:
        lines = [json.dumps(entry) for entry in json.loads(SAMPLE.read_text(encoding="utf-8"))]
        (tmp_path / "s.json").write_text("\n".join(lines))
        assert load_prompts(self.SPEC, tmp_path) == FIRST_TURNS

    def test_outputs_as_long_as_the_answers(self) -> None:
        workload = WorkloadSpec(prompts=self.SPEC, output_tokens=LengthSpec(distribution="answer", max=6), requests=3)
        requests = build_requests(workload, encode, 1000, 100, FIRST_TURNS, (0, 1, 2))
        answers = FIRST_TURNS.answers or ()
        words = {tuple(ids): len(answer.split()) for ids, answer in zip(encode(FIRST_TURNS.texts), answers, strict=True)}
        drawn = {request.prompt_token_ids: request.max_new_tokens for request in requests}
        assert drawn == {ids: min(length, 6) for ids, length in words.items()}
        assert sorted(request.max_new_tokens for request in requests) == [1, 2, 6]

    @pytest.mark.parametrize(
        ("text", "line", "says"),
        [
            ('[\n{"conversations": []},\n{"id": 1}\n]', 3, "has no list of conversations"),
            ('[\n{"conversations": [{"from": "human"}]}\n]', 2, "has a turn that is none"),
            ('[\n{"conversations": []},\n{"conv', 3, "not JSON"),
            ('[\n{"conversations": []}\n', 3, "not JSON"),
            ('{"conversations": []}\n7', 2, "has no list of conversations"),
        ],
    )
    def test_a_bad_entry_is_named_by_its_line(self, tmp_path: Path, text: str, line: int, says: str) -> None:
        (tmp_path / "s.json").write_text(text)
        error = refused(self.SPEC, tmp_path)
        assert says in error.message
        assert (error.file, error.line) == (str(tmp_path / "s.json"), line)

    def test_conversations_taken_for_plain_prompts_are_told_of(self, tmp_path: Path) -> None:
        """A JSON list is read in either form."""
        (tmp_path / "s.json").write_text(SAMPLE.read_text(encoding="utf-8"))
        error = refused(PromptSpec(source="file", path="s.json"), tmp_path)
        assert (error.line, error.hint) == (2, "set workload.prompts.format: sharegpt")
        (tmp_path / "s.json").write_text('[{"prompt": "a b"},\n "c"]')
        assert load_prompts(PromptSpec(source="file", path="s.json"), tmp_path).texts == ("a b", "c")

    def test_nothing_to_ask_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "s.json").write_text('[{"conversations": []}]')
        assert refused(self.SPEC, tmp_path).allowed == "at least one human turn with an answer"


class TestDatasets:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))

    def spec(self, dataset: str, **changes: Any) -> PromptSpec:
        return PromptSpec(source="dataset", dataset=dataset, **changes)

    def test_a_local_file(self, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_text('{"prompt": "a b", "id": 1}\n{"prompt": "c", "id": 2}\n{"prompt": "d", "id": 3}\n')
        assert load_prompts(self.spec("p.jsonl"), tmp_path).texts == ("a b", "c", "d")
        assert load_prompts(self.spec("p.jsonl", split="train[1:]", limit=1), tmp_path).texts == ("c",)

    def test_a_folder_with_splits(self, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        for split in ("train", "test"):
            (folder / f"{split}.csv").write_text(f"text,answer\nfrom {split},yes\n")
        spec = self.spec("./set", split="test", column="text", answer_column="answer")
        assert load_prompts(spec, tmp_path) == PromptSet(texts=("from test",), answers=("yes",))

    def test_a_saved_data_set(self, tmp_path: Path) -> None:
        chat = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
        table = datasets.Dataset.from_dict({"conversations": [chat]})
        datasets.DatasetDict({"dev": table}).save_to_disk(str(tmp_path / "saved"))
        spec = self.spec("saved", split="dev", format="sharegpt")
        assert load_prompts(spec, tmp_path) == PromptSet(texts=("q",), answers=("a",))
        error = refused(self.spec("saved", split="train"), tmp_path)
        assert (error.field, error.found, error.allowed) == ("workload.prompts.split", "train", "dev")

    @pytest.mark.parametrize(
        ("changes", "field", "found", "says"),
        [
            ({"split": "test"}, "split", "test", "Should be one of ['train']"),
            ({"column": "promt"}, "column", "columns prompt", "has no column 'promt'"),
            ({"format": "sharegpt"}, "column", "columns prompt", "has no column 'conversations'"),
            ({"dataset": "none.jsonl"}, "dataset", "none.jsonl", "does not exist"),
            ({"dataset": "./none"}, "dataset", "./none", "does not exist"),
            ({"dataset": "p.xyz"}, "dataset", ".xyz", "not a data file"),
            ({"dataset": "empty.jsonl"}, "dataset", "empty.jsonl", "it is empty"),
            ({"dataset": "broken.jsonl"}, "dataset", "broken.jsonl", "JSON parse error"),
            ({"dataset": "folder", "config": "large"}, "config", "large", "'large' not found"),
            ({"dataset": "nobody/nothing"}, "dataset", "nobody/nothing", "nobody/nothing"),
        ],
    )
    def test_what_is_not_there(self, tmp_path: Path, changes: dict[str, str], field: str, found: str, says: str) -> None:
        (tmp_path / "folder").mkdir()
        for name in ("p.jsonl", "p.xyz", "folder/p.jsonl"):
            (tmp_path / name).write_text('{"prompt": "a"}\n')
        (tmp_path / "empty.jsonl").write_text("")
        (tmp_path / "broken.jsonl").write_text('{"prompt": ')
        error = refused(self.spec(**{"dataset": "p.jsonl", **changes}), tmp_path)  # type: ignore[arg-type]
        assert says in error.message
        assert (error.field, error.found) == (f"workload.prompts.{field}", found)

    def test_without_the_library_the_extra_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def missing(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == "datasets":
                raise ImportError("No module named 'datasets'")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", missing)
        with pytest.raises(PluginError) as caught:
            load_prompts(self.spec("a/b"), tmp_path)
        assert caught.value.hint == install_command("datasets")


class TestChatTemplates:
    WORKLOAD = WorkloadSpec(prompts=PromptSpec(chat_template=True), requests=2)
    PROMPTS = PromptSet(texts=("one two", "three"))

    def test_each_prompt_is_a_users_message(self) -> None:
        seen: list[Sequence[ChatMessage]] = []

        def render(chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
            seen.extend(chats)
            return [[7, 8, len(chat[0].content)] for chat in chats]

        requests = build_requests(self.WORKLOAD, encode, 1000, 100, self.PROMPTS, encode_chats=render)
        assert sorted(seen) == [[("user", "one two")], [("user", "three")]]
        assert {request.prompt_token_ids for request in requests} == {(7, 8, 7), (7, 8, 5)}

    def test_an_engine_without_templates_refuses(self) -> None:
        with pytest.raises(ConfigError, match="renders no chat templates") as caught:
            build_requests(self.WORKLOAD, encode, 1000, 100, self.PROMPTS)
        assert caught.value.field == "workload.prompts.chat_template"
