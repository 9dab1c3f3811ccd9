"""Online serving: vLLM's AsyncLLM in an event loop of its own thread; scheduler and model run in vLLM's own process.

Requests are paced by the load generator's thread, answered by one task each, and reach the caller through a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, Final, TypeVar

from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from llem_ray.backends.load_generator import LoadGenerator, Sent
from llem_ray.backends.vllm.serving import Answer, prompt_of, sampling_params, step_event, told_by
from llem_ray.core.backend import LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.errors import BackendError, GenerationError, HangError
from llem_ray.core.spec import SamplingSpec

T = TypeVar("T")

LOAD_S: Final = 6 * 3600.0
"""Longest load. vLLM's own limit for its process, VLLM_ENGINE_READY_TIMEOUT_S, is shorter by default."""
STEP_S: Final = 300.0
"""Longest silence while requests are in flight."""
DETAILS_S: Final = 10.0
"""Longest wait for the statistics of the last step, once all tokens are there."""
RPC_S: Final = 60.0
CLOSE_S: Final = 30.0
_LOOK_S: Final = 0.2

_run_ids: Final = itertools.count()


class _Run:
    """One call of ``serve``. ``in_flight`` and ``tasks`` belong to the event loop's thread."""

    def __init__(self, sampling: SamplingSpec, workers: int) -> None:
        self.name = f"online-{next(_run_ids)}"
        self.sampling = sampling
        self.workers = workers
        self.indices = itertools.count()
        self.events: queue.SimpleQueue[StepEvent | Answer | Exception] = queue.SimpleQueue()
        self.generator: LoadGenerator | None = None
        self.begun = False
        """Its first step has ended, which computes prompts: steps before that one are late ones of the run before."""
        self.in_flight: dict[int, int] = {}
        """When each unanswered request was handed over, oldest first."""
        self.tasks: set[asyncio.Task[None]] = set()


class StepStream:
    """Stands in for vLLM's own loggers: hands every step to the run that is being served.

    A step begins where the one before ended, or, when nothing was in flight then, with the request that came next.
    """

    def __init__(self) -> None:
        self.run: _Run | None = None
        self._end_ns = 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:  # noqa: ARG002
        """Called by the engine's output handler once a step's outputs are there, by these names."""
        end_ns, run = time.monotonic_ns(), self.run
        if run is None:
            return
        produced = iteration_stats.num_generation_tokens if iteration_stats is not None else 0
        begin_ns = max(self._end_ns, next(iter(run.in_flight.values()), self._end_ns))
        try:
            details, performance = told_by(scheduler_stats)
            run.begun = run.begun or (details is not None and details.num_ctx_tokens > 0)
            if details is not None and not run.begun:
                self._end_ns = end_ns
                return
            event = step_event(details, performance, produced, begin_ns, end_ns, run.workers)
        except Exception as error:  # noqa: BLE001 - raised in the thread that serves; here it would end vLLM's handler
            run.events.put(error)
            return
        if event is not None:
            self._end_ns = end_ns
            run.events.put(event)

    def log(self) -> None:
        """Part of vLLM's interface."""


class OnlineEngine:
    """vLLM's asynchronous engine behind a synchronous face.

    Args:
        vllm_config: vLLM's validated config.
        step_timeout_s: Longest silence while requests are in flight.

    Raises:
        HangError: vLLM's process was not ready in time.
    """

    def __init__(self, vllm_config: Any, step_timeout_s: float = STEP_S) -> None:
        self.vllm_config = vllm_config
        self.adapter: LoRARequest | None = None
        self._step_timeout_s = step_timeout_s
        self._steps = StepStream()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llem-ray-vllm", daemon=True)
        self._thread.start()
        try:
            self.llm = self._call(self._construct(vllm_config), LOAD_S, "load")
        except BaseException:
            self._end_loop()
            raise

    def describe_workers(self) -> list[dict[str, Any]]:
        """What each worker tells of itself."""
        asked = self.llm.collective_rpc("llem_ray_describe", timeout=RPC_S)
        described: list[dict[str, Any]] = self._call(asked, 2 * RPC_S, "a call to the workers")
        return described

    def add_adapter(self, adapter: LoRARequest) -> None:
        """Load a LoRA adapter; every request uses it from now on."""
        self._call(self.llm.add_lora(adapter), LOAD_S, "the load of an adapter")
        self.adapter = adapter

    def serve(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule | None, workers: int
    ) -> Iterator[StepEvent | RequestRecord]:
        """Yield every step as it ends, and a record as each request is answered; without a schedule records come last, in order.

        Args:
            requests: Valid ones, within the context.
            sampling: How tokens are chosen.
            schedule: When they are sent. None: at once.
            workers: How many the engine has.

        Raises:
            GenerationError: A fixed-length request ended early, or vLLM would not take one.
            HangError: Requests are in flight and nothing came.
        """
        run = _Run(sampling, workers)
        whole = False
        self._steps.run = run
        try:
            if schedule is None:
                self._send_all(run, requests)
            else:
                run.generator = LoadGenerator(requests, schedule, lambda request: self._send(run, request))
                run.generator.start()
            answers: list[Answer] = []
            for event in self._events(run, len(requests)):
                if isinstance(event, StepEvent):
                    yield event
                elif schedule is None:
                    answers.append(event)
                else:
                    yield event.record()
            whole = True
        finally:
            if run.generator is not None:
                run.generator.stop()
            if not whole:
                with contextlib.suppress(BackendError, EngineDeadError):  # whatever it is, the next run meets it too
                    self._call(self._abandon(run), RPC_S, "the end of an abandoned run")
            self._steps.run = None
        for answer in sorted(answers, key=lambda answer: answer.row):
            yield answer.record()

    def reset(self) -> bool:
        """Forget cached prefixes; False while requests are running."""
        return bool(self._call(self.llm.reset_prefix_cache(), RPC_S, "the reset of the prefix cache"))

    def close(self) -> None:
        """End vLLM's processes and the event loop. Bounded in time: who does not end is killed."""
        try:
            with contextlib.suppress(HangError):
                self._call(self._shut_down(), CLOSE_S, "close")
        finally:
            self._end_loop()
            del self.llm

    def _events(self, run: _Run, count: int) -> Iterator[StepEvent | Answer]:
        """Steps and answers, until ``count`` requests are answered and all their tokens have been seen in steps."""
        answered, delivered, stepped, last_s = 0, 0, 0, time.monotonic()
        while answered < count or stepped < delivered:
            if run.generator is not None:
                run.generator.check()
            try:
                event = run.events.get(timeout=_LOOK_S)
            except queue.Empty:
                last_s = last_s if run.in_flight or answered == count else time.monotonic()
                self._check_silence(time.monotonic() - last_s, answered == count)
                continue
            last_s = time.monotonic()
            if isinstance(event, Exception):
                raise (event.__cause__ or event) if isinstance(event, EngineGenerateError) else event
            if isinstance(event, StepEvent):
                stepped += event.decode_tokens
            else:
                answered += 1
                delivered += len(event.token_ids)
            yield event

    def _check_silence(self, silence_s: float, all_answered: bool) -> None:
        if self.llm.errored:
            raise EngineDeadError
        if all_answered and silence_s > DETAILS_S:
            raise GenerationError("vLLM returned tokens without the details of their step", "llem-ray supports vLLM 0.32")
        if silence_s > self._step_timeout_s:
            raise HangError(f"vLLM has requests in flight and was silent for {silence_s:.1f} s")

    def _send(self, run: _Run, request: Request) -> None:
        """In the load generator's thread, which must not wait."""
        self._loop.call_soon_threadsafe(self._start, run, request, None, time.monotonic_ns())

    def _send_all(self, run: _Run, requests: Sequence[Request]) -> None:
        def start() -> None:
            for request, sent in sent_at:
                self._start(run, request, sent, sent.sent_ns)

        sent_at = []
        for request in requests:
            now_ns = time.monotonic_ns()
            sent_at.append((request, Sent(scheduled_ns=now_ns, queued_ns=now_ns, sent_ns=now_ns)))
        self._loop.call_soon_threadsafe(start)

    def _start(self, run: _Run, request: Request, sent: Sent | None, handed_ns: int) -> None:
        index = next(run.indices)
        run.in_flight[index] = handed_ns
        task = self._loop.create_task(self._answer(run, Answer(request, index, sent)))
        run.tasks.add(task)
        task.add_done_callback(run.tasks.discard)

    async def _answer(self, run: _Run, answer: Answer) -> None:
        request = answer.request
        params = sampling_params(request, run.sampling, answer.row, RequestOutputKind.DELTA)
        event: Answer | Exception = answer
        try:
            name = f"{run.name}-{answer.row}"
            async for output in self.llm.generate(prompt_of(request), params, name, lora_request=self.adapter):
                answer.take(output, time.monotonic_ns())
            if run.generator is not None:
                ended_ns = answer.times_ns[-1] if answer.times_ns else None
                answer.sent = run.generator.done(request.request_id, answer.token_ids, ended_ns)
        except Exception as error:  # noqa: BLE001 - raised in the thread that serves
            event = error
        finally:
            run.in_flight.pop(answer.row)
        run.events.put(event)

    async def _abandon(self, run: _Run) -> None:
        """Abort what is in flight; returns once vLLM has freed it, so that none of its steps falls into the next run."""
        tasks = tuple(run.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while not await self.llm.reset_prefix_cache():
            await asyncio.sleep(0.01)
        for _ in range(self.vllm_config.max_concurrent_batches):  # see ``offline.settle``
            await self.llm.is_paused()
        while not self.llm.engine_core.outputs_queue.empty():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)

    async def _construct(self, vllm_config: Any) -> Any:
        llm: Any = AsyncLLM.from_vllm_config(vllm_config)
        # As offline: vLLM's own loggers would format a Prometheus page's worth of counters in every step.
        llm.logger_manager = llm._logger_ref[0] = self._steps
        return llm

    async def _shut_down(self) -> None:
        self.llm.shutdown()
        self.llm.engine_core.resources.ctx.destroy(linger=0)  # vLLM closes its sockets, and leaves their context
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _call(self, coroutine: Coroutine[Any, Any, T], timeout_s: float, during: str) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            if future.done():  # of the coroutine's own
                raise
            future.cancel()
            raise HangError(f"vLLM did not answer during {during} within {timeout_s:g} s") from error

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()
