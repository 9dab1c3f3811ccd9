"""How the steps of a batch are computed: over a growing cache or one of fixed size, plain or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from llem_ray.backends.transformers.arguments import CompileArgs
from llem_ray.backends.transformers.pipeline import new_cache


class Forwarding:
    """Forward passes of one loaded model.

    As in transformers' `generate`, the prefill is never compiled: its length changes from batch to batch.

    Args:
        model: On its device.
        static: A batch's cache has its full length from the start.
        compiled: How decode steps are compiled, or None.
    """

    def __init__(self, model: PreTrainedModel, *, static: bool = False, compiled: CompileArgs | None = None) -> None:
        self.static = static
        self._model = model
        self._last: tuple[tuple[int, int], StaticCache] | None = None
        self._decode: Callable[..., Any] = model
        self._compiled = compiled is not None
        self._gave_up_quietly = torch._dynamo.config.fail_on_recompile_limit_hit if compiled is not None else False
        if compiled is not None:
            # Else torch goes on without compiling once there were too many sizes, and says so in a log only.
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            self._decode = torch.compile(
                model,
                backend=compiled.backend,
                mode=None if compiled.mode == "default" else compiled.mode,
                dynamic=compiled.dynamic,
                fullgraph=compiled.fullgraph,
            )

    def cache(self, rows: int, tokens: int) -> Any:
        """An empty cache. One of fixed size is used again by a batch of the same size: compiled programs know its address.

        Args:
            rows: Of the batch.
            tokens: Longest row, with what is generated.
        """
        if not self.static:
            return new_cache(self._model)
        if self._last is None or self._last[0] != (rows, tokens):
            self._last = None  # free it first
            self._last = ((rows, tokens), StaticCache(config=self._model.config, max_cache_len=tokens))
        else:
            with torch.inference_mode():
                self._last[1].reset()
        return self._last[1]

    def compute(self, *, decode: bool, **inputs: Any) -> Any:
        """The model's output, perhaps not computed yet on CUDA."""
        if decode and self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
            return self._decode(**inputs)
        return self._model(**inputs)

    def release(self) -> None:
        """Free the cache of the last batch."""
        self._last = None

    def close(self) -> None:
        """Forget compiled programs, which hold on to the model."""
        self.release()
        if self._compiled:
            torch._dynamo.config.fail_on_recompile_limit_hit = self._gave_up_quietly
            torch._dynamo.reset()
