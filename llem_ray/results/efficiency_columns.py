"""Columns of the ``trials`` table about where a window's energy went, and what came of it."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from llem_ray.results.column import Column

_STR, _F64 = pa.string(), pa.float64()

EFFICIENCY_COLUMNS: Final[tuple[Column, ...]] = (
    Column("prefill_energy_j", _F64, "J", "What of total_energy_j was spent on prefill, over all that `energy_covers` lists."),
    Column("prefill_energy_u_j", _F64, "J", "One sigma of prefill_energy_j."),
    Column("decode_energy_j", _F64, "J", "What of total_energy_j was spent on decode."),
    Column("decode_energy_u_j", _F64, "J", "One sigma of decode_energy_j."),
    Column(
        "phase_rest_energy_j",
        _F64,
        "J",
        "total_energy_j - prefill_energy_j - decode_energy_j: time between steps; under `phase_token_regression` also what"
        " all tokens share.",
    ),
    Column("prefill_gpu_energy_j", _F64, "J", "prefill_energy_j of the leased GPUs; null on the CPU."),
    Column("decode_gpu_energy_j", _F64, "J", "decode_energy_j of the leased GPUs; null on the CPU."),
    Column("phase_method", _STR, "", "`phase_time_regression`, or `phase_token_regression` where steps mix both phases."),
    Column("phase_residual_rel", _F64, "1", "Root mean square of what the fit leaves over a tick's energy, the worst device."),
    Column("phase_reason", _STR, "", "Why the phases are not told apart."),
    Column(
        "request_energy_rule",
        _STR,
        "",
        "How `requests.energy_j` was attributed: `phases` (prefill by prompt tokens, decode by output tokens, the rest by both)"
        " or `total_tokens`. Null: not at all.",
    ),
    Column("flops", _F64, "FLOP", "Floating-point operations of the window; a multiply-add is two."),
    Column(
        "flops_method",
        _STR,
        "",
        "`engine` (its own count, step by step), `architecture` (from the model's config) or `parameters` (2 a parameter and"
        " token).",
    ),
    Column("joules_per_flop", _F64, "J/FLOP", "total_energy_j / flops. Null unless power_valid."),
    Column("peak_flops_per_s", _F64, "FLOP/s", "Dense peak of the leased GPUs in the weights' number format, without sparsity."),
    Column("mfu", _F64, "1", "Model FLOP utilisation: flops / (window_s x peak_flops_per_s)."),
    Column("carbon_g", _F64, "g", "CO2 equivalent: total_energy_j in kWh x pue x grid_gco2_per_kwh. Null unless power_valid."),
    Column("energy_cost", _F64, "", "total_energy_j in kWh x pue x price_per_kwh, in `currency`. Null unless power_valid."),
    Column("grid_gco2_per_kwh", _F64, "g/kWh", "Emissions of the grid that carbon_g used."),
    Column("grid_source", _STR, "", "Where they come from: the sweep, or codecarbon's table with its year."),
    Column("pue", _F64, "1", "Power usage effectiveness that carbon_g and energy_cost used."),
    Column("price_per_kwh", _F64, "1/kWh", "Price that energy_cost used."),
    Column("currency", _STR, "", "Its currency."),
    Column("footprint_as_of", _STR, "", "Date of the sweep's own footprint numbers."),
)
