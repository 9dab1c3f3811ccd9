"""Fakes that users can test with too: engine, clock, power."""
