"""Sweep to trials to plan to placement. Pure."""
