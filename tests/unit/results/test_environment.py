from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llem_ray.core.errors import ResultsError
from llem_ray.core.power import Device, SamplerInfo
from llem_ray.results.environment import compare, describe_environment, fingerprint, record_session, recorded_sessions
from llem_ray.results.rundir import RunDirectory

H200 = Device(uuid="GPU-1", name="NVIDIA H200", source="nvml", scope="gpu", method="measured_counter")
NODE = SamplerInfo(
    node="n1", hostname="h", pid=1, epoch=0, sample_hz=20.0, devices=(H200, replace(H200, uuid="GPU-2")), calibrations={},
    unavailable={}, host={"nvidia_driver": "580.1", "cpu_model": "EPYC"},
)  # fmt: skip


def test_the_fingerprint_names_what_changes_results() -> None:
    environment = describe_environment(
        ["transformers", "no-such-engine"], [NODE, replace(NODE, node="n2")], {"executor": "inline"}
    )
    marks = fingerprint(environment)
    assert environment.gpus == {"NVIDIA H200": 4}
    assert marks["NVIDIA driver"] == "580.1"
    assert marks["GPU models"] == "NVIDIA H200"
    assert marks["CPU models"] == "EPYC"
    assert {"engine package transformers", "engine package torch", "llem-ray"} <= marks.keys()
    assert not any("no-such-engine" in name or "executor" in name for name in marks)


def test_a_changed_environment_stops_a_resume_unless_mixed_knowingly(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    first = describe_environment(["transformers"], [NODE])
    second = describe_environment(["transformers"], [replace(NODE, host={"nvidia_driver": "590.2", "cpu_model": "EPYC"})])
    record_session(run, first, "2026-01-01T00:00:00Z")
    record_session(run, first, "2026-01-02T00:00:00Z")
    with pytest.raises(ResultsError, match=r"NVIDIA driver: 580\.1 before, 590\.2 now") as caught:
        record_session(run, second, "2026-01-03T00:00:00Z")
    assert "--allow-mixed" in (caught.value.hint or "")
    assert len(recorded_sessions(run)) == 2
    record_session(run, second, "2026-01-03T00:00:00Z", allow_mixed=True)
    sessions = json.loads((run.path / "environment.json").read_text())["sessions"]
    assert [session["changed"] for session in sessions] == [[], [], ["NVIDIA driver: 580.1 before, 590.2 now"]]
    assert sessions[0]["gpus"] == {"NVIDIA H200": 2}


def test_compare_tells_what_came_and_went() -> None:
    assert compare({"a": "1", "b": "2"}, {"a": "1", "c": "3"}) == ("b: 2 before, absent now", "c: absent before, 3 now")


@pytest.mark.parametrize("text", ["{}", '{"sessions": 3}', '{"sessions": [{}]}'])
def test_a_damaged_record_is_one_clear_error(tmp_path: Path, text: str) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    (run.path / "environment.json").write_text(text)
    with pytest.raises(ResultsError, match="has no list of sessions"):
        recorded_sessions(run)
