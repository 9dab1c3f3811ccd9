"""A window's energy, shared out among its requests."""

from __future__ import annotations

from math import fsum

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llem_ray.energy.request_share import PhaseParts, share_energy

TOKENS = st.integers(0, 100_000)
REQUESTS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=40)
JOULES = st.floats(1e-3, 1e9)


@given(JOULES, REQUESTS, st.none() | st.tuples(JOULES, JOULES))
@example(123927739.02743508, [(0, 1), (0, 14)], None)
def test_the_sum_is_the_windows_energy_exactly(energy_j, requests, parts) -> None:
    prompts, outputs = [prompt for prompt, _ in requests], [output for _, output in requests]
    phases = None if parts is None else PhaseParts(prefill_j=parts[0], decode_j=parts[1])
    shares = share_energy(energy_j, prompts, outputs, phases)
    if not any(map(any, requests)):
        assert shares == []
        return
    assert fsum(shares) == energy_j
    assert len(shares) == len(requests)
    assert min(shares) >= -1e-9 * energy_j
    assert all(
        share == pytest.approx(0, abs=1e-9 * energy_j) for share, tokens in zip(shares, requests, strict=True) if not any(tokens)
    )


def test_without_phases_by_all_tokens() -> None:
    assert share_energy(100.0, [10, 30], [10, 0], None) == pytest.approx([40.0, 60.0])


def test_with_phases_each_by_its_own_tokens() -> None:
    shares = share_energy(100.0, [10, 30], [30, 10], PhaseParts(prefill_j=40.0, decode_j=40.0))
    assert shares == pytest.approx([10 + 30 + 10, 30 + 10 + 10])


def test_phases_that_exceed_the_window_are_cut_in_proportion() -> None:
    shares = share_energy(100.0, [1, 0], [0, 1], PhaseParts(prefill_j=90.0, decode_j=30.0))
    assert shares == pytest.approx([75.0, 25.0])


def test_a_phase_without_tokens_joins_the_rest() -> None:
    assert share_energy(100.0, [3, 1], [0, 0], PhaseParts(prefill_j=60.0, decode_j=20.0)) == pytest.approx([75.0, 25.0])
