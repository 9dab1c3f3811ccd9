"""TensorRT-LLM by its LLM API: offline batches and requests sent one by one, on NVIDIA GPUs of one host."""
