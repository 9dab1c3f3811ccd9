"""Runs a plan: run driver, executors, gangs, failure policy."""
