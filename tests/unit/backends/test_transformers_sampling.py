"""Drawn tokens follow the distribution that temperature, top-k and top-p define."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from llem_ray.backends.transformers.sampling import NOT_FINITE, TokenSelector
from llem_ray.core.spec import SamplingSpec

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
DRAWS = 40_000


def expected(temperature: float, top_k: int | None, top_p: float) -> np.ndarray:
    """Softmax of scaled logits, k largest, then the smallest set whose probability reaches p."""
    scaled = LOGITS.double().numpy() / temperature
    keep = np.argsort(-scaled)[: top_k or len(scaled)]
    weights = np.zeros_like(scaled)
    weights[keep] = np.exp(scaled[keep])
    weights /= weights.sum()
    order = np.argsort(-weights)
    reached = np.cumsum(weights[order]) - weights[order] >= top_p
    weights[order[reached]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, 1.0), (0.5, None, 1.0), (2.0, 3, 1.0), (1.0, None, 0.75), (1.5, 4, 0.8)]
)
def test_draws_follow_the_distribution(temperature: float, top_k: int | None, top_p: float) -> None:
    selector = TokenSelector(SamplingSpec(temperature=temperature, top_k=top_k, top_p=top_p, seed=11), CPU)
    counts = torch.bincount(selector.select(LOGITS.expand(DRAWS, -1)), minlength=len(LOGITS)).numpy()
    probabilities = expected(temperature, top_k, top_p)
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], probabilities[possible] * DRAWS).pvalue > 1e-3


def test_greedy_takes_the_first_of_equals_like_argmax() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, 1.0, 1.0]])
    assert TokenSelector(SamplingSpec(), CPU).select(logits).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("sampling", [SamplingSpec(), SamplingSpec(temperature=0.8, top_p=0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_row_is_marked_and_the_others_are_drawn(sampling: SamplingSpec, bad: float) -> None:
    logits = torch.tensor([[0.0, 9.0], [bad, 0.0], [9.0, 0.0]])
    chosen = TokenSelector(sampling, CPU).select(logits).tolist()
    assert chosen == [1, NOT_FINITE, 0]


@pytest.mark.parametrize("sampling", [SamplingSpec(), SamplingSpec(temperature=0.8, seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_a_pick_is_what_is_selected_on_the_device_and_on_the_host(sampling: SamplingSpec, bad: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 9.0], [bad] * 3, [9.0, 0.0, 1.0]])
    column, ids = TokenSelector(sampling, CPU).pick(logits)
    assert ids == TokenSelector(sampling, CPU).select(logits).tolist()
    assert column.shape == (3, 1)
    assert [token for [token] in column[::2].tolist()] == ids[::2]
