"""The sweep file: YAML to core types, strictly; JSON Schema."""
