from __future__ import annotations

import pickle

from llem_ray.core.backend import StepEvent
from llem_ray.core.step_log import STEP_KINDS, StepLog


def step(number: int, **more: float) -> StepEvent:
    return StepEvent(
        begin_ns=10**15 + 3 * number,
        end_ns=10**15 + 3 * number + 2,
        kind=STEP_KINDS[number % 3],
        prefill_tokens=number,
        decode_tokens=2 * number,
        computed_tokens=4 * number,
        **more,
    )


def test_steps_are_kept_in_order_through_pickling_at_57_bytes_each() -> None:
    log = StepLog()
    for number in range(1000):
        log.add(step(number))
    data = pickle.dumps(log, protocol=5)
    assert len(data) < 57 * 1000 + 2000
    read = pickle.loads(data)
    assert len(read) == 1000
    assert (read.begin_ns[7], read.end_ns[7], STEP_KINDS[read.kind[7]]) == (10**15 + 21, 10**15 + 23, STEP_KINDS[1])
    assert (read.prefill_tokens[7], read.decode_tokens[7], read.computed_tokens[7]) == (7, 14, 28)


def test_what_the_engine_does_not_tell_is_not_a_number() -> None:
    log = StepLog()
    log.add(step(0))
    log.add(step(1, flops=6e9, read_bytes=0.0))
    assert log.flops[0] != log.flops[0]
    assert (log.flops[1], log.read_bytes[1]) == (6e9, 0.0)
