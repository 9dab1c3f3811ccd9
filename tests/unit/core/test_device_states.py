"""Slow-lane readings as columns, and batches that cross a process boundary."""

from __future__ import annotations

import pickle

import numpy as np

from llem_ray.core.power import DeviceState, DeviceStates, SampleBatch

STATES = (
    DeviceState(t_ns=1, device_uuid="a", temperature_c=40.5, clock_event_mask=2**62 + 1, memory_used_bytes=0),
    DeviceState(t_ns=2, device_uuid="b"),
    DeviceState(t_ns=3, device_uuid="a", sm_clock_mhz=1.0, memory_clock_mhz=2.0, process_count=3, power_limit_mw=4.0),
)


def test_columns_are_the_same_readings() -> None:
    columns = DeviceStates.of(STATES)
    assert columns == STATES
    assert (len(columns), columns[-1], columns[1:]) == (3, STATES[2], STATES[1:])
    assert columns != STATES[:2]
    assert DeviceStates.of(columns) is columns
    assert columns.of_device("a", 2, 9) == [STATES[2]]
    assert columns.of_device("c", 0, 9) == []


def test_what_is_none_is_not_zero() -> None:
    values, absent = DeviceStates.of(STATES).column("memory_used_bytes")
    assert (values[0], absent.tolist()) == (0, [False, True, True])
    values, absent = DeviceStates.of(STATES).column("power_limit_mw")
    assert (values[2], absent.tolist()) == (4.0, [True, True, False])


def test_a_batch_arrives_as_it_was_sent() -> None:
    column = np.array([1.0, np.nan])
    sent = SampleBatch(
        node="n",
        epoch=2,
        seq=3,
        devices=("a", "b"),
        device=np.array([0, 1], np.int32),
        t_ns=np.array([1, 2]),
        hw_ns=np.array([3, 4]),
        power_mw=column,
        power_avg_mw=column + 1,
        energy_mj=column + 2,
        errors={1: "late"},
        states=STATES,
    )
    there = pickle.loads(pickle.dumps(sent))
    assert (there.node, there.epoch, there.seq, there.devices) == ("n", 2, 3, ("a", "b"))
    for name in ("device", "t_ns", "hw_ns", "power_mw", "power_avg_mw", "energy_mj"):
        assert np.array_equal(getattr(there, name), getattr(sent, name), equal_nan=True), name
    assert there.errors == {1: "late"}
    assert there.states == STATES
