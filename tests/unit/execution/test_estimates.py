"""Estimates stand beside measurements and never in for what they do not cover."""

from __future__ import annotations

import pytest

from llem_ray.core.energy import EnergyReading
from llem_ray.core.power import Scope
from llem_ray.execution.accounting import _estimate_columns


def estimate(uuid: str, scope: Scope, energy_j: float) -> EnergyReading:
    return EnergyReading(
        node="n",
        device_uuid=uuid,
        name=uuid,
        source="codecarbon",
        scope=scope,
        method="estimated_model",
        energy_j=energy_j,
        u_j=None,
        bound_j=None,
        cross_check_j=None,
        cross_check_ratio=None,
        sensor_rel=None,
        shift_w=None,
        delta_s=0.0,
        lag_s=0.0,
        coverage=1.0,
        mean_power_w=None,
    )


PARTS = (estimate("codecarbon:cpu", "cpu_package", 90.0), estimate("codecarbon:ram", "dram", 10.0))


def test_a_gang_on_the_cpu_has_an_estimate_per_token() -> None:
    row = _estimate_columns(PARTS, 50, gpus=0)
    assert (row["est_energy_j"], row["est_joules_per_output_token"]) == (100.0, pytest.approx(2.0))


def test_a_gang_on_gpus_has_none_since_the_gpus_are_not_in_it() -> None:
    """Where the GPUs' energy is invalid the table shows the estimate instead: it would be far too low."""
    row = _estimate_columns(PARTS, 50, gpus=2)
    assert row["est_energy_j"] == 100.0
    assert "est_joules_per_output_token" not in row
