"""A window's energy shared out among its requests, by a named rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Final, Literal

RequestRule = Literal["phases", "total_tokens"]

BY_PHASES: Final[RequestRule] = "phases"
BY_TOTAL_TOKENS: Final[RequestRule] = "total_tokens"
_CORRECTED: Final = 4
_CORRECTIONS: Final = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseParts:
    """A window's energy by phase, J. The rest, positive or not, is the window's energy less these."""

    prefill_j: float
    decode_j: float


def share_energy(
    energy_j: float, prompt_tokens: Sequence[int], output_tokens: Sequence[int], parts: PhaseParts | None = None
) -> list[float]:
    """Energy of each request, J, never negative; the sum of all is ``energy_j``, to the last bit of ``math.fsum``.

    Without parts by prompt + output tokens (rule ``total_tokens``). With parts (rule ``phases``) prefill goes by prompt tokens,
    decode by output tokens, and the rest by both together; where prefill and decode exceed the window's energy, both are cut in
    proportion. A part without tokens joins the rest.

    Args:
        energy_j: Of the window.
        prompt_tokens: Of each request.
        output_tokens: Of each request.
        parts: What of it was prefill and decode.

    Returns:
        An empty list where there is no token to go by.
    """
    totals = [prompt + output for prompt, output in zip(prompt_tokens, output_tokens, strict=True)]
    if not sum(totals):
        return []
    shares = _shares(energy_j, totals)
    if parts is not None:
        prefill_j = parts.prefill_j if sum(prompt_tokens) else 0.0
        decode_j = parts.decode_j if sum(output_tokens) else 0.0
        cut = min(1.0, energy_j / (prefill_j + decode_j)) if prefill_j + decode_j > 0 else 1.0
        prefill_j, decode_j = prefill_j * cut, decode_j * cut
        rest = _shares(max(0.0, energy_j - prefill_j - decode_j), totals)
        prefill, decode = _shares(prefill_j, prompt_tokens), _shares(decode_j, output_tokens)
        shares = [sum(each) for each in zip(prefill, decode, rest, strict=True)]
    return _summing_to(energy_j, shares)


def _shares(energy_j: float, weights: Sequence[int]) -> list[float]:
    total = sum(weights)
    return [energy_j * (weight / total) if total else 0.0 for weight in weights]


def _summing_to(energy_j: float, shares: list[float]) -> list[float]:
    """Rounding goes to the largest share, or to the next ones, whose bits are finer, where the largest would only meet a tie."""
    for row in sorted(range(len(shares)), key=shares.__getitem__, reverse=True)[:_CORRECTED]:
        for _ in range(_CORRECTIONS):
            left_j = fsum([energy_j, *(-share for share in shares)])
            if left_j == 0:
                return shares
            shares[row] = max(0.0, shares[row] + left_j)
    return shares
