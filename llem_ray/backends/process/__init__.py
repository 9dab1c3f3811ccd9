"""Runs an engine in a child process of any interpreter, over a Unix socket."""
