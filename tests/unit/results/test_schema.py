from __future__ import annotations

import re

import pytest

from llem_ray.results.schema import COLUMNS, DESCRIPTIONS, SCHEMA_VERSION, SCHEMAS, TABLE_NAMES, schema_reference

METRIC_KEYS = {
    "total_gpu_energy_j",
    "avg_total_gpu_power_w",
    "avg_power_w",
    "joules_per_successful_query",
    "joules_per_input_token",
    "joules_per_output_token",
    "joules_per_total_token",
    "output_tokens_per_joule",
    "energy_delay_product_js",
    "idle_energy_j",
    "net_energy_j",
    "host_cpu_energy_j",
    "dram_energy_j",
    "load_energy_j",
    "waste_energy_j",
    "energy_source",
    "energy_uncertainty_j",
    "sensor_rel",
    "power_valid",
    "invalid_reasons",
    "schema_version",
    "output_throughput_tok_s",
    "total_token_throughput_tok_s",
    "throughput_per_gpu_tok_s",
    "ttft_s_p99",
    "tpot_s_mean",
    "e2e_latency_s_p50",
    "e2e_from_schedule_s_p90",
    "inter_chunk_s_p95",
    "normalized_tpot_s_std",
}

UNIT_OF_SUFFIX = {
    "_ns": {"ns"},
    "_mw": {"mW"},
    "_w": {"W"},
    "_j": {"J"},
    "_mj": {"mJ"},
    "_s": {"s"},
    "_tokens": {"tokens"},
    "_bytes": {"bytes"},
    "_utc": {"UTC"},
}


def test_the_published_metric_keys_are_columns() -> None:
    assert not METRIC_KEYS - set(SCHEMAS["trials"].names)


@pytest.mark.parametrize("table", TABLE_NAMES)
def test_every_column_is_documented_and_named_with_its_unit(table: str) -> None:
    columns = COLUMNS[table]  # type: ignore[index]
    assert DESCRIPTIONS[table].endswith(".")  # type: ignore[index]
    assert len({column.name for column in columns}) == len(columns)
    for column in columns:
        assert len(column.description) > 8, column.name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", column.name)
        suffix = next((s for s in sorted(UNIT_OF_SUFFIX, key=len, reverse=True) if column.name.endswith(s)), None)
        if suffix and not column.name.endswith("per_s"):
            assert column.unit in UNIT_OF_SUFFIX[suffix] | {"token/s", "1/s"}, column.name


def test_metadata_and_reference_carry_unit_description_and_version() -> None:
    field = SCHEMAS["trials"].field("net_energy_j")
    assert field.nullable
    assert field.metadata == {b"unit": b"J", b"description": field.metadata[b"description"]}
    assert SCHEMAS["power"].metadata == {b"llem_ray.table": b"power", b"llem_ray.schema_version": str(SCHEMA_VERSION).encode()}
    rows = list(schema_reference())
    assert len(rows) == sum(map(len, COLUMNS.values()))
    by_name = {(row.table, row.column): row for row in rows}
    assert by_name["trials", "flags"].type == "list<string>"
    assert by_name["trials", "null_reasons"].type == "map<string, string>"
    assert by_name["trials", "ranks"].type == "list<struct<rank: int32, host: string, pid: int64, gpu_uuid: string>>"
    assert by_name["power", "energy_mj"].unit == "mJ"
