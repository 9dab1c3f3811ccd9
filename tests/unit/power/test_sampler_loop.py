from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llem_ray.core.clock import SystemClock
from llem_ray.core.errors import PowerError, ReadFailed
from llem_ray.core.power import Calibration, PowerSample
from llem_ray.power.lanes import followed_tick_s, polling_period_s, slower_period_s
from llem_ray.power.sampler import SamplerLoop

S = 1_000_000_000


def make(sources, clock, **options):
    return SamplerLoop(sources, node="n0", clock=clock, **options)


def times(batches, uuid="gpu-0"):
    return np.concatenate([b.t_ns[b.device == b.devices.index(uuid)] for b in batches])


def test_polls_at_absolute_deadlines(clock, meter):
    loop = make([meter], clock)
    begin = clock.monotonic_ns()
    loop.run_until(begin + 10 * S)
    batches = loop.fetch(0, flush=True)
    assert np.array_equal(times(batches), begin + np.arange(201) * S // 20)
    assert [b.seq for b in batches] == list(range(1, len(batches) + 1))
    assert all(b.node == "n0" and b.epoch == 1 for b in batches)


def test_run_until_in_pieces_is_run_until_at_once(clock, meter):
    loop = make([meter], clock)
    begin = clock.monotonic_ns()
    for piece in range(1, 101):
        loop.run_until(begin + piece * S // 10)
    assert np.array_equal(times(loop.fetch(0, flush=True)), begin + np.arange(201) * S // 20)


def test_a_late_poll_keeps_its_true_time_and_shifts_no_other(clock, meter):
    meter.before_read = lambda: clock.advance_ns(120_000_000) if meter.reads == 11 else None
    loop = make([meter], clock)
    begin = clock.monotonic_ns()
    loop.run_until(begin + S)
    taken_ms = (times(loop.fetch(0, flush=True)) - begin) / 1e6
    # the poll due at 500 ms returns at 620; the deadline of 550 is served at once, that of 600 is skipped
    assert taken_ms.tolist() == [*range(0, 500, 50), 620, 620, *range(650, 1001, 50)]


def test_batches_close_by_age(clock, meter):
    loop = make([meter], clock, batch_s=2.0)
    loop.run_until(clock.monotonic_ns() + 7 * S)
    closed = loop.fetch(0)
    assert [len(b) for b in closed] == [40, 40, 40]
    assert sum(len(b) for b in loop.fetch(3, flush=True)) == 21


def test_slow_lane_runs_once_a_second(clock, meter):
    loop = make([meter], clock)
    begin = clock.monotonic_ns()
    loop.run_until(begin + 10 * S)
    states = [state for b in loop.fetch(0, flush=True) for state in b.states]
    assert [state.t_ns - begin for state in states] == [i * S for i in range(11)]


def test_a_slow_source_is_polled_at_its_own_rate(clock, new_meter):
    fast, slow = new_meter(clock), new_meter(clock, uuids=("cpu",), name="slow", max_hz=1.0)
    loop = make([fast, slow], clock)
    loop.run_until(clock.monotonic_ns() + 5 * S)
    assert (fast.reads, slow.reads) == (101, 6)
    assert loop.info().periods_s == {"gpu-0": 0.05, "cpu": 1.0}


@pytest.mark.parametrize(("tick_s", "period_s"), [(0.1, 0.0466), (0.02, 0.00932), (0.25, 0.0486), (0.001, 0.05), (0.06, 0.02796)])
def test_calibration_sets_the_period(clock, new_meter, tick_s, period_s):
    loop = make([new_meter(clock, tick_s=tick_s)], clock)
    calibration = loop.calibrate(2.0)["gpu-0"]
    assert calibration.tick_period_s == pytest.approx(max(tick_s, 0.002), rel=0.02)
    assert loop.info().periods_s["gpu-0"] == pytest.approx(period_s, rel=0.02)
    assert loop.info().calibrations["gpu-0"] == calibration
    assert loop.fetch(0, flush=True) == []


def test_every_tick_of_a_20_ms_counter_is_followed_after_calibration(clock, new_meter):
    loop = make([new_meter(clock, tick_s=0.02)], clock)
    loop.calibrate()
    loop.run_until(clock.monotonic_ns() + 10 * S)
    energy = np.concatenate([b.energy_mj for b in loop.fetch(0, flush=True)])
    assert len(np.unique(energy)) == pytest.approx(501, abs=1)


def test_an_error_of_the_source_becomes_samples_and_it_recovers(clock, new_meter):
    bad, good = new_meter(clock, uuids=("a", "b")), new_meter(clock, uuids=("c",), name="good")
    loop = make([bad, good], clock)
    bad.fault = ReadFailed("driver gone")
    begin = clock.monotonic_ns()
    loop.run_until(begin + S)
    bad.fault = None
    loop.run_until(begin + 2 * S)
    (batch,) = loop.fetch(0, flush=True)
    assert len(times([batch], "c")) == len(times([batch], "a")) == 41
    lost = np.isnan(batch.energy_mj)
    assert lost.sum() == 2 * 21
    assert set(batch.errors) == set(np.flatnonzero(lost))
    assert set(batch.errors.values()) == {"ReadFailed: driver gone"}


def test_any_exception_of_a_meter_is_survived_in_both_lanes(clock, meter):
    meter.fault, meter.state_fault = ZeroDivisionError("oops"), RuntimeError("no states")
    loop = make([meter], clock)
    loop.run_until(clock.monotonic_ns() + S)
    (batch,) = loop.fetch(0, flush=True)
    assert len(batch) == 21
    assert batch.states == ()
    assert loop.info().notes == ("steady: no slow readings: RuntimeError: no states",)


def test_samples_of_unlisted_devices_are_left_out_and_noted(clock, meter):
    meter.extra = [
        PowerSample(t_ns=1, hw_ns=0, device_uuid="ghost", power_mw=1.0, power_avg_mw=None, energy_mj=None),
    ]
    loop = make([meter], clock)
    loop.run_until(clock.monotonic_ns() + S)
    (batch,) = loop.fetch(0, flush=True)
    assert len(batch) == 21
    assert "ghost" in loop.info().notes[0]


def test_unavailable_devices_give_no_rows(clock, new_meter):
    loop = make([new_meter(clock, uuids=("a", "b"), dead=("b",))], clock)
    loop.run_until(clock.monotonic_ns() + S)
    (batch,) = loop.fetch(0, flush=True)
    assert {batch.devices[i] for i in batch.device} == {"a"}
    assert [d.uuid for d in loop.info().devices] == ["a", "b"]


def test_two_sources_may_not_share_a_device(clock, new_meter):
    with pytest.raises(PowerError, match="gpu-0"):
        make([new_meter(clock), new_meter(clock, name="other")], clock)


def test_backs_off_when_reads_are_slow_and_returns_when_they_are_quick(clock, meter):
    loop = make([meter], clock)
    begin = clock.monotonic_ns()
    meter.call_s = 0.024
    loop.run_until(begin + 5 * S)
    assert loop.info().periods_s["gpu-0"] == 0.05
    meter.call_s = 0.026
    loop.run_until(begin + 10 * S)
    assert loop.info().periods_s["gpu-0"] == 0.1
    assert "10 Hz" in loop.info().notes[0]
    meter.call_s = 0.001
    loop.run_until(begin + 20 * S)
    assert loop.info().periods_s["gpu-0"] == 0.05
    assert "20 Hz" in loop.info().notes[1]


def test_backs_off_to_periods_that_stay_out_of_step_with_the_counter(clock, new_meter):
    meter = new_meter(clock, tick_s=0.1)
    loop = make([meter], clock)
    loop.calibrate()
    seen = []
    for call_s in (0.02, 0.03, 0.05, 0.001):
        meter.call_s = call_s
        loop.run_until(clock.monotonic_ns() + 20 * S)
        seen.append(loop.info().periods_s["gpu-0"])
    assert seen == pytest.approx([0.1 / 2.1459, 0.1 / 1.1459, 0.1 * 2.1459, 0.1 / 2.1459], rel=0.02)


@given(st.floats(0.015, 2.0), st.floats(0.01, 1.0))
def test_a_slower_period_is_never_in_step(tick_s, period_s):
    slower_s = slower_period_s(tick_s, period_s)
    assert 1.5 * period_s * (1 - 1e-6) <= slower_s
    turns = max(slower_s / tick_s, tick_s / slower_s) % 1
    assert turns == pytest.approx(0.1459, abs=1e-3)
    assert slower_period_s(None, period_s) == 2 * period_s


def test_back_off_ends_at_one_second(clock, meter):
    meter.call_s = 0.9
    loop = make([meter], clock)
    loop.run_until(clock.monotonic_ns() + 600 * S)
    assert 0.5 < loop.info().periods_s["gpu-0"] <= 1.0


def test_a_single_stall_does_not_slow_the_sampler(clock, meter):
    meter.before_read = lambda: clock.advance_ns(3 * S) if meter.reads == 15 else None
    loop = make([meter], clock)
    loop.run_until(clock.monotonic_ns() + 20 * S)
    assert loop.info().periods_s["gpu-0"] == 0.05
    assert loop.info().notes == ()


def test_fetch_hands_out_again_what_was_not_acknowledged(clock, meter):
    loop = make([meter], clock, batch_s=1.0)
    loop.run_until(clock.monotonic_ns() + 5 * S)
    first = loop.fetch(0)
    assert [b.seq for b in loop.fetch(0)] == [b.seq for b in first] == [1, 2, 3, 4, 5]
    assert [b.seq for b in loop.fetch(3)] == [4, 5]
    assert [b.seq for b in loop.fetch(0)] == [4, 5]


def test_flush_without_samples_makes_no_batch(clock, meter):
    loop = make([meter], clock)
    loop.run_until(clock.monotonic_ns())
    assert [b.seq for b in loop.fetch(0, flush=True)] == [1]
    assert loop.fetch(1, flush=True) == []


def test_acknowledging_another_epoch_or_the_future_frees_nothing(clock, meter):
    loop = make([meter], clock, epoch=2, batch_s=1.0)
    loop.run_until(clock.monotonic_ns() + 3 * S)
    assert [b.seq for b in loop.fetch(2, epoch=1)] == [1, 2, 3]
    assert [b.seq for b in loop.fetch(500)] == [1, 2, 3]
    assert [b.seq for b in loop.fetch(2, epoch=2)] == [3]


def test_without_a_spool_nothing_is_ever_dropped(clock, meter):
    loop = make([meter], clock, keep_s=10.0)
    loop.run_until(clock.monotonic_ns() + 100 * S)
    assert len(times(loop.fetch(0, flush=True))) == 2001


def test_old_batches_leave_memory_for_the_spool_and_come_back(clock, meter, tmp_path):
    loop = make([meter], clock, keep_s=10.0, batch_s=1.0, spool_dir=tmp_path)
    begin = clock.monotonic_ns()
    for second in range(1, 101):
        loop.run_until(begin + second * S)
        loop._spool.read(range(0))  # waits for the writer
    assert len(loop._closed) < 15
    batches = loop.fetch(0, flush=True)
    assert [b.seq for b in batches] == list(range(1, len(batches) + 1))
    assert np.array_equal(times(batches), begin + np.arange(2001) * S // 20)
    loop.close()


def test_a_lost_spool_is_noted_and_costs_no_sample(clock, meter, tmp_path):
    loop = make([meter], clock, keep_s=5.0, batch_s=1.0, spool_dir=tmp_path)
    loop._spool._file.close()
    loop._spool._file = (tmp_path / "000001-000000001.spool").open("rb")  # writing fails, as on a full disk
    loop.run_until(clock.monotonic_ns() + 30 * S)
    assert len(times(loop.fetch(0, flush=True))) == 601
    assert "spool lost" in loop.info().notes[-1]
    loop.close()


def test_info_names_host_and_what_is_unavailable(clock, meter, monkeypatch):
    monkeypatch.setenv("LLEM_RAY_HOST_ID", "host-7")
    info = make([meter], clock, epoch=3, unavailable={"rapl": "no CPU package"}).info()
    assert (info.node, info.epoch, info.sample_hz, info.unavailable) == ("n0", 3, 20.0, {"rapl": "no CPU package"})
    assert info.host["host_id"] == "host-7"


def test_close_closes_the_sources_once(clock, meter):
    loop = make([meter], clock)
    loop.close()
    loop.close()
    assert meter.closes == 1


def test_no_source_is_fine(clock):
    loop = make([], clock)
    assert loop.calibrate(1.0) == {}
    loop.run_until(clock.monotonic_ns() + S)
    assert loop.fetch(0, flush=True) == []
    assert loop.info().devices == ()


def wait_for(condition, timeout_s=60.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_thread_samples_until_stopped_and_can_start_again(new_meter):
    clock = SystemClock()
    meter = new_meter(clock)
    loop = make([meter], clock, sample_hz=200.0)
    loop.start()
    loop.start()
    wait_for(lambda: meter.reads >= 20)
    with pytest.raises(RuntimeError, match="stop"):
        loop.run_until(clock.monotonic_ns())
    loop.stop()
    reads = meter.reads
    assert not loop.running
    t_ns = times(loop.fetch(0, flush=True))
    assert len(t_ns) == reads
    assert np.all(np.diff(t_ns) > 0)
    loop.start()
    wait_for(lambda: meter.reads > reads)
    loop.close()
    assert "llem-sampler" not in [thread.name for thread in threading.enumerate()]


class HandClock:
    """Time passes only by hand, for all threads; sleepers look again every ms."""

    def __init__(self):
        self.now_ns = 10 * S

    def monotonic_ns(self):
        return self.now_ns

    def sleep_until_ns(self, t_ns):
        time.sleep(0.001)


def test_the_lease_is_renewed_by_fetching_and_ends_the_thread(new_meter):
    clock = HandClock()
    meter = new_meter(clock)
    loop = make([meter], clock, lease_s=10.0)
    loop.start()
    for _ in range(3):
        clock.now_ns += 9 * S
        loop.fetch(0)
        reads = meter.reads
        clock.now_ns += S // 2
        wait_for(lambda reads=reads: meter.reads > reads)
    clock.now_ns += 10 * S
    wait_for(lambda: not loop.running)
    assert "lease" in loop.info().notes[0]
    assert len(loop.fetch(0, flush=True)) > 0
    reads = meter.reads
    loop.start()
    clock.now_ns += S
    wait_for(lambda: meter.reads > reads)
    loop.close()


def test_thread_outlives_a_malformed_sample(new_meter):
    clock = SystemClock()
    meter = new_meter(clock)
    meter.extra = [PowerSample(t_ns=None, hw_ns=0, device_uuid="gpu-0", power_mw=1.0, power_avg_mw=None, energy_mj=None)]
    loop = make([meter], clock, sample_hz=200.0)
    loop.start()
    wait_for(lambda: meter.reads >= 5)
    assert loop.running
    assert "poll lost" in loop.info().notes[0]
    loop.close()


def test_concurrent_fetching_loses_and_doubles_nothing(new_meter):
    clock = SystemClock()
    meter = new_meter(clock, uuids=tuple(f"gpu-{i}" for i in range(8)))
    loop = make([meter], clock, sample_hz=500.0, batch_s=0.02)
    loop.start()
    seqs, rows, after = [], 0, 0
    while meter.reads < 200:
        for batch in loop.fetch(after, flush=True):
            seqs.append(batch.seq)
            rows += len(batch)
            after = batch.seq
    loop.stop()
    for batch in loop.fetch(after, flush=True):
        seqs.append(batch.seq)
        rows += len(batch)
    assert seqs == list(range(1, len(seqs) + 1))
    assert rows == 8 * meter.reads


def test_missing_parts_are_nan(clock, meter):
    loop = make([meter], clock)
    loop.run_until(clock.monotonic_ns())
    (batch,) = loop.fetch(0, flush=True)
    assert math.isnan(batch.power_avg_mw[0])
    assert batch.power_mw[0] == 100_000.0


def test_gpus_that_tick_almost_alike_do_not_speed_polling_up(clock, new_meter):
    uuids = tuple(f"gpu-{index}" for index in range(8))
    source = new_meter(clock, uuids=uuids)
    calibrations = {
        uuid: Calibration(
            device_uuid=uuid, tick_period_s=0.1 * (1 + index * 1e-5), has_instant=True, has_average=True, lag_s=0.0, call_s=0.0
        )
        for index, uuid in enumerate(uuids)
    }
    assert polling_period_s(source, 20.0, followed_tick_s(source, calibrations)) == pytest.approx(0.0466, rel=0.001)
    reverse = dict(reversed(calibrations.items()))
    assert polling_period_s(source, 20.0, followed_tick_s(source, reverse)) == pytest.approx(0.0466, rel=0.001)
