"""vLLM, driven step by step: offline batches."""
