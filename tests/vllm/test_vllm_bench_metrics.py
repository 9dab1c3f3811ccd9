"""The restated formulas of `vllm bench serve` against vLLM's own code."""

from __future__ import annotations

import random
from importlib import import_module

import pytest
from vllm_bench import PERCENTILES, Output, calculate_metrics

GOODPUT_MS = {"ttft": 400.0, "tpot": 60.0, "e2el": 3000.0}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(5))
def test_the_formulas_are_those_of_vllm(seed: int) -> None:
    serve = import_module("vllm.benchmarks.serve")
    client = import_module("vllm.benchmarks.lib.endpoint_request_func")
    draws = random.Random(seed)
    outputs = []
    for _ in range(40):
        gaps = [draws.uniform(0.01, 0.1) for _ in range(draws.randint(0, 20))]
        ttft = draws.uniform(0.05, 0.8)
        outputs.append(
            Output(
                success=draws.random() > 0.2,
                prompt_len=draws.randint(1, 99),
                output_tokens=len(gaps) + 1,
                start_time=draws.uniform(0, 5),
                ttft=ttft,
                latency=ttft + sum(gaps),
                itl=gaps,
            )
        )
    theirs = [client.RequestFuncOutput(**vars(output)) for output in outputs]
    found, _ = serve.calculate_metrics([], theirs, 7.5, None, list(PERCENTILES), GOODPUT_MS)
    restated = calculate_metrics(outputs, 7.5, GOODPUT_MS)
    assert restated
    for key, value in restated.items():
        own = getattr(found, key)
        if key.startswith("percentiles"):
            own, value = [v for _, v in own], [v for _, v in value]  # noqa: PLW2901
        assert own == pytest.approx(value, rel=1e-12), key
