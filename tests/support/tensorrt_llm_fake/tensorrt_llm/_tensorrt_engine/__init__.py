from tensorrt_llm._runtime import TrtLLM as LLM

__all__ = ["LLM"]
