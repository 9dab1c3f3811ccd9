"""What is asked of an engine: prompts, token lengths, request records to latency metrics."""
