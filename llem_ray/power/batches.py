"""Turns polls into columnar batches."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import numpy as np

from llem_ray.core.power import DeviceState, PowerSample, SampleBatch


class OpenBatch:
    """The batch being filled: preallocated columns that are reused, so an append allocates nothing.

    Args:
        devices: UUIDs of all rows to come; rows store an index into it.
        capacity: Rows that fit.
    """

    def __init__(self, devices: tuple[str, ...], capacity: int) -> None:
        self.devices = devices
        self._capacity = capacity
        self._index = {uuid: i for i, uuid in enumerate(devices)}
        self._device = np.empty(capacity, np.int32)
        self._t_ns = np.empty(capacity, np.int64)
        self._hw_ns = np.empty(capacity, np.int64)
        self._power_mw = np.empty(capacity, np.float64)
        self._power_avg_mw = np.empty(capacity, np.float64)
        self._energy_mj = np.empty(capacity, np.float64)
        self._errors: dict[int, str] = {}
        self._states: list[DeviceState] = []
        self._rows = 0
        self.first_ns: int | None = None
        """Time of the oldest thing in the batch; None while it is empty."""

    def has_room(self, rows: int) -> bool:
        """Whether ``rows`` more fit."""
        return self._rows + rows <= self._capacity

    def extend(self, samples: Sequence[PowerSample]) -> list[str]:
        """Append one row a sample; returns the UUIDs that are not among ``devices``, whose samples were left out."""
        strangers = []
        for sample in samples:
            index = self._index.get(sample.device_uuid)
            if index is None:
                strangers.append(sample.device_uuid)
                continue
            row = self._rows
            self._device[row] = index
            self._t_ns[row] = sample.t_ns
            self._hw_ns[row] = sample.hw_ns
            self._power_mw[row] = nan if sample.power_mw is None else sample.power_mw
            self._power_avg_mw[row] = nan if sample.power_avg_mw is None else sample.power_avg_mw
            self._energy_mj[row] = nan if sample.energy_mj is None else sample.energy_mj
            if sample.error is not None:
                self._errors[row] = sample.error
            self._rows = row + 1
            if self.first_ns is None:
                self.first_ns = sample.t_ns
        return strangers

    def extend_states(self, states: Sequence[DeviceState]) -> None:
        """Append slow-lane readings."""
        self._states.extend(states)
        if states and self.first_ns is None:
            self.first_ns = states[0].t_ns

    def cut(self, *, node: str, epoch: int, seq: int) -> SampleBatch:
        """What was appended since the last cut, as a batch of its own; the columns are free again."""
        rows = slice(self._rows)
        batch = SampleBatch(
            node=node,
            epoch=epoch,
            seq=seq,
            devices=self.devices,
            device=self._device[rows].copy(),
            t_ns=self._t_ns[rows].copy(),
            hw_ns=self._hw_ns[rows].copy(),
            power_mw=self._power_mw[rows].copy(),
            power_avg_mw=self._power_avg_mw[rows].copy(),
            energy_mj=self._energy_mj[rows].copy(),
            errors=self._errors,
            states=tuple(self._states),
        )
        self._errors, self._states, self._rows, self.first_ns = {}, [], 0, None
        return batch
