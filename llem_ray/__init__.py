"""Measure what LLM inference costs in energy across a whole cluster."""

__version__ = "0.1.0"
