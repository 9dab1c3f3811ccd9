"""Requests that come one by one, served by transformers' continuous batching."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel

from llem_ray.backends.load_generator import LoadGenerator
from llem_ray.backends.transformers.arguments import OnlineArgs
from llem_ray.backends.transformers.batching import LoopFailed, ServedStep, WatchedBatching
from llem_ray.backends.transformers.memory import require_host_memory
from llem_ray.core.backend import LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.errors import EngineDied, GenerationError, HangError
from llem_ray.core.spec import SamplingSpec

LOOK_S: Final = 0.2
CPU_BATCH_TOKENS: Final = 256
CPU_CACHE_BYTES: Final = 1 << 30
CPU_CACHE_BLOCKS: Final = 64


@dataclass(slots=True)
class _Answer:
    request: Request
    tokens: list[int] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)


class Server:
    """Continuous batching over a loaded model. Its thread runs from the first request until ``pause``.

    Args:
        model: On its device.
        args: Sizes of cache and batch.
        eos_token_ids: Ids that end a request, unless it ignores them.
        step_timeout_s: Longest step.
    """

    def __init__(self, model: PreTrainedModel, args: OnlineArgs, eos_token_ids: Set[int], step_timeout_s: float) -> None:
        self._model = model
        self._args = args
        self._eos_token_ids = eos_token_ids
        self._step_timeout_s = step_timeout_s
        self._batching: WatchedBatching | None = None
        self._broken: str | None = None

    def run(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule
    ) -> Iterator[StepEvent | RequestRecord]:
        """Send each request at its time; a step is yielded when it ends, a record when its request is answered.

        Raises:
            GenerationError: A request does not fit into the cache, or the engine took no more of them.
            NumericsError: Logits are NaN or Inf.
            EngineDied: The loop ended by itself.
            HangError: A step took longer than it may.
        """
        batching = self._ready()
        self._require_room(requests, batching.cache_tokens)
        happened: queue.SimpleQueue[ServedStep | LoopFailed] = queue.SimpleQueue()
        answers = {request.request_id: _Answer(request) for request in requests}

        def submit(request: Request) -> None:
            answers[request.request_id].request = request
            self._submit(request)

        generator = LoadGenerator(requests, schedule, submit)
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(cudnn and self._args.cudnn_attention)
        batching.begin(sampling, happened.put)
        generator.start()
        try:
            while answers:
                step = self._next_step(happened, generator, len(requests) - len(answers))
                yield step.event
                for new in step.tokens:
                    answer = answers[new.request_id]
                    answer.tokens.append(new.token)
                    answer.times_ns.append(step.event.end_ns)
                for new in step.tokens:
                    if new.last:
                        yield self._record(answers.pop(new.request_id), generator)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            generator.stop()
            if answers:
                self.drop()

    def pause(self) -> None:
        """Stop the loop and keep the cache's memory, but nothing that could be found in it again."""
        if self._batching is not None:
            self._end(drop=self._args.allow_block_sharing)

    def drop(self, timeout_s: float | None = None) -> None:
        """Stop the loop, free the cache and give the model back as it was loaded.

        Args:
            timeout_s: Longest wait for the step that runs; default: the longest step.
        """
        batching = self._batching
        if batching is not None and self._end(drop=True, timeout_s=timeout_s):
            batching.restore_attention()
            self._batching = None

    def require_usable(self) -> None:
        """Refuse to go on with a model that a step which did not end may still use.

        Raises:
            EngineDied: There is such a step.
        """
        if self._broken is not None:
            raise EngineDied(self._broken)

    def notes(self) -> dict[str, str]:
        """Of the load report."""
        batching = self._ready()
        config = batching.continuous_batching_config
        without = "" if self._args.cudnn_attention else ", not by cuDNN"
        return {
            "online_cache_tokens": str(batching.cache_tokens),
            "online_batch_tokens": str(config.max_batch_tokens),
            "online_attention": f"{self._model.config._attn_implementation}{without}",
        }

    def _ready(self) -> WatchedBatching:
        self.require_usable()
        if self._batching is None:
            self._batching = WatchedBatching(self._model, self._config())
        if self._batching.batch_processor is None:
            self._batching.prepare()
        return self._batching

    def _config(self) -> ContinuousBatchingConfig:
        args, num_blocks, batch_tokens = self._args, self._args.num_blocks, self._args.max_batch_tokens
        if self._model.device.type == "cpu":  # the library's own choice is most of the host's memory
            batch_tokens = batch_tokens or CPU_BATCH_TOKENS
            block_bytes = _block_bytes(self._model, args.page_size)
            num_blocks = num_blocks or max(1, min(CPU_CACHE_BLOCKS, CPU_CACHE_BYTES // block_bytes))
            needed = num_blocks * block_bytes
            require_host_memory(needed, "the cache of online requests", f"{num_blocks} blocks x {block_bytes} B = {needed} B")
        return ContinuousBatchingConfig(
            num_blocks=num_blocks,
            page_size=args.page_size,
            max_batch_tokens=batch_tokens,
            max_requests_per_batch=args.max_requests_per_batch,
            max_memory_percent=args.max_memory_percent,
            allow_block_sharing=args.allow_block_sharing,
            max_blocks_per_request=0,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )

    def _require_room(self, requests: Sequence[Request], cache_tokens: int) -> None:
        for request in requests:
            needed = len(request.prompt_token_ids) + request.max_new_tokens
            if needed > cache_tokens:
                raise GenerationError(
                    f"request {request.request_id} needs {needed} tokens, the engine's cache has {cache_tokens}",
                    "set engine.engine_args.online.num_blocks",
                )

    def _submit(self, request: Request) -> None:
        assert self._batching is not None
        taken = self._batching.add_request(
            list(request.prompt_token_ids),
            request_id=request.request_id,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=[] if request.ignore_eos else sorted(self._eos_token_ids),
        )
        if taken is None:
            raise GenerationError(f"continuous batching did not take request {request.request_id}")

    def _next_step(
        self, happened: queue.SimpleQueue[ServedStep | LoopFailed], generator: LoadGenerator, answered: int
    ) -> ServedStep:
        quiet_since_s = time.monotonic()
        while True:
            try:
                event = happened.get(timeout=LOOK_S)
            except queue.Empty:
                generator.check()
                if self._batching is None or not self._batching.is_running():
                    raise EngineDied("the loop of continuous batching ended by itself") from None
                if generator.sent == answered:
                    quiet_since_s = time.monotonic()
                elif time.monotonic() - quiet_since_s > self._step_timeout_s:
                    raise HangError(f"continuous batching: no step ended within {self._step_timeout_s:g} s") from None
                continue
            if isinstance(event, LoopFailed):
                raise event.error
            return event

    def _record(self, answer: _Answer, generator: LoadGenerator) -> RequestRecord:
        request = answer.request
        sent = generator.done(request.request_id, answer.tokens, answer.times_ns[-1])
        stopped = not request.ignore_eos and answer.tokens[-1] in self._eos_token_ids
        return RequestRecord(
            request_id=request.request_id,
            prompt_tokens=len(request.prompt_token_ids),
            padded_tokens=len(request.prompt_token_ids),
            output_token_ids=tuple(answer.tokens),
            finish_reason="stop" if stopped else "length",
            scheduled_ns=sent.scheduled_ns,
            queued_ns=sent.queued_ns,
            sent_ns=sent.sent_ns,
            token_times_ns=tuple(answer.times_ns),
        )

    def _end(self, *, drop: bool, timeout_s: float | None = None) -> bool:
        assert self._batching is not None
        wait_s = self._step_timeout_s if timeout_s is None else min(timeout_s, self._step_timeout_s)
        ended = self._batching.end(wait_s, drop=drop)
        if not ended:
            self._broken = f"a step of continuous batching did not end within {wait_s:g} s"
        return ended


def _block_bytes(model: Any, page_size: int) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * page_size * config.num_hidden_layers * heads * head_dim * torch.empty((), dtype=model.dtype).element_size()
