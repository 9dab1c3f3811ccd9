"""Floating-point operations of a decoder-only model, from the lengths of what it served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FlopMethod = Literal["architecture", "parameters"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopModel:
    """What one token costs, by where it stands. A multiply-add is two operations; only matrix products count.

    Attention is counted over every pair of tokens of a prompt, masked pairs too, as torch's FlopCounterMode and vLLM do.
    """

    per_token: float
    """Products with weights of all layers, for each token computed."""
    per_output: float
    """The head, for each output token: a prompt needs it at its last token only."""
    per_pair: float = 0.0
    """Attention of all layers with full attention, for each pair of query and key."""
    per_pair_sliding: float = 0.0
    """The same of all layers with a sliding window."""
    window_tokens: int | None = None
    """Keys that a sliding window shows at most."""
    method: FlopMethod = "architecture"

    def prefill(self, prompt_tokens: int) -> float:
        """FLOP until the first output token."""
        pairs = prompt_tokens * prompt_tokens
        seen = prompt_tokens * self._shown(prompt_tokens)
        return prompt_tokens * self.per_token + self.per_output + pairs * self.per_pair + seen * self.per_pair_sliding

    def decode(self, prompt_tokens: int, begin: int, end: int) -> float:
        """FLOP of the output tokens after the ``begin``-th up to the ``end``-th, each over the keys up to its own.

        The first comes with the prefill: ``begin`` is 1 and more.
        """
        steps = max(0, end - begin)
        first, last = prompt_tokens + begin - 1, prompt_tokens + begin - 1 + steps
        pairs, seen = _sum_to(last) - _sum_to(first), self._shown_to(last) - self._shown_to(first)
        return steps * (self.per_token + self.per_output) + pairs * self.per_pair + seen * self.per_pair_sliding

    def request(self, prompt_tokens: int, output_tokens: int) -> float:
        """FLOP of a whole request; 0 for one that got no token."""
        return self.prefill(prompt_tokens) + self.decode(prompt_tokens, 1, output_tokens) if output_tokens else 0.0

    def _shown(self, keys: int) -> int:
        return keys if self.window_tokens is None else min(keys, self.window_tokens)

    def _shown_to(self, last: int) -> int:
        """Keys that a window shows to the tokens 1 to ``last``, together."""
        inside = self._shown(last)
        return _sum_to(inside) + (last - inside) * inside


def parameter_model(parameters: int) -> FlopModel:
    """The last resort: two operations for each parameter and token, whatever the architecture."""
    return FlopModel(per_token=2.0 * parameters, per_output=0.0, method="parameters")


def _sum_to(last: int) -> int:
    return last * (last + 1) // 2
