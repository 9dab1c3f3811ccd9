"""FLOP by formula against torch's counter on the real model code, and against what vLLM said of the same model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from llem_ray.backends.flop_formula import EXPERTS, GATED, PLAIN, flop_model
from llem_ray.core.flops import FlopModel, parameter_model

PROMPT, STEPS = 48, 2
SHAPE = {
    "vocab_size": 640,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
LLAMA_OF_VLLM = SHAPE | {
    "num_hidden_layers": 4,
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in sorted(GATED | PLAIN)},
    "gpt2": {"num_key_value_heads": None, "intermediate_size": None, "n_inner": 500},
    "opt": {"num_key_value_heads": None, "intermediate_size": None, "ffn_dim": 500, "word_embed_proj_dim": 192},
    "gpt_neox": {"num_key_value_heads": None},
    "qwen3": {"head_dim": 64},
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "sliding_window": 32},
    "gemma3_text": {"head_dim": 64, "sliding_window": 32},
    "mistral": {"sliding_window": 32},
    "qwen2": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 160, "mlp_only_layers": [1]},
    "qwen3_moe": {**MOE, "decoder_sparse_step": 2},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
}


def tiny(family: str) -> Any:
    values = {name: value for name, value in {**SHAPE, **FAMILIES[family]}.items() if value is not None or name == "pad_token_id"}
    return AutoConfig.for_model(family, **values)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def counted(config: Any, *, prompt: int = PROMPT) -> list[int]:
    """FLOP of a prefill and of some decode steps by torch's counter, eager attention."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    found, cache, ids = [], None, torch.randint(3, config.vocab_size, (1, prompt))
    for _ in range(1 + STEPS):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.append(counter.get_total_flops())
        cache, ids = output.past_key_values, torch.tensor([[5]])
    return found


def formula(model: FlopModel, prompt: int = PROMPT) -> list[float]:
    until = [model.prefill(prompt), *(model.request(prompt, 1 + step) for step in range(1, 1 + STEPS))]
    return [until[0], *(after - before for before, after in pairwise(until))]


def test_every_listed_family_is_compared() -> None:
    assert set(FAMILIES) == GATED | PLAIN | EXPERTS


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_formula_is_what_torch_counts(family: str) -> None:
    config = tiny(family)
    model = flop_model(config.get_text_config())
    assert model is not None
    seen = counted(config)
    expected = formula(model)
    # Eager attention computes all pairs of a prompt and masks those beyond the window, which the formula leaves out.
    hidden = PROMPT * max(0, PROMPT - (model.window_tokens or PROMPT))
    expected[0] += hidden * model.per_pair_sliding
    assert seen == pytest.approx(expected, rel=1e-3)


def test_an_unknown_family_has_none() -> None:
    assert flop_model(AutoConfig.for_model("bloom")) is None


def test_a_small_llama_costs_what_vllm_counts() -> None:
    """vLLM 0.32 counts 738,721,792 FLOP for a prompt of 128 tokens and 6,295,552 for the token after its first."""
    model = flop_model(AutoConfig.for_model("llama", **LLAMA_OF_VLLM))
    assert model is not None
    assert model.prefill(128) == 738_721_792
    assert model.decode(128, 1, 2) == 6_295_552


def test_a_window_shows_no_more_keys_than_it_has() -> None:
    model = FlopModel(per_token=0.0, per_output=0.0, per_pair_sliding=1.0, window_tokens=4)
    assert model.prefill(3) == 9
    assert model.prefill(6) == 24
    assert model.decode(2, 1, 5) == 3 + 4 + 4 + 4
    assert model.decode(2, 1, 3) + model.decode(2, 3, 5) == model.decode(2, 1, 5)
    assert model.request(6, 1) == model.prefill(6)


def test_the_last_resort_is_two_for_each_parameter_and_token() -> None:
    model = parameter_model(1000)
    assert (model.method, model.request(10, 6), model.request(10, 0)) == ("parameters", 2 * 1000 * 15, 0.0)
