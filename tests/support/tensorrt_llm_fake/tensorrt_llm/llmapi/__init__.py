from tensorrt_llm._runtime import KvCacheConfig, TorchLlmArgs, TrtLlmArgs

__all__ = ["KvCacheConfig", "TorchLlmArgs", "TrtLlmArgs"]
