"""Chooses the next token: greedy, or by the same warpers in the same order as `generate`."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llem_ray.core.spec import SamplingSpec

NOT_FINITE = -1
"""Stands for the token of a row whose logits are NaN or Inf."""


class TokenSelector:
    """Picks one token for each row of logits. Draws are seeded anew for every batch.

    Args:
        sampling: Temperature 0 is greedy.
        device: Where the logits are.
    """

    def __init__(self, sampling: SamplingSpec, device: torch.device) -> None:
        self._greedy = sampling.temperature == 0
        self._warpers: list[Any] = []
        if self._greedy:
            return
        if sampling.temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k is not None:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))
        self._generator = torch.Generator(device).manual_seed(sampling.seed)

    def select(self, logits: torch.Tensor) -> torch.Tensor:
        """Token ids (rows,) of logits (rows, vocabulary); ``NOT_FINITE`` where a row's maximum is NaN or Inf.

        NaN counts as the largest of all and is not less than Inf, so the check looks at one number of each row; it comes before
        the draw because drawing from NaN kills a CUDA context.
        """
        best = logits.argmax(dim=-1, keepdim=True)
        finite = logits.gather(-1, best).abs() < torch.inf  # fewer kernels than isfinite()
        if not self._greedy:
            scores = torch.where(finite, logits.float(), 0.0)
            for warp in self._warpers:
                scores = warp(None, scores)
            best = torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=self._generator)
        return torch.where(finite, best, NOT_FINITE).squeeze(-1)

    def pick(self, logits: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """The same ids on the device, as a column (rows, 1), and on the host; marks may be on the host only.

        The host looks at the largest logits itself: on the CPU three more small kernels take longer, 0.3 % of a small model's
        step; on CUDA it waits for the ids anyway.
        """
        if not self._greedy:
            chosen = self.select(logits)
            return chosen[:, None], chosen.tolist()
        best = logits.argmax(dim=-1, keepdim=True)
        largest = logits.gather(-1, best).tolist()
        ids: list[int] = [token for [token] in best.tolist()]
        for row, [value] in enumerate(largest):
            if not math.isfinite(value):
                ids[row] = NOT_FINITE
        return best, ids
