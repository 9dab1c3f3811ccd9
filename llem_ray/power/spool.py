"""Keeps a sampler's batches on disk until somebody has fetched them, so that its death loses at most the batch being filled.

One folder per run and node. A file ``<epoch>-<first seq>.spool`` is a run of frames, each

    8 bytes   length of the payload and its CRC-32, both little-endian unsigned 32 bit
    payload   4 bytes length of the header, the header, the columns

The header is JSON: node, epoch, seq, rows, devices, errors, states. The columns follow without padding, little-endian, in
the order device (int32), t_ns, hw_ns (int64), power_mw, power_avg_mw, energy_mj (float64). A torn last frame is ignored.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from llem_ray.core.power import DeviceState, SampleBatch

SEGMENT_BATCHES: Final = 256
"""Batches a file: acknowledged files are deleted whole."""

_FRAME: Final = struct.Struct("<II")
_LENGTH: Final = struct.Struct("<I")
_COLUMNS: Final = (
    ("device", "<i4"),
    ("t_ns", "<i8"),
    ("hw_ns", "<i8"),
    ("power_mw", "<f8"),
    ("power_avg_mw", "<f8"),
    ("energy_mj", "<f8"),
)


def next_epoch(folder: Path) -> int:
    """The epoch that a sampler starting now should have: one above all that left files in ``folder``, 1 at first."""
    return max((epoch for epoch, _ in map(_parse_name, folder.glob("*-*.spool"))), default=0) + 1


def read_spool(folder: Path) -> Iterator[SampleBatch]:
    """All whole batches under ``folder``, by epoch and number: what a sampler that died had not delivered yet, and more."""
    for path in sorted(folder.glob("*-*.spool"), key=_parse_name):
        yield from _read_segment(path)


def remove_epochs(folder: Path, *, before: int) -> None:
    """Delete the files of epochs below ``before``."""
    for path in folder.glob("*-*.spool"):
        if _parse_name(path)[0] < before:
            path.unlink(missing_ok=True)


class Spool:
    """The spool of one sampler. Its own thread touches the disk, so a slow disk never delays a poll.

    Writing needs no fsync: it survives the death of the process, which is what it is for.

    Args:
        folder: Created if missing.
        epoch: This sampler's epoch.

    Raises:
        OSError: The folder or the first file cannot be created.
    """

    def __init__(self, folder: Path, *, epoch: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._epoch = folder, epoch
        self._file: IO[bytes] = self._open_segment(1)
        self._in_segment = 0
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llem-spool")
        self.written_seq = 0
        """Number of the last batch that is on disk."""
        self.error: str | None = None
        """Why writing ended; batches from then on live in memory only."""

    def append(self, batch: SampleBatch) -> None:
        """Queue one batch for writing; returns at once."""
        self._disk.submit(self._write, batch)

    def read(self, wanted: range) -> list[SampleBatch]:
        """The batches of this epoch whose number is in ``wanted``, in order; those deleted before are left out."""
        return self._disk.submit(self._find, wanted).result()

    def acknowledge(self, seq: int) -> None:
        """Queue the deletion of files whose batches all have numbers up to ``seq``, but never of the newest."""
        self._disk.submit(self._delete, seq)

    def close(self) -> None:
        """Write what is queued and close; may be called more than once."""
        self._disk.shutdown(wait=True)
        self._file.close()

    def _write(self, batch: SampleBatch) -> None:
        if self.error is not None:
            return
        try:
            if self._in_segment == SEGMENT_BATCHES:
                self._file.close()
                self._file = self._open_segment(batch.seq)
                self._in_segment = 0
            self._file.write(encode_batch(batch))
            self._file.flush()
        except OSError as error:
            self.error = str(error)
        else:
            self._in_segment += 1
            self.written_seq = batch.seq

    def _find(self, wanted: range) -> list[SampleBatch]:
        segments = self._segments()
        found = []
        for i, (first_seq, path) in enumerate(segments):
            end_seq = segments[i + 1][0] if i + 1 < len(segments) else self.written_seq + 1
            if first_seq < wanted.stop and end_seq > wanted.start:
                found += [batch for batch in _read_segment(path) if batch.seq in wanted]
        return found

    def _delete(self, seq: int) -> None:
        segments = self._segments()
        for (_, path), (following_seq, _) in pairwise(segments):
            if following_seq <= seq + 1:
                path.unlink(missing_ok=True)

    def _segments(self) -> list[tuple[int, Path]]:
        return sorted((_parse_name(path)[1], path) for path in self._folder.glob(f"{self._epoch:06d}-*.spool"))

    def _open_segment(self, first_seq: int) -> IO[bytes]:
        return (self._folder / f"{self._epoch:06d}-{first_seq:09d}.spool").open("ab")


def encode_batch(batch: SampleBatch) -> bytes:
    """One frame of a spool file, see the module's docstring."""
    header = json.dumps(
        {
            "node": batch.node,
            "epoch": batch.epoch,
            "seq": batch.seq,
            "rows": len(batch),
            "devices": batch.devices,
            "errors": list(batch.errors.items()),
            "states": [asdict(state) for state in batch.states],
        }
    ).encode()
    columns = b"".join(getattr(batch, name).astype(dtype, copy=False).tobytes() for name, dtype in _COLUMNS)
    payload = _LENGTH.pack(len(header)) + header + columns
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def decode_batch(payload: bytes) -> SampleBatch:
    """The batch in the payload of one frame; its columns are read-only."""
    (header_length,) = _LENGTH.unpack_from(payload)
    offset = _LENGTH.size + header_length
    header = json.loads(payload[_LENGTH.size : offset])
    columns: dict[str, Any] = {}
    for name, dtype in _COLUMNS:
        columns[name] = np.frombuffer(payload, dtype, header["rows"], offset)
        offset += columns[name].nbytes
    return SampleBatch(
        node=header["node"],
        epoch=header["epoch"],
        seq=header["seq"],
        devices=tuple(header["devices"]),
        errors=dict(header["errors"]),
        states=tuple(DeviceState(**state) for state in header["states"]),
        **columns,
    )


def _read_segment(path: Path) -> Iterator[SampleBatch]:
    with path.open("rb") as file:
        while len(head := file.read(_FRAME.size)) == _FRAME.size:
            length, checksum = _FRAME.unpack(head)
            payload = file.read(length)
            if len(payload) < length or zlib.crc32(payload) != checksum:
                return
            yield decode_batch(payload)


def _parse_name(path: Path) -> tuple[int, int]:
    epoch, _, first_seq = path.stem.partition("-")
    return int(epoch), int(first_seq)
