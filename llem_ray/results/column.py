"""One column of a table: name, type, unit, meaning."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table. Every column is nullable: missing is null, never 0."""

    name: str
    type: pa.DataType
    unit: str
    """Empty where there is none."""
    description: str

    def field(self) -> pa.Field:
        """The Arrow field, with unit and description as metadata."""
        return pa.field(self.name, self.type, metadata={"unit": self.unit, "description": self.description})


def type_name(data_type: pa.DataType) -> str:
    """Short name of a type for the reference page: ``list<string>``, ``list<struct<uuid, energy_j>>``."""
    if pa.types.is_list(data_type):
        return f"list<{type_name(data_type.value_type)}>"
    if pa.types.is_map(data_type):
        return f"map<{type_name(data_type.key_type)}, {type_name(data_type.item_type)}>"
    if pa.types.is_struct(data_type):
        members = (data_type.field(index) for index in range(data_type.num_fields))
        return "struct<" + ", ".join(f"{member.name}: {type_name(member.type)}" for member in members) + ">"
    return str(data_type)
