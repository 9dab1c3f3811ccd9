"""Loads of a pretended engine whose phases, and what each of them costs, are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llem_ray.energy.phase_split import StepTable
from llem_ray.testing.loads import Segment, SegmentLoad

BEGIN_S, END_S = 10.0, 40.0


@dataclass
class Served:
    """What a pretended engine did, and what it really spent on prefill, on decode and else."""

    load: SegmentLoad
    steps: StepTable
    prefill_j: float
    decode_j: float


def table(rows: list[tuple[float, float, int, int, bool]]) -> StepTable:
    begin, end, prefill, decode, mixed = (np.array(column) for column in zip(*rows, strict=True))
    return StepTable(begin_s=begin, end_s=end, prefill_tokens=prefill * 1.0, decode_tokens=decode * 1.0, mixed=mixed.astype(bool))


def batches(seed: int, *, wander: float = 0.03, pause_s: float = 0.01) -> Served:
    """Batch after batch: a prefill of 60 to 120 ms at 650 W, 20 to 60 decode steps at 400 W, a pause at 130 W."""
    rng, t, rows, segments, spent = np.random.default_rng(seed), BEGIN_S, [], [Segment(0.0, 90.0)], [0.0, 0.0]
    while t < END_S:
        length_s = rng.uniform(0.06, 0.12)
        power_w = 650.0 * (1 + wander * rng.normal())
        rows.append((t, t + length_s, 2048, 8, False))
        segments.append(Segment(t, power_w))
        spent[0] += power_w * (min(t + length_s, END_S) - t)
        t += length_s
        power_w = 400.0 * (1 + wander * rng.normal())
        segments.append(Segment(t, power_w))
        for _ in range(rng.integers(20, 60)):
            if t < END_S:
                spent[1] += power_w * (min(t + 0.01, END_S) - t)
            rows.append((t, t + 0.01, 0, 8, False))
            t += 0.01
        segments.append(Segment(t, 130.0))
        t += pause_s * rng.uniform(0.5, 1.5)
    return Served(SegmentLoad([*segments, Segment(t + 1e-6, 90.0)]), table(rows), *spent)


def mixing(seed: int) -> Served:
    """Continuous batching: each step costs 150 W of its time, 20 mJ a prompt token and 150 mJ an output token."""
    rng, t, rows, segments, spent = np.random.default_rng(seed), BEGIN_S, [], [Segment(0.0, 90.0)], [0.0, 0.0]
    running = 8
    while t < END_S:
        running = int(np.clip(running + rng.integers(-2, 3), 4, 32))
        prefill = int(rng.integers(100, 900)) if rng.random() < 0.25 else 0
        length_s = 0.012 + prefill * 4e-5 + running * 1e-4
        share = (min(t + length_s, END_S) - t) / length_s
        spent[0] += 0.02 * prefill * share
        spent[1] += 0.15 * running * share
        power_w = 150.0 + (0.02 * prefill + 0.15 * running) / length_s
        rows.append((t, t + length_s, prefill, running, prefill > 0))
        segments.append(Segment(t, power_w * (1 + 0.02 * rng.normal())))
        t += length_s
    return Served(SegmentLoad([*segments, Segment(t, 90.0)]), table(rows), *spent)
