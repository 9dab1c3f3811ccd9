from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import PromptSpec, WorkloadSpec
from llem_ray.workloads.prompt_files import PromptSet
from llem_ray.workloads.prompts import batches, build_requests, load_prompts

VOCAB = 1000
CONTEXT = 4096


def encode(texts: Sequence[str]) -> list[list[int]]:
    """A begin token, then one id a word, different for each word of the shipped prompts as far as the range goes."""
    return [[1, *(3 + sum(word.encode()) % (VOCAB - 3) for word in text.split())] for text in texts]


def texts(*prompts: str) -> PromptSet:
    return PromptSet(texts=prompts)


def build(workload: WorkloadSpec, prompts: Sequence[str] | None = None, context: int = CONTEXT) -> list[tuple[int, ...]]:
    chosen = load_prompts(workload.prompts) if prompts is None else PromptSet(texts=tuple(prompts))
    requests = build_requests(workload, encode, VOCAB, context, chosen, (0, 1, 2))
    assert [request.request_id for request in requests] == [str(index) for index in range(len(requests))]
    assert {request.max_new_tokens for request in requests} == {workload.output_tokens}
    return [request.prompt_token_ids for request in requests]


def test_shipped_prompts_vary_in_length() -> None:
    prompts = load_prompts(PromptSpec()).texts
    lengths = sorted(len(prompt.split()) for prompt in prompts)
    assert len(prompts) == len(set(prompts)) == 120
    assert lengths[0] <= 5
    assert lengths[-1] >= 150


def test_one_batch_unless_requests_are_asked_for() -> None:
    assert len(build(WorkloadSpec(batch_size=8))) == 8
    assert len(build(WorkloadSpec(batch_size=8, requests=20))) == 20


def test_natural_lengths_keep_whole_prompts() -> None:
    whole = {tuple(ids) for ids in encode(load_prompts(PromptSpec()).texts)}
    drawn = build(WorkloadSpec(requests=120))
    assert set(drawn) == whole
    assert drawn != [tuple(ids) for ids in encode(load_prompts(PromptSpec()).texts)]  # in an order of their own


def test_seed_decides() -> None:
    assert build(WorkloadSpec(requests=10, seed=3)) == build(WorkloadSpec(requests=10, seed=3))
    assert build(WorkloadSpec(requests=10, seed=3)) != build(WorkloadSpec(requests=10, seed=4))


def test_order_never_changes_with_a_library() -> None:
    prompts = [f"p{index}" for index in range(6)]
    drawn = build_requests(WorkloadSpec(requests=8, seed=0), lambda texts: [[int(t[1:])] for t in texts], 9, 99, texts(*prompts))
    assert [request.prompt_token_ids[0] for request in drawn] == [4, 2, 0, 5, 1, 3, 1, 3]


@given(
    input_tokens=st.integers(1, 300),
    count=st.integers(1, 12),
    seed=st.integers(0, 5),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
)
def test_exact_lengths_are_exact(input_tokens: int, count: int, seed: int, lengths: list[int]) -> None:
    prompts = [" ".join(f"w{row}" for _ in range(length)) for row, length in enumerate(lengths)]
    drawn = build(WorkloadSpec(requests=count, input_tokens=input_tokens, seed=seed), prompts)
    assert [len(ids) for ids in drawn] == [input_tokens] * count


def test_long_prompts_are_cut_and_short_ones_continued_with_the_next() -> None:
    prompts = ["a b c d e", "k l m n o"]
    whole = [tuple(ids) for ids in encode(prompts)]
    natural = build(WorkloadSpec(requests=2), prompts)
    assert sorted(natural) == sorted(whole)
    first, second = natural
    assert build(WorkloadSpec(requests=2, input_tokens=4), prompts) == [first[:4], second[:4]]
    assert build(WorkloadSpec(requests=2, input_tokens=9), prompts)[0] == first + second[:3]


def test_only_needed_prompts_are_encoded() -> None:
    seen: list[str] = []

    def recording(texts: Sequence[str]) -> list[list[int]]:
        seen.extend(texts)
        return encode(texts)

    build_requests(WorkloadSpec(requests=3), recording, VOCAB, CONTEXT, texts(*(f"text {index}" for index in range(10_000))))
    assert len(seen) == 3


def test_synthetic_prompts_are_exact_and_leave_special_ids_out() -> None:
    spec = WorkloadSpec(prompts=PromptSpec(source="synthetic"), input_tokens=500, requests=4, seed=1)
    drawn = build(spec, ())
    assert [len(ids) for ids in drawn] == [500] * 4
    assert len(set(drawn)) == 4
    assert min(min(ids) for ids in drawn) >= 3
    assert max(max(ids) for ids in drawn) < VOCAB
    assert drawn == build(spec, ())
    assert drawn != build(WorkloadSpec(prompts=spec.prompts, input_tokens=500, requests=4, seed=2), ())


def test_synthetic_prompts_need_a_length() -> None:
    with pytest.raises(ConfigError) as caught:
        build(WorkloadSpec(prompts=PromptSpec(source="synthetic")), ())
    assert caught.value.field == "workload.input_tokens"


@pytest.mark.parametrize("source", ["builtin", "synthetic"])
def test_exact_length_beyond_the_context_is_refused(source: str) -> None:
    spec = WorkloadSpec(prompts=PromptSpec(source=source), input_tokens=60, output_tokens=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"60 prompt \+ 5 output = 65 tokens") as caught:
        build(spec, context=64)
    assert "64" in str(caught.value.allowed)
    assert len(build(spec, context=65)[0]) == 60


def test_natural_prompt_beyond_the_context_is_named() -> None:
    with pytest.raises(ConfigError, match=r"prompt 0 is too long.*6 prompt \+ 10 output = 16"):
        build(WorkloadSpec(output_tokens=10), ["a b c d e"], context=15)


def test_tokenizer_of_another_model_is_noticed() -> None:
    with pytest.raises(ConfigError, match="beyond the model's vocabulary of 5") as caught:
        build_requests(WorkloadSpec(), encode, 5, CONTEXT, texts("one two"))
    assert caught.value.field == "model.tokenizer"


def test_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompt 0 has no tokens"):
        build_requests(WorkloadSpec(), lambda texts: [[] for _ in texts], VOCAB, CONTEXT, texts("x"))


@pytest.mark.parametrize(("count", "size", "sizes"), [(6, 2, [2, 2, 2]), (5, 2, [2, 2, 1]), (1, 4, [1])])
def test_batches_keep_order(count: int, size: int, sizes: list[int]) -> None:
    requests = build_requests(WorkloadSpec(requests=count), encode, VOCAB, CONTEXT, texts("one", "two"))
    grouped = list(batches(requests, size))
    assert [len(group) for group in grouped] == sizes
    assert tuple(request for group in grouped for request in group) == requests


def write(path: Path, *lines: str) -> PromptSpec:
    path.write_text("\n".join(lines), encoding="utf-8")
    return PromptSpec(source="file", path=path.name, column="text")


def test_file_holds_objects_or_strings(tmp_path: Path) -> None:
    spec = write(tmp_path / "p.jsonl", json.dumps({"text": "one\u2028two", "id": 1}, ensure_ascii=False), "", '"three"', "")
    assert load_prompts(spec, tmp_path).texts == ("one\u2028two", "three")


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        (['{"text": "a"}', '{"text": '], 2, "not JSON"),
        (['{"text": "a"}', "", '{"texts": "b"}'], 3, "has no column 'text'"),
        (['{"text": 5}'], 1, "is not a prompt"),
        (['{"text": "  "}'], 1, "is not a prompt"),
        (['{"text": "a"}', "null"], 2, "is not a prompt"),
        (['["a"]'], 1, "is not a prompt"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, lines: list[str], line: int, message: str) -> None:
    spec = write(tmp_path / "p.jsonl", *lines)
    with pytest.raises(ConfigError, match=message) as caught:
        load_prompts(spec, tmp_path)
    assert (caught.value.file, caught.value.line) == (str(tmp_path / "p.jsonl"), line)


def test_missing_column_gets_a_suggestion(tmp_path: Path) -> None:
    spec = write(tmp_path / "p.jsonl", '{"texts": "b", "id": 1}')
    with pytest.raises(ConfigError) as caught:
        load_prompts(spec, tmp_path)
    assert caught.value.hint == "did you mean `column: texts`?"
    assert caught.value.found == "columns texts, id"


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        load_prompts(write(tmp_path / "p.jsonl", text), tmp_path)


def test_missing_file_folder_and_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load_prompts(PromptSpec(source="file", path="none.jsonl"), tmp_path)
    assert caught.value.file == str(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompts(PromptSpec(source="file", path="."), tmp_path)
    (tmp_path / "b.jsonl").write_bytes(b'"a"\n"\xff"')
    with pytest.raises(ConfigError, match="not UTF-8") as caught:
        load_prompts(PromptSpec(source="file", path="b.jsonl"), tmp_path)
    assert caught.value.line == 2


@pytest.mark.parametrize(
    "spec", [PromptSpec(source="file"), PromptSpec(path="x.jsonl"), PromptSpec(source="synthetic", path="x.jsonl")]
)
def test_path_belongs_to_source_file(spec: PromptSpec) -> None:
    with pytest.raises(ConfigError) as caught:
        load_prompts(spec)
    assert caught.value.field == "workload.prompts.path"
