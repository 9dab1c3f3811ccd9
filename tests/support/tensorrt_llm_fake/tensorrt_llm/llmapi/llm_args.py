from tensorrt_llm._ray import RayPlacementConfig

__all__ = ["RayPlacementConfig"]
