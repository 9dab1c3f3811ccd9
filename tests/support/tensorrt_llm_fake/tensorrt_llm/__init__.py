"""A strict stand-in for TensorRT-LLM 1.2.1, built from tests/data/tensorrt_llm_1_2_1.json: no model, no GPU, known tokens.

It knows the names of the real API and no others, and has its traps: see ``_runtime``.
"""

from tensorrt_llm import _facts
from tensorrt_llm._runtime import LLM, RequestOutput, SamplingParams

__version__ = _facts.FACTS["version"]
__all__ = ["LLM", "RequestOutput", "SamplingParams", "__version__"]
