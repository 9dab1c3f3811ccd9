"""vLLM: offline batches, stepped by us, and requests that come one by one."""
