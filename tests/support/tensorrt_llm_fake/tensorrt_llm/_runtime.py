"""The LLM class. Traps of the real one that it has:

- arguments cannot be validated without a GPU (``BEHAVIOUR.gpus``);
- a streamed request yields itself, with all tokens so far, and can be iterated only if a loop ran when it was made;
- ``result(timeout)`` ignores its timeout;
- ``end_id`` is required where there is no tokenizer;
- statistics come late and in bunches, from a ring of ``max_stats_len``, and not at all from ``get_stats`` where the first request
  was made in an event loop; once it came back empty-handed, it does so until another request is made;
- iterations are handed out while the next one runs, and their latency counts from before they waited for requests;
- the Ray orchestrator is chosen by an environment variable, too, which is left behind: see ``_ray``.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tensorrt_llm._facts import FACTS, arguments_class

SPECIAL_TOKENS = 3
STEP_S = 0.001
STATS_S = 0.02

BASE_FIELDS = {name: FACTS["torch_llm_args"][name] for name in FACTS["base_llm_args_names"]}
KvCacheConfig = arguments_class("KvCacheConfig", FACTS["kv_cache_config"])


@dataclass
class Behaviour:
    """What a test has the library do."""

    gpus: int = 0
    load_error: BaseException | None = None
    submit_error: BaseException | None = None
    stream_error: BaseException | None = None
    hang_at_token: int | None = None
    stop_at_token: int | None = None
    last_reason: str = "length"
    shutdown_hangs: bool = False
    stats_timestamps: bool = True
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Every call with its arguments."""

    def reset(self) -> None:
        self.__init__(gpus=self.gpus)  # type: ignore[misc]


BEHAVIOUR = Behaviour()


class SamplingParams(arguments_class("SamplingParams", FACTS["sampling_params"])):  # type: ignore[misc]
    """Keyword arguments only."""


class _LlmArgs(arguments_class("BaseLlmArgs", BASE_FIELDS)):  # type: ignore[misc]
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if BEHAVIOUR.gpus == 0:
            raise RuntimeError("No CUDA GPUs are available")
        if str(self.load_format).upper() not in FACTS["torch_llm_args"]["load_format"]["values"]:
            raise ValueError(f"Invalid LoadFormat: {self.load_format}")
        if self.max_batch_size is None:
            self.max_batch_size = 2048
        if os.environ.get("RAY_LOCAL_WORLD_SIZE") is not None:
            self.gpus_per_node = self.tensor_parallel_size
        elif self.gpus_per_node is None:
            self.gpus_per_node = BEHAVIOUR.gpus


class TorchLlmArgs(_LlmArgs):
    model_fields = FACTS["torch_llm_args"]

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        for name in ("ray_worker_extension_cls", "ray_placement_config"):
            if getattr(self, name) is not None and self.orchestrator_type != "ray":
                raise ValueError(f"{name} is only supported with orchestrator_type='ray'")


class TrtLlmArgs(_LlmArgs):
    pass


class CompletionOutput:
    def __init__(self) -> None:
        self.index = 0
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._last = 0

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._last :]


class RequestOutput:
    def __init__(self, request_id: int, prompt: list[int], params: SamplingParams, streaming: bool) -> None:
        self.id = self.request_id = request_id
        self.prompt_token_ids = prompt
        self.sampling_params = params
        self.outputs = [CompletionOutput()]
        self.finished = False
        self._streaming, self._produced, self._launched, self._aborted = streaming, 0, 0, False
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
            self._responses: Any = asyncio.Queue()
        except RuntimeError:
            self._loop, self._responses = None, queue.Queue()

    def abort(self) -> None:
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    def result(self, timeout: float | None = None) -> RequestOutput:
        del timeout  # as the real one does, in effect
        while not self.finished:
            self._handle(self._responses.get())
        return self

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.finished:
            raise StopAsyncIteration
        assert self._loop is not None, "The asyncio event loop was not present during initialization"
        self._handle(await self._responses.get())
        return self

    def _put(self, response: Any) -> None:
        if self._loop is None:
            self._responses.put(response)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._responses.put_nowait, response)

    def _handle(self, response: Any) -> None:
        if isinstance(response, BaseException):
            raise response
        tokens, reason = response
        output = self.outputs[0]
        output._last = len(output.token_ids)
        output.token_ids.extend(tokens)
        output.finish_reason = reason
        self.finished = reason is not None


class LLM:
    _executor: Any = None

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")} | kwargs
        BEHAVIOUR.calls.append(("LLM", dict(given)))
        if kwargs.get("backend", "pytorch") not in FACTS["llm_init"]["backend"]["values"]:
            raise ValueError(f"Invalid backend: {kwargs['backend']}")
        if self._args_class() is TorchLlmArgs and "ray" in (given.get("orchestrator_type"), _orchestrator_of_environment()):
            os.environ["TLLM_DISABLE_MPI"] = "1"
            given["orchestrator_type"] = "ray"
        self._args = self._args_class()(**given)
        if not skip_tokenizer_init:
            raise RuntimeError("this stand-in has no tokenizer")
        self._vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
        if BEHAVIOUR.load_error is not None:
            raise BEHAVIOUR.load_error
        self._workers = self._start_workers(tensor_parallel_size * self._args.pipeline_parallel_size)
        self._ring: deque[dict[str, Any]] = deque(maxlen=getattr(self._args, "max_stats_len", 1000))
        self._stats: queue.Queue[dict[str, Any]] | None = None
        self._stats_are_for_threads = self._stats_done = self._handing_out = False
        self._pending: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        self._running: list[RequestOutput] = []
        self._closing, self._iterations, self._requests = threading.Event(), 0, 0
        self._threads = [threading.Thread(target=call, daemon=True) for call in (self._serve, self._dispatch)]
        for thread in self._threads:
            thread.start()

    def _args_class(self) -> type[_LlmArgs]:
        return TorchLlmArgs

    def _start_workers(self, count: int) -> list[subprocess.Popen[bytes]]:
        """As MPI_Comm_spawn does; they only sleep. With the Ray orchestrator they are actors."""
        needed = min(count, self._args.gpus_per_node)
        if count > 1 and os.environ.get("RAY_LOCAL_WORLD_SIZE") is None and needed > BEHAVIOUR.gpus:
            raise RuntimeError(f"Only {BEHAVIOUR.gpus} GPUs are available, but {count} are required.")
        if getattr(self._args, "orchestrator_type", None) == "ray":
            self._executor = importlib.import_module("tensorrt_llm._ray").RayExecutor(self._args, count)
            return []
        if count > BEHAVIOUR.gpus:
            raise ValueError(f"world size {count} exceeds the {BEHAVIOUR.gpus} GPUs of the node")
        if count == 1 and os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS") == "1":
            return []
        command = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
        return [subprocess.Popen(command, env=os.environ | {"OMPI_COMM_WORLD_RANK": str(rank)}) for rank in range(count)]

    def generate(
        self,
        inputs: list[int] | list[list[int]],
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        one = isinstance(inputs[0], int)
        outputs = [self.generate_async(ids, sampling_params, cache_salt=cache_salt) for ids in ([inputs] if one else inputs)]
        for output in outputs:
            output.result()
        return outputs[0] if one else outputs

    def generate_async(
        self,
        inputs: list[int],
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        trace_headers: Any = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        BEHAVIOUR.calls.append(("generate_async", {"inputs": inputs, "params": sampling_params, "cache_salt": cache_salt}))
        if BEHAVIOUR.submit_error is not None:
            raise BEHAVIOUR.submit_error
        params = sampling_params or SamplingParams()
        if params.end_id is None:
            raise ValueError("tokenizer is required to initialize SamplingParams: pass end_id")
        chunked, longest = self._args.enable_chunked_prefill, self._args.max_num_tokens
        if not chunked and len(inputs) > longest:
            raise ValueError(f"The sum of prompt length ({len(inputs)}) should not exceed max_num_tokens ({longest})")
        self._requests += 1
        output = RequestOutput(self._requests, list(inputs), params, streaming)
        if self._stats is None:
            self._stats, self._stats_are_for_threads = queue.Queue(), output._loop is None
        self._stats_done = False
        self._pending.put(output)
        return output

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        if self._executor is not None:
            raise NotImplementedError("get_stats is not implemented")
        if self._stats is None:
            return []
        if not self._stats_are_for_threads:
            raise RuntimeError("the statistics belong to an event loop: the first request was made in one")
        found: list[dict[str, Any]] = []
        while not self._stats_done:
            try:
                found.append(self._stats.get(timeout=timeout))
            except queue.Empty:
                # A busy machine may stop the threads of this stand-in for long; the real ones are in processes of their own.
                self._stats_done = not (self._ring or self._running or self._handing_out)
        return found

    def _collective_rpc(
        self,
        method: str,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
    ) -> list[Any]:
        if self._executor is None:
            raise ValueError(f"Executor does not support collective RPC: {method}")
        return list(self._executor.collective_rpc(method, args, kwargs, non_block, unique_reply_rank))

    def shutdown(self) -> None:
        while BEHAVIOUR.shutdown_hangs:
            time.sleep(0.05)
        self._closing.set()
        for worker in self._workers:
            worker.terminate()
            worker.wait()
        for thread in self._threads:
            thread.join()
        if self._executor is not None:
            self._executor.shutdown()

    def _dispatch(self) -> None:
        while not self._closing.wait(STATS_S):
            while self._ring and self._stats is not None:
                self._stats.put(self._ring.popleft())

    def _serve(self) -> None:
        """Continuous batching, the results of an iteration handed out while the next one runs."""
        overlapped = isinstance(self._args, TorchLlmArgs) and not self._args.disable_overlap_scheduler
        previous: tuple[Any, ...] | None = None
        while not self._closing.is_set():
            waiting_s = time.time()
            new = self._fetch(block=previous is None)
            batch = self._launch(new, waiting_s)
            if batch is None and previous is None:
                continue
            time.sleep(STEP_S)
            if self._executor is not None and not self._executor.step():
                self._closing.wait()
                break
            if previous is not None:
                self._hand_out(*previous)
            previous = batch
            if previous is not None and not overlapped:
                self._hand_out(*previous)
                previous = None

    def _fetch(self, block: bool) -> list[RequestOutput]:
        new: list[RequestOutput] = []
        while len(self._running) + len(new) < self._args.max_batch_size:
            wait = block and not self._running and not new
            try:
                new.append(self._pending.get(timeout=0.05 if wait else None, block=wait))
            except queue.Empty:
                break
        return new

    def _launch(self, new: list[RequestOutput], waiting_s: float) -> tuple[Any, ...] | None:
        decoding = [r for r in self._running if r._launched < r.sampling_params.max_tokens and not r.finished]
        if not new and not decoding:
            return None
        self._running += new
        for request in new + decoding:
            request._launched += 1
        return new, decoding, waiting_s, datetime.now()

    def _hand_out(self, new: list[RequestOutput], decoding: list[RequestOutput], waiting_s: float, begun: datetime) -> None:
        self._handing_out = True
        for request in new + decoding:
            self._answer(request)
        self._iterations += 1
        if getattr(self._args, "enable_iter_perf_stats", True):
            row = dict.fromkeys(FACTS["metrics"]["iteration_stats"]["keys"], 0)
            row["inflightBatchingStats"] = dict.fromkeys(FACTS["metrics"]["iteration_stats"]["inflightBatchingStats"], 0) | {
                "numContextRequests": len(new),
                "numGenRequests": len(decoding),
                "numCtxTokens": sum(len(request.prompt_token_ids) for request in new),
            }
            stamp = begun.strftime("%m-%d-%Y %H:%M:%S.%f") if BEHAVIOUR.stats_timestamps else ""
            self._ring.append(
                row | {"timestamp": stamp, "iter": self._iterations, "iterLatencyMS": 1e3 * (time.time() - waiting_s)}
            )
        self._handing_out = False

    def _answer(self, request: RequestOutput) -> None:
        if request not in self._running or (request._produced == BEHAVIOUR.hang_at_token and not request._aborted):
            return
        params = request.sampling_params
        response: Any
        if BEHAVIOUR.stream_error is not None:
            response = BEHAVIOUR.stream_error
        elif request._aborted:
            response = ([], "cancelled")
        else:
            token = self._token(request)
            request._produced += 1
            ends = {params.end_id, *(params.stop_token_ids or [])}
            stops = token in ends or request._produced == BEHAVIOUR.stop_at_token
            reason = "stop" if stops else BEHAVIOUR.last_reason if request._produced == params.max_tokens else None
            response = ([token], reason)
        if isinstance(response, BaseException) or response[1] is not None:
            self._running.remove(request)
        request._put(response)

    def _token(self, request: RequestOutput) -> int:
        params = request.sampling_params
        seed = params.seed if params.temperature else 0
        ordinary = self._vocab_size - SPECIAL_TOKENS
        start = zlib.crc32(repr((tuple(request.prompt_token_ids), seed)).encode())
        return SPECIAL_TOKENS + (start + 7919 * request._produced) % ordinary


def _orchestrator_of_environment() -> str | None:
    return "ray" if os.environ.get("TLLM_DISABLE_MPI") == "1" else None


class TrtLLM(LLM):
    def _args_class(self) -> type[_LlmArgs]:
        return TrtLlmArgs
