"""What each step of vLLM's synchronous engine did: noted while it runs, worked out afterwards, many steps at a time.

Between two steps every line of Python costs the engine time, several times over because the model's weights have displaced it
from the caches. So a step is noted by references alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.utils import compute_iteration_details

from llem_ray.backends.vllm.serving import Answer, step_event, told_by
from llem_ray.core.backend import StepEvent


class _Noted(NamedTuple):
    end_ns: int
    outputs: list[Any]
    """EngineCoreOutput of each request that has new tokens."""
    scheduled: Any
    """vLLM's SchedulerOutput, where the scheduler runs in this process."""
    stats: Any
    """vLLM's SchedulerStats, where it runs in another."""


class StepRecorder:
    """Looks at what the engine core hands to the front end, in the front end's place of statistics, which are off.

    A scheduler in this process makes no statistics either: what it has scheduled says it all. One in another process sends
    them with its outputs.

    Args:
        llm: Made with statistics.
    """

    def __init__(self, llm: LLMEngine) -> None:
        self._noted: list[_Noted] = []
        self._outputs: Any = None
        self._scheduled: Any = None
        self._metrics: Any = None
        self._begun = True
        self._get_output = llm.engine_core.get_output
        front: Any = llm
        front.log_stats = front.output_processor.log_stats = False
        front.logger_manager = None
        front.engine_core.get_output = self._output
        core: Any = getattr(front.engine_core, "engine_core", None)
        if core is not None:
            self._metrics = _sums_only(core.scheduler.perf_metrics)
            core.log_stats = core.scheduler.log_stats = core.scheduler.kv_cache_manager.log_stats = False
            core.scheduler.perf_metrics = self

    def is_enabled(self) -> bool:
        """Part of vLLM's ModelMetrics, as whose stand-in the scheduler asks this."""
        return True

    def get_step_perf_stats_per_gpu(self, scheduler_output: Any) -> None:
        """The same: called for every step whose outputs have come, with what was scheduled for it."""
        self._scheduled = scheduler_output

    def begin(self) -> None:
        """A run begins whose first step computes prompts: steps before that one are late ones of the run before."""
        self._noted.clear()
        self._outputs = self._scheduled = None
        self._begun = False

    def note(self, end_ns: int) -> None:
        """A step has ended."""
        if self._outputs is not None:
            self._noted.append(_Noted(end_ns, self._outputs.outputs, self._scheduled, self._outputs.scheduler_stats))
            self._outputs = self._scheduled = None

    def take(self, answers: Mapping[str, Answer], begin_ns: int, workers: int) -> Iterator[StepEvent]:
        """Events of the steps noted since; answers get the times of their tokens. Forgets them.

        Args:
            answers: By vLLM's own names of the requests.
            begin_ns: When the first of these steps began; each other one begins where the one before ended.
            workers: GPUs or processes over which vLLM counts FLOPs and bytes as equal shares.

        Raises:
            GenerationError: There are tokens but no details of their step.
        """
        for noted in self._noted:
            produced = 0
            for output in noted.outputs:
                answer = answers.get(output.request_id)
                if answer is not None:
                    count = len(output.new_token_ids)
                    answer.times_ns += [noted.end_ns] * count
                    produced += count
            details, performance = self._explain(noted)
            if not self._begun:
                self._begun = bool(produced) or (details is not None and details.num_ctx_tokens > 0)
                if not self._begun:
                    begin_ns = noted.end_ns
                    continue
            event = step_event(details, performance, produced, begin_ns, noted.end_ns, workers)
            if event is not None:
                yield event
                begin_ns = noted.end_ns
        self._noted.clear()

    def _explain(self, noted: _Noted) -> tuple[Any, Any]:
        """As ``told_by``."""
        scheduled = noted.scheduled
        if self._metrics is None:
            return told_by(noted.stats)
        if scheduled is None or not scheduled.total_num_scheduled_tokens:
            return None, None
        return compute_iteration_details(scheduled), self._metrics.get_step_perf_stats_per_gpu(scheduled)

    def _output(self) -> Any:
        self._outputs = outputs = self._get_output()
        return outputs


def _sums_only(metrics: Any) -> Any:
    """Have vLLM's ModelMetrics add FLOPs and bytes read up without a name for each part, and leave bytes written out."""
    metrics.get_num_flops_breakdown = lambda step, per_gpu: {"all": metrics.get_num_flops(step, per_gpu)}
    metrics.get_read_bytes_breakdown = lambda step, per_gpu: {"all": metrics.get_read_bytes(step, per_gpu)}
    metrics.get_write_bytes_breakdown = lambda _step, _per_gpu: {}
    return metrics
