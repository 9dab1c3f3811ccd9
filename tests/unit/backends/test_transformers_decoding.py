"""The decode loop against transformers' own `generate` on the same model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from llem_ray.backends.transformers.decoding import generate_batch
from llem_ray.core.backend import Request, RequestRecord, StepEvent
from llem_ray.core.errors import NumericsError
from llem_ray.core.spec import SamplingSpec

CONTEXT = 128
VOCAB = 512


def _build(attention: str = "sdpa") -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    return _build()


def prompts_of(lengths: list[int], seed: int = 1) -> list[tuple[int, ...]]:
    draws = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, VOCAB, (length,), generator=draws).tolist()) for length in lengths]


def requests_of(prompts: list[tuple[int, ...]], new_tokens: int | list[int], ignore_eos: bool = True) -> list[Request]:
    counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    return [
        Request(request_id=str(row), prompt_token_ids=prompt, max_new_tokens=count, ignore_eos=ignore_eos)
        for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]


def ours(
    model: Any, requests: list[Request], sampling: SamplingSpec | None = None, eos: frozenset[int] = frozenset()
) -> tuple[list[StepEvent], list[RequestRecord]]:
    events = list(generate_batch(model, requests, sampling or SamplingSpec(), eos, CONTEXT - 1))
    return [e for e in events if isinstance(e, StepEvent)], [e for e in events if isinstance(e, RequestRecord)]


def theirs(model: Any, prompts: list[tuple[int, ...]], new_tokens: int, **options: Any) -> list[list[int]]:
    padded = max(map(len, prompts))
    ids = torch.tensor([[0] * (padded - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (padded - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "eos_token_id": None} | options
    output = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=0, **options)
    return output[:, padded:].tolist()


SHAPES = [[6], [5, 5, 5, 5], [1, 17], [3, 30, 11, 7, 2, 19]]


@pytest.mark.parametrize("lengths", SHAPES, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_tokens_equal_generate(lengths: list[int], attention: str) -> None:
    model = _build(attention)
    prompts = prompts_of(lengths)
    _, records = ours(model, requests_of(prompts, 40))
    assert [list(record.output_token_ids) for record in records] == theirs(model, prompts, 40)
    assert len({token for record in records for token in record.output_token_ids}) > 20  # not one token repeated


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSpec(temperature=1.0, seed=3),
        SamplingSpec(temperature=0.7, seed=4),
        SamplingSpec(temperature=1.3, top_k=20, seed=5),
        SamplingSpec(temperature=0.9, top_p=0.8, seed=6),
        SamplingSpec(temperature=1.1, top_k=50, top_p=0.6, seed=7),
    ],
    ids=str,
)
def test_sampled_tokens_equal_generate_with_the_same_draws(model: Any, sampling: SamplingSpec) -> None:
    prompts = prompts_of([4, 13, 9])
    _, records = ours(model, requests_of(prompts, 30), sampling)
    torch.manual_seed(sampling.seed)
    expected = theirs(
        model, prompts, 30, do_sample=True, temperature=sampling.temperature, top_k=sampling.top_k or 0, top_p=sampling.top_p
    )
    assert [list(record.output_token_ids) for record in records] == expected


def test_model_with_learned_positions_equals_generate() -> None:
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=24, initializer_range=0.2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prompts = prompts_of([3, 12])
    events = generate_batch(model, requests_of(prompts, 10), SamplingSpec(), frozenset(), 23)
    records = [event for event in events if isinstance(event, RequestRecord)]
    assert [list(record.output_token_ids) for record in records] == theirs(model, prompts, 10)


def test_rows_that_ended_never_leave_the_position_table() -> None:
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=24, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prompts = prompts_of([20, 2])
    events = generate_batch(model, requests_of(prompts, [4, 20]), SamplingSpec(), frozenset(), 23)
    assert [event.output_tokens for event in events if isinstance(event, RequestRecord)] == [4, 20]


def test_end_token_stops_its_row_only(model: Any) -> None:
    prompts = prompts_of([6, 9, 4])
    _, free = ours(model, requests_of(prompts, 24))
    end = next(t for t in free[0].output_token_ids[3:] if all(t not in other.output_token_ids for other in free[1:]))
    at = free[0].output_token_ids.index(end)

    steps, records = ours(model, requests_of(prompts, 24, ignore_eos=False), eos=frozenset({end}))
    assert records[0].output_token_ids == free[0].output_token_ids[: at + 1]
    assert [record.finish_reason for record in records] == ["stop", "length", "length"]
    assert [record.output_token_ids for record in records[1:]] == [record.output_token_ids for record in free[1:]]
    assert [step.decode_tokens for step in steps] == [3] * (at + 1) + [2] * (24 - at - 1)
    assert {step.computed_tokens for step in steps[1:]} == {3}

    expected = theirs(model, prompts, 24, eos_token_id=end)
    assert list(records[0].output_token_ids) == expected[0][: at + 1]


def test_batch_ends_when_every_row_has_met_an_end_token(model: Any) -> None:
    prompts = prompts_of([6, 9])
    _, free = ours(model, requests_of(prompts, 24))
    ends = frozenset(record.output_token_ids[2] for record in free)
    steps, records = ours(model, requests_of(prompts, 24, ignore_eos=False), eos=ends)
    assert len(steps) == max(record.output_tokens for record in records) <= 3


def test_end_token_is_ignored_when_asked(model: Any) -> None:
    prompts = prompts_of([6])
    _, free = ours(model, requests_of(prompts, 12))
    _, records = ours(model, requests_of(prompts, 12), eos=frozenset(free[0].output_token_ids))
    assert records[0].output_token_ids == free[0].output_token_ids
    assert records[0].finish_reason == "length"


def test_padding_is_counted_apart(model: Any) -> None:
    steps, records = ours(model, requests_of(prompts_of([3, 10]), [2, 5]))
    assert (steps[0].kind, steps[0].prefill_tokens, steps[0].decode_tokens, steps[0].computed_tokens) == ("prefill", 13, 2, 20)
    assert [(step.decode_tokens, step.computed_tokens) for step in steps[1:]] == [(2, 2), (1, 2), (1, 2), (1, 2)]
    assert [(record.prompt_tokens, record.padded_tokens) for record in records] == [(3, 10), (10, 10)]


def test_tokens_do_not_depend_on_the_neighbours(model: Any) -> None:
    prompts = prompts_of([5, 21, 8])
    _, together = ours(model, requests_of(prompts, 20))
    alone = [ours(model, requests_of([prompt], 20))[1][0] for prompt in prompts]
    assert [record.output_token_ids for record in together] == [record.output_token_ids for record in alone]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [SamplingSpec(), SamplingSpec(temperature=1.0, top_k=5)], ids=["greedy", "sampled"])
def test_poisoned_weight_is_a_numerics_error(poison: float, sampling: SamplingSpec) -> None:
    model = _build()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5, 7] = poison
    with pytest.raises(NumericsError, match="request 0, output token 0"):
        ours(model, requests_of(prompts_of([4, 4]), 3), sampling)


def test_one_poisoned_row_is_named(model: Any) -> None:
    broken = _build()
    with torch.no_grad():
        broken.model.embed_tokens.weight[400] = float("nan")
        broken.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    prompts = [(5, 6, 7), (5, 400, 7)]
    with pytest.raises(NumericsError, match="request 1"):
        ours(broken, requests_of(prompts, 3))


def test_inference_mode_does_not_leak_into_the_consumer(model: Any, tmp_path: Path) -> None:
    for _ in generate_batch(model, requests_of(prompts_of([4]), 3), SamplingSpec(), frozenset(), CONTEXT - 1):
        assert not torch.is_inference_mode_enabled()
