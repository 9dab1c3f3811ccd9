"""Offline batches: vLLM's LLMEngine, stepped by us. Every step has its exact tokens, every token its time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from llem_ray.backends.load_generator import Sent
from llem_ray.backends.vllm.core_watch import CoreWatch
from llem_ray.backends.vllm.recorder import StepRecorder
from llem_ray.backends.vllm.serving import Answer, prompt_of, sampling_params
from llem_ray.core.backend import LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.errors import GenerationError
from llem_ray.core.spec import SamplingSpec

RPC_TIMEOUT_S: Final = 60.0
TOLD_EVERY_NS: Final = 100_000_000
"""Steps are worked out and told together, this often."""

_run_ids: Final = itertools.count()


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
        self._recorder = StepRecorder(self.llm)
        self._settled = True

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
        """Serve the requests together: StepEvents, ``TOLD_EVERY_NS`` of them at a time, then a RequestRecord for each request.

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
        internal: dict[str, Answer] = {}
        if not self._settled:
            settle(self.llm.engine_core, self.vllm_config.max_concurrent_batches)
        self._settled = False
        self._recorder.begin()
        begin_ns = time.monotonic_ns()
        due_ns = begin_ns + TOLD_EVERY_NS
        try:
            for index, request in enumerate(requests):
                # A name of our own: ids may repeat from batch to batch, and late outputs of an abandoned one must not fit.
                name = f"{run_id}-{index}"
                now_ns = time.monotonic_ns()
                answer = answers[name] = Answer(request, index, Sent(scheduled_ns=now_ns, queued_ns=now_ns, sent_ns=now_ns))
                params = sampling_params(request, sampling, index, RequestOutputKind.FINAL_ONLY)
                internal[self.llm.add_request(name, prompt_of(request), params, lora_request=self.adapter)] = answer
            goes_on = True
            while goes_on:
                outputs = self.llm.step()
                end_ns = time.monotonic_ns()
                self._recorder.note(end_ns)
                for output in outputs:
                    if output.request_id in answers:
                        answers[output.request_id].take_all(output)
                goes_on = self.llm.has_unfinished_requests()
                if end_ns >= due_ns or not goes_on:
                    yield from self._recorder.take(internal, begin_ns, workers)
                    begin_ns = time.monotonic_ns()
                    due_ns = begin_ns + TOLD_EVERY_NS
        finally:
            open_names = [name for name, answer in answers.items() if answer.finish_reason is None]
            if open_names:
                self.llm.abort_request(open_names)
            else:
                self._settled = True
        for answer in answers.values():
            yield answer.record()

    def reset(self) -> bool:
        """Forget cached prefixes; False while requests are running."""
        return bool(self.llm.reset_prefix_cache())

    def close(self) -> None:
        """End the engine's processes."""
        self._watch.stop()
        resources = getattr(self.llm.engine_core, "resources", None)
        self.llm.engine_core.shutdown()
        if resources is not None:
            resources.ctx.destroy(linger=0)  # vLLM closes its sockets, and leaves their context
        del self.llm


def settle(client: Any, batches: int) -> None:
    """Let the steps end that an abandoned run, whose requests are aborted, has left under way, and drop what they tell.

    Args:
        client: vLLM's synchronous ``EngineCoreClient``.
        batches: Steps that vLLM has under way at most.

    Raises:
        EngineDeadError: vLLM's process has ended.
    """
    if not hasattr(client, "outputs_queue"):
        core = client.engine_core
        while core.scheduler.has_requests() or core.batch_queue:
            client.get_output()
        return
    for _ in range(batches + 1):
        # Answered between two steps, each of which ends one of those under way; answers come in the order of the outputs.
        client.call_utility("is_scheduler_paused")
    kept = []
    while not client.outputs_queue.empty():
        told = client.outputs_queue.get_nowait()
        kept += [told] if isinstance(told, Exception) else []
    for error in kept:
        client.outputs_queue.put_nowait(error)
