"""Rows to tables and exports."""
