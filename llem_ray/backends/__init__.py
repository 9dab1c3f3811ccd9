"""Inference engines, one package each."""
