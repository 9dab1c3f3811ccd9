"""Logits of small models of every family that may be split over stages, against those of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
import transformers
from gang import ADDRESS
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from llem_ray.backends.transformers.decoding import PaddedBatch
from llem_ray.backends.transformers.pipeline import PIPELINE_MODELS
from llem_ray.backends.transformers.process_group import ProcessGroup
from llem_ray.core.ports import reserve_port

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 12}
OWN: dict[str, dict[str, Any]] = {
    "mistral": WINDOW,
    "ministral": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "exaone4": WINDOW,
    "olmo3": WINDOW,
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": WINDOW | {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
PROMPTS = [list(range(5, 12)), [40, 41, 42], list(range(100, 120))]  # padded, and longer than the window
STEPS = 8


def logits_of(model: Any) -> torch.Tensor:
    batch = PaddedBatch(model, PROMPTS, STEPS, 255)
    found = [batch.forward()]
    for step in range(1, STEPS):
        batch.feed([3 + step, 50 + step, 200 + step])
        found.append(batch.forward())
    return torch.stack(found)


def compare(rank: int, folder: str, names: list[str], port: int, answers: Any) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    group = ProcessGroup("gloo", rank, 2, torch.device("cpu"), ADDRESS, 60.0)
    address = group.host(port) if rank == 0 else [ADDRESS, port]
    group.join(*address)
    for name in names:
        whole = AutoModelForCausalLM.from_pretrained(Path(folder, name), dtype=torch.float32).eval()
        half = AutoModelForCausalLM.from_pretrained(
            Path(folder, name), dtype=torch.float32, distributed_config=DistributedConfig(pp_size=2)
        ).eval()
        expected, found = logits_of(whole), logits_of(half)
        answers.put((name, rank, float((found - expected).abs().max() / expected.std())))
    group.close()


@pytest.mark.slow
def test_two_stages_compute_what_one_does(tmp_path: Path) -> None:
    names = sorted(PIPELINE_MODELS)
    for name in names:
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **(SHAPE | OWN.get(name, {})))
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / name)
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    context = torch.multiprocessing.spawn(compare, args=(str(tmp_path), names, reserve_port(), answers), nprocs=2, join=False)
    found = {}
    while len(found) < 2 * len(names):
        if answers.empty():
            assert not context.join(timeout=0.2) or not answers.empty()
            continue
        name, rank, difference = answers.get()
        found[name, rank] = difference
    assert {key: value for key, value in found.items() if not value < 1e-5} == {}
    while not context.join(timeout=10):
        pass
