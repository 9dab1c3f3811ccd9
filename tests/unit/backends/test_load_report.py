"""What an engine sends to the run driver is plain data: whoever unpickles it imports nothing of the engine's."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.core.backend import BackendConfig, Request
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec


class Recorder(pickle.Unpickler):
    """Notes the module of every class it meets."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.modules: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.modules.add(module)
        return super().find_class(module, name)


def modules_of(value: object) -> set[str]:
    recorder = Recorder(pickle.dumps(value, protocol=5))
    recorder.load()
    return recorder.modules


def test_report_ranks_and_records_need_no_engine_to_be_unpickled(tmp_path: Path) -> None:
    config = BackendConfig(
        model=ModelSpec(config="llama-tiny"),
        engine=EngineSpec(engine_args={"num_threads": 1}),
        device="cpu",
        host="h",
        base_dir=str(tmp_path),
        cache_dir=str(tmp_path),
    )
    backend = TransformersBackend(config)
    try:
        report = backend.load()
        request = Request(request_id="r", prompt_token_ids=(5, 6, 7), max_new_tokens=3)
        events = list(backend.run([request], SamplingSpec()))
        assert len(events) > 1
        assert {name.partition(".")[0] for name in modules_of((report, backend.identity(), events))} == {"llem_ray"}
    finally:
        backend.close()
