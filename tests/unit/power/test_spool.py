from __future__ import annotations

import numpy as np
import pytest

from llem_ray.core.power import DeviceState, SampleBatch
from llem_ray.power.spool import SEGMENT_BATCHES, Spool, next_epoch, read_spool, remove_epochs


def batch(seq, epoch=1, rows=3):
    t_ns = np.arange(rows, dtype=np.int64) + seq * 1000
    return SampleBatch(
        node="n0",
        epoch=epoch,
        seq=seq,
        devices=("gpu-ä", "rapl:package-0"),
        device=np.arange(rows, dtype=np.int32) % 2,
        t_ns=t_ns,
        hw_ns=t_ns * 2,
        power_mw=np.where(t_ns % 2 == 0, np.nan, t_ns / 3),
        power_avg_mw=t_ns / 7,
        energy_mj=t_ns / 11,
        errors={0: "timeout: driver"} if rows else {},
        states=(DeviceState(t_ns=seq, device_uuid="gpu-ä", temperature_c=41.5, clock_event_mask=8),),
    )


def assert_same(left, right):
    for name in ("node", "epoch", "seq", "devices", "errors", "states"):
        assert getattr(left, name) == getattr(right, name)
    for name in ("device", "t_ns", "hw_ns", "power_mw", "power_avg_mw", "energy_mj"):
        assert getattr(left, name).dtype == getattr(right, name).dtype
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def written(folder, n, epoch=1):
    spool = Spool(folder, epoch=epoch)
    for seq in range(1, n + 1):
        spool.append(batch(seq, epoch))
    spool.close()
    assert spool.written_seq == n
    return spool


def test_batches_come_back_exactly(tmp_path):
    spool = Spool(tmp_path / "new" / "folder", epoch=1)
    sent = [batch(1), batch(2, rows=0), batch(3, rows=800)]
    for one in sent:
        spool.append(one)
    for left, right in zip(sent, spool.read(range(1, 4)), strict=True):
        assert_same(left, right)
    assert [b.seq for b in spool.read(range(2, 3))] == [2]
    spool.close()


def test_every_truncation_leaves_the_whole_batches(tmp_path):
    written(tmp_path, 3)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    frame = len(whole) // 3
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert [b.seq for b in read_spool(tmp_path)] == list(range(1, size // frame + 1))


def test_a_damaged_batch_ends_the_reading(tmp_path):
    written(tmp_path, 3)
    (path,) = tmp_path.iterdir()
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    assert [b.seq for b in read_spool(tmp_path)] == [1]


def test_files_are_deleted_once_all_their_batches_are_acknowledged(tmp_path):
    spool = Spool(tmp_path, epoch=1)
    for seq in range(1, 2 * SEGMENT_BATCHES + 11):
        spool.append(batch(seq))
    spool.acknowledge(SEGMENT_BATCHES - 1)
    assert len(spool.read(range(1, 10_000))) == 2 * SEGMENT_BATCHES + 10
    spool.acknowledge(SEGMENT_BATCHES)
    assert [b.seq for b in spool.read(range(1, 10_000))] == list(range(SEGMENT_BATCHES + 1, 2 * SEGMENT_BATCHES + 11))
    spool.acknowledge(10_000)
    spool.read(range(0))  # waits its turn
    assert len(list(tmp_path.iterdir())) == 1
    spool.append(batch(2 * SEGMENT_BATCHES + 11))
    assert [b.seq for b in spool.read(range(2 * SEGMENT_BATCHES + 11, 10_000))] == [2 * SEGMENT_BATCHES + 11]
    spool.close()


def test_epochs_count_on_and_can_be_removed(tmp_path):
    assert next_epoch(tmp_path / "none") == 1
    written(tmp_path, 2, epoch=1)
    assert next_epoch(tmp_path) == 2
    Spool(tmp_path, epoch=2).close()
    assert next_epoch(tmp_path) == 3
    written(tmp_path, 1, epoch=3)
    assert [(b.epoch, b.seq) for b in read_spool(tmp_path)] == [(1, 1), (1, 2), (3, 1)]
    remove_epochs(tmp_path, before=3)
    assert [(b.epoch, b.seq) for b in read_spool(tmp_path)] == [(3, 1)]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Spool(tmp_path / "file", epoch=1)
