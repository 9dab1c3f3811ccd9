from __future__ import annotations

import dataclasses
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llem_ray.core.power import DeviceState, SampleBatch
from llem_ray.power.traces import BLOCK_ROWS, MAX_BEYOND, TraceBuffer

UUIDS = ("a", "b")


def batch(rows, seq=1, epoch=1, node="n0", errors=None, states=()):
    """rows: (device index, t_ns) pairs; every reading is made from t_ns."""
    device = np.array([d for d, _ in rows], np.int32)
    t_ns = np.array([t for _, t in rows], np.int64)
    return SampleBatch(
        node=node,
        epoch=epoch,
        seq=seq,
        devices=UUIDS,
        device=device,
        t_ns=t_ns,
        hw_ns=t_ns + 1,
        power_mw=t_ns * 1.0,
        power_avg_mw=t_ns * 2.0,
        energy_mj=t_ns * 3.0,
        errors=errors or {},
        states=states,
    )


def steady(seq, n=100, period_ns=50):
    begin = (seq - 1) * n
    return batch([(d, (begin + i) * period_ns) for i in range(n) for d in (0, 1)], seq)


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 60)), max_size=60),
    st.lists(st.integers(1, 15), min_size=1, max_size=10),
    st.randoms(use_true_random=False),
    st.tuples(st.integers(-5, 65), st.integers(-5, 65)),
    st.integers(0, 60),
)
def test_like_a_sorted_set(rows, sizes, random, span, cut):
    """Whatever the order and overlap of batches, a trace is the sorted set of its device's times."""
    batches, rest = [], list(rows)
    while rest:
        size = sizes[len(batches) % len(sizes)]
        batches.append(batch(rest[:size], seq=len(batches) + 1))
        rest = rest[size:]
    random.shuffle(batches)
    buffer = TraceBuffer()
    for i, one in enumerate(batches):
        assert buffer.append(one)
        assert not buffer.append(batches[random.randrange(i + 1)])
    for trim_ns in (None, cut):
        if trim_ns is not None:
            buffer.trim(trim_ns)
        for index, uuid in enumerate(UUIDS):
            kept = sorted({t for d, t in rows if d == index and (trim_ns is None or t >= trim_ns)})
            trace = buffer.trace(uuid, *span)
            assert trace.t_ns.tolist() == [t for t in kept if span[0] <= t <= span[1]]
            assert np.array_equal(trace.hw_ns, trace.t_ns + 1)
            assert np.array_equal(trace.power_mw, trace.t_ns * 1.0)
            assert np.array_equal(trace.power_avg_mw, trace.t_ns * 2.0)
            assert np.array_equal(trace.energy_mj, trace.t_ns * 3.0)
            assert buffer.last_ns(uuid) == (kept[-1] if kept else None)


def test_two_epochs_are_told_apart():
    buffer = TraceBuffer()
    assert buffer.append(batch([(0, 1), (0, 3)], seq=1, epoch=1))
    assert buffer.append(batch([(0, 2), (0, 3), (0, 4)], seq=1, epoch=2))
    assert buffer.trace("a", 0, 10).t_ns.tolist() == [1, 2, 3, 4]


def test_another_nodes_batch_is_refused():
    buffer = TraceBuffer()
    buffer.append(batch([(0, 1)]))
    with pytest.raises(ValueError, match="n1"):
        buffer.append(batch([(0, 2)], seq=2, node="n1"))


def test_unknown_device_has_an_empty_trace():
    buffer = TraceBuffer()
    assert len(buffer.trace("x", 0, 10)) == 0
    assert buffer.last_ns("x") is None
    assert buffer.states("x", 0, 10) == buffer.errors("x", 0, 10) == ()
    buffer.append(batch([(0, 1)]))
    assert buffer.devices == UUIDS
    assert buffer.last_ns("b") is None


def test_states_and_errors_by_time():
    buffer = TraceBuffer()
    states = [DeviceState(t_ns=t, device_uuid=u, temperature_c=float(t)) for t in (10, 20, 30) for u in UUIDS]
    buffer.append(batch([(0, 20), (1, 21)], seq=2, errors={1: "late"}, states=tuple(states[4:])))
    buffer.append(pickle.loads(pickle.dumps(batch([(0, 10), (1, 11)], seq=1, errors={1: "timeout"}, states=tuple(states[:4])))))
    assert [s.t_ns for s in buffer.states("a", 10, 20)] == [10, 20]
    assert buffer.errors("b", 0, 100) == ((11, "timeout"), (21, "late"))
    assert buffer.errors("a", 0, 100) == ()
    buffer.trim(20)
    assert [s.t_ns for s in buffer.states("b", 0, 100)] == [20, 30]
    assert buffer.errors("b", 0, 100) == ((21, "late"),)


def test_a_trace_stays_as_it_was():
    buffer = TraceBuffer()
    for seq in range(1, 31):
        buffer.append(steady(seq))
    trace = buffer.trace("a", 0, 2_000 * 50)
    before = trace.t_ns.copy(), trace.energy_mj.copy()
    for seq in range(31, 200):
        buffer.append(steady(seq))
        buffer.trim((seq - 5) * 100 * 50)
    buffer.append(batch([(0, 10**9), (0, 10**9 - 7)], seq=200))
    assert np.array_equal(trace.t_ns, before[0])
    assert np.array_equal(trace.energy_mj, before[1])


def test_small_numbers_are_held_small_and_none_is_rounded():
    exact, large = np.array([1.0, np.nan, 2.0**24]), np.array([0.1, 2.0**24 + 1, np.nan])
    times = np.array([1, 2, 3], np.int64)

    def one(seq, values, hw_ns):
        return dataclasses.replace(
            batch([(0, int(t) + 10 * seq) for t in times], seq=seq), power_mw=values, power_avg_mw=values, hw_ns=hw_ns
        )

    small, big = TraceBuffer(), TraceBuffer()
    small.append(one(1, exact, times))
    big.append(one(1, large, times * 2**31))
    assert len(pickle.dumps(small._blocks[0])) < len(pickle.dumps(big._blocks[0]))
    small.append(one(2, large, times * 2**31))
    trace = small.trace("a", 0, 100)
    assert np.array_equal(trace.power_mw, np.concatenate((exact, large)), equal_nan=True)
    assert np.array_equal(trace.power_avg_mw, np.concatenate((exact, large)), equal_nan=True)
    assert trace.hw_ns.tolist() == [*times, *(times * 2**31)]
    assert (trace.t_ns.dtype, trace.hw_ns.dtype, trace.power_mw.dtype) == (np.int64, np.int64, np.float64)


@pytest.mark.parametrize(
    "energy_mj", [[5.0, 6.0, 2.0**52], [np.nan, 1.0, 2.0], [0.5, 1.0, 2.0], [np.inf, 1.0, 1e300], [3.0, 2.0, 1.0]]
)
@pytest.mark.parametrize("times", [[1, 2, 3], [10, 2**40, 2**60]])
def test_any_counter_at_any_time_is_held_exactly(energy_mj, times):
    buffer = TraceBuffer()
    one = batch([(1, times[0]), (0, times[0]), (0, times[1]), (0, times[2])])
    buffer.append(dataclasses.replace(one, energy_mj=np.array([7.0, *energy_mj])))
    trace = buffer.trace("a", 0, 2**62)
    assert trace.t_ns.tolist() == times
    assert np.array_equal(trace.energy_mj, energy_mj, equal_nan=True)
    assert buffer.trace("b", 0, 2**62).energy_mj.tolist() == [7.0]


def test_newest_power():
    buffer = TraceBuffer()
    assert buffer.latest_power_mw("a", 0) is None
    buffer.append(batch([(0, 10), (1, 11), (0, 20), (1, 21)]))
    buffer.append(batch([(0, 5), (1, 30)], seq=2))
    assert (buffer.latest_power_mw("a", 0), buffer.latest_power_mw("b", 30)) == (20.0, 30.0)
    assert buffer.latest_power_mw("a", 21) is None
    buffer.append(dataclasses.replace(batch([(0, 40)], seq=3), power_mw=np.array([np.nan])))
    assert buffer.latest_power_mw("a", 0) is None


def test_memory_of_a_long_run_is_bounded_by_trim():
    buffer = TraceBuffer()
    for seq in range(1, 50):
        buffer.append(steady(seq))
        buffer.trim((seq - 2) * 5_000)
    tracemalloc.start()
    for seq in range(50, 2_000):
        buffer.append(steady(seq))
        buffer.trim((seq - 2) * 5_000)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(buffer.trace("a", 0, 10**12)) == 200
    assert grown < 40 * 8 * BLOCK_ROWS


def test_small_batches_are_joined():
    buffer = TraceBuffer()
    for seq in range(1, 1_000):
        buffer.append(steady(seq, n=4))
    assert len(buffer._blocks) < 2 * 1_000 * 8 / BLOCK_ROWS
    assert len(buffer.trace("b", 0, 10**12)) == 999 * 4


def test_a_batch_that_never_comes_is_given_up():
    buffer = TraceBuffer()
    for seq in range(2, MAX_BEYOND + 10):
        assert buffer.append(batch([(0, seq)], seq=seq))
    assert len(buffer._seen[1]._beyond) < 10
    assert not buffer.append(batch([(0, 5)], seq=5))
