"""The sweep file: YAML to core types, strictly; JSON Schema."""

from llem_ray.config.sweep import load_sweep

__all__ = ["load_sweep"]
