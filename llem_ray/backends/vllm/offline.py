"""Offline batches: vLLM's LLMEngine, stepped by us. Every step has its exact tokens, every token its time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from vllm.lora.request import LoRARequest
from vllm.v1.engine.llm_engine import LLMEngine

from llem_ray.backends.load_generator import Sent
from llem_ray.backends.vllm.core_watch import CoreWatch
from llem_ray.backends.vllm.serving import Answer, prompt_of, sampling_params, step_event
from llem_ray.core.backend import LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.errors import GenerationError
from llem_ray.core.spec import SamplingSpec

RPC_TIMEOUT_S: Final = 60.0

_run_ids: Final = itertools.count()


class StepRecorder:
    """Stands in for vLLM's own loggers: keeps the scheduler's statistics of the last step and writes nothing."""

    def __init__(self) -> None:
        self._last: Any = None

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:  # noqa: ARG002
        """Called by the engine inside ``step``, by these names."""
        self._last = scheduler_stats

    def log(self) -> None:
        """Called by the engine every few seconds."""

    def take(self) -> Any:
        """Statistics of the step that has just ended, or None; forgets them."""
        last, self._last = self._last, None
        return last


class OfflineEngine:
    """vLLM's synchronous engine; scheduler and model run in this process, or in processes of their own.

    Args:
        vllm_config: vLLM's validated config.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.llm: Any = LLMEngine.from_vllm_config(vllm_config)
        self.vllm_config = self.llm.vllm_config
        self.adapter: LoRARequest | None = None
        self._watch = CoreWatch(self.llm.engine_core)
        self._recorder = StepRecorder()
        # vLLM's own loggers format a Prometheus page's worth of counters in every step; ours keeps one reference.
        self.llm.logger_manager = self._recorder

    def describe_workers(self) -> list[dict[str, Any]]:
        """What each worker tells of itself."""
        described: list[dict[str, Any]] = self.llm.collective_rpc("llem_ray_describe", timeout=RPC_TIMEOUT_S)
        return described

    def add_adapter(self, adapter: LoRARequest) -> None:
        """Load a LoRA adapter; every request uses it from now on."""
        self.llm.add_lora(adapter)
        self.adapter = adapter

    def serve(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule | None, workers: int
    ) -> Iterator[StepEvent | RequestRecord]:
        """Serve the requests together: a StepEvent after each step of the engine, then a RequestRecord for each request.

        Args:
            requests: Valid ones, within the context.
            sampling: How tokens are chosen.
            schedule: None.
            workers: How many the engine has.

        Raises:
            GenerationError: There is a schedule, or a fixed-length request ended early.
        """
        if schedule is not None:
            raise GenerationError("vLLM was loaded for batches", "load it with online=True")
        run_id = next(_run_ids)
        answers: dict[str, Answer] = {}
        begin_ns = time.monotonic_ns()
        try:
            for index, request in enumerate(requests):
                # A name of our own: ids may repeat from batch to batch, and late outputs of an abandoned one must not fit.
                name = f"{run_id}-{index}"
                now_ns = time.monotonic_ns()
                answers[name] = Answer(request, index, Sent(scheduled_ns=now_ns, queued_ns=now_ns, sent_ns=now_ns))
                params = sampling_params(request, sampling, index)
                self.llm.add_request(name, prompt_of(request), params, lora_request=self.adapter)
            while any(answer.finish_reason is None for answer in answers.values()):
                outputs = self.llm.step()
                end_ns = time.monotonic_ns()
                produced = _collect(answers, outputs, end_ns)
                event = step_event(self._recorder.take(), produced, begin_ns, end_ns, workers)
                if event is not None:
                    yield event
                    begin_ns = time.monotonic_ns()
        finally:
            open_names = [name for name, answer in answers.items() if answer.finish_reason is None]
            if open_names:
                self.llm.abort_request(open_names)
        for answer in answers.values():
            yield answer.record()

    def reset(self) -> bool:
        """Forget cached prefixes; False while requests are running."""
        return bool(self.llm.reset_prefix_cache())

    def close(self) -> None:
        """End the engine's processes."""
        self._watch.stop()
        self.llm.engine_core.shutdown()
        del self.llm


def _collect(answers: Mapping[str, Answer], outputs: Sequence[Any], end_ns: int) -> int:
    produced = 0
    for output in outputs:
        answer = answers.get(output.request_id)
        if answer is not None:
            produced += answer.take(output, end_ns)
    return produced
