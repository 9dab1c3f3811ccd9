"""init, validate, schema, plan, doctor, as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from model_configs import LLAMA_3_70B

from llem_ray.config.sweep import load_sweep


def test_init_writes_a_sweep_that_is_valid_and_a_schema_that_accepts_it(llem, tmp_path: Path) -> None:
    ended = llem("init")
    assert ended.code == 0
    text = (tmp_path / "sweep.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=sweep.schema.json\n")
    jsonschema.validate(yaml.safe_load(text), json.loads((tmp_path / "sweep.schema.json").read_text()))
    assert llem("validate", "sweep.yaml").out == "sweep.yaml: valid: 4 cells x 2 repeats = 8 trials\n"
    assert llem("plan", "sweep.yaml").code == 0


def test_the_sample_measures_what_the_quickstart_does(llem, tmp_path: Path) -> None:
    llem("init")
    quickstart = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
    sample, other = load_sweep(tmp_path / "sweep.yaml"), load_sweep(quickstart)
    assert [cell.cell_id for cell in sample.cells] == [cell.cell_id for cell in other.cells]


def test_init_replaces_nothing_unasked(llem, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("precious")
    ended = llem("init", "mine.yaml")
    assert ended.code == 2
    assert "mine.yaml: the file exists" in ended.err
    assert (tmp_path / "mine.yaml").read_text() == "precious"
    assert llem("init", "mine.yaml", "--force").code == 0
    assert "schema_version" in (tmp_path / "mine.yaml").read_text()


def test_init_into_a_folder_and_into_nowhere(llem, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    assert llem("init", "study").code == 0
    assert (tmp_path / "study" / "sweep.yaml").is_file()
    ended = llem("init", "absent/sweep.yaml")
    assert ended.code == 2
    assert "cannot be written: No such file or directory" in ended.err


def test_validate_counts_what_is_dropped(llem, sweep: Path) -> None:
    sweep.write_text(sweep.read_text() + "exclude:\n  - {workload.batch_size: 2}\n")
    assert llem("validate", sweep).out == f"{sweep}: valid: 1 cell x 2 repeats = 2 trials, 1 cell dropped\n"


def test_validate_takes_overrides(llem, sweep: Path) -> None:
    ended = llem("validate", sweep, "--set", "repeats=5", "--set", "sweep.workload.batch_size={pow2: [1, 8]}")
    assert ended.out == f"{sweep}: valid: 4 cells x 5 repeats = 20 trials\n"


def test_schema_is_the_one_that_is_shipped(llem) -> None:
    shipped = Path(__file__).parents[3] / "docs" / "sweep.schema.json"
    assert json.loads(llem("schema").out) == json.loads(shipped.read_text())


def test_plan_tells_everything_in_80_columns(llem, sweep: Path) -> None:
    ended = llem("plan", sweep)
    assert ended.code == 0
    assert max(map(len, ended.out.splitlines())) <= 80
    for part in (
        "2 cells x 2 repeats = 4 trials",
        "1 model load",
        "llama-tiny",
        "fake",
        "batch_size=2",
        "Time: unknown",
        "Energy",
    ):
        assert part in ended.out
    assert ended.err == ""


def test_plan_as_json_is_the_plan(llem, sweep: Path) -> None:
    plan = json.loads(llem("plan", sweep, "--json").out)
    assert plan["counts"] == {"cells": 2, "trials": 4, "loads": 1, "dropped": 0}
    assert [trial["repeat"] for trial in plan["groups"][0]["trials"]] == [0, 0, 1, 1]


def test_doctor_names_engines_and_meters_with_what_to_do(llem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLEM_RAY_REPLAY", raising=False)
    ended = llem("doctor")
    assert ended.code == 0
    for part in ("  ok  fake", "  ok  transformers", "device: cpu", f"interpreter: {sys.executable} (Python 3."):
        assert part in ended.out
    assert {"nvml", "rapl", "codecarbon", "replay"} <= set(ended.out.split())
    assert "  no  replay" in ended.out
    assert "hint: set LLEM_RAY_REPLAY" in ended.out


def huge(sweep: Path) -> list[str]:
    """Overrides that take a model larger than any host."""
    (sweep.parent / "huge.json").write_text(json.dumps(LLAMA_3_70B | {"num_hidden_layers": 10_000}))
    return ["--set", "base.engine.backend=transformers", "--set", "base.model.config=huge.json"]


def test_doctor_asks_the_interpreters_of_a_sweep_and_tells_what_does_not_fit(llem, sweep: Path, only_fake: None) -> None:
    interpreter = ("--set", f"base.engine.python={sys.executable}")
    report = json.loads(llem("doctor", sweep, *interpreter, "--json").out)
    assert [(engine["name"], engine["interpreter"], engine["importable"]) for engine in report["engines"]] == [
        ("fake", sys.executable, True),
        ("fake", sys.executable, True),
    ]
    assert [item["unknown"] for item in report["memory"]] == ["how much the fake engine takes is its own affair"]
    assert report["problems"] == []
    too_large = huge(sweep)
    ended = llem("doctor", sweep, *too_large)
    assert ended.code == 5
    assert "  no  " in ended.out.partition("model loads of the sweep:")[2]
    assert "parameters x 4 B" in ended.out
    planned = llem("plan", sweep, *too_large)
    assert "load 1 does not fit here: it needs at least" in " ".join(planned.out.split())


def test_doctor_does_not_approve_of_a_load_for_gpus_that_are_not_here(llem, sweep: Path, only_fake: None) -> None:
    on_gpu = [
        "--set",
        "base.engine.backend=transformers",
        "--set",
        "base.model.config=llama-tiny",
        "--set",
        "base.engine.device=cuda",
    ]
    ended = llem("doctor", sweep, *on_gpu)
    told = ended.out.partition("model loads of the sweep:")[2]
    assert "on each GPU, of which there is none here" in told
    assert "  ok  " not in told
    assert "needs 1 GPU, this host has 0" in told
    assert ended.code == 5
    assert "needs 1 GPU, this host has 0" in ended.err


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["base.engine.engine_args={decode_msec: 1}"], 2, "engine.engine_args.decode_msec: unknown engine argument"),
        (["base.engine.python=absent/python"], 2, "no such interpreter"),
        (["base.engine.backend=nothing"], 5, "unknown engine 'nothing'"),
        (["base.workload.prompts={source: file, path: absent.jsonl}"], 2, "absent.jsonl"),
        # What is wrong in the sweep is told before what is missing.
        (["base.engine.device=cuda", "base.workload.prompts={source: file, path: absent.jsonl}"], 2, "absent.jsonl"),
    ],
)
def test_doctor_refuses_what_submit_would_refuse(
    llem, sweep: Path, only_fake: None, overrides: list[str], code: int, says: str
) -> None:
    flags = [part for override in overrides for part in ("--set", override)]
    refused = llem("doctor", sweep, *flags)
    assert refused.code == code
    assert says in refused.err
    assert "inference engines:" in refused.out
    assert "Traceback" not in refused.err
    submitted = llem("submit", sweep, *flags)
    assert submitted.code == code
    report = llem("doctor", sweep, *flags, "--json")
    assert report.code == code
    assert says in json.loads(report.out)["problems"][0]


def test_doctor_approves_of_a_sweep_that_can_run(llem, sweep: Path, only_fake: None) -> None:
    ended = llem("doctor", sweep)
    assert (ended.code, ended.err) == (0, "")


def test_doctor_looks_for_room_where_the_sweep_would_run(llem, sweep: Path, only_fake: None) -> None:
    on_host = [*huge(sweep), "--set", "base.engine.device=auto"]
    told = llem("doctor", sweep, *on_host).out.partition("model loads of the sweep:")[2]
    assert "  no  " in told
    assert "on each host" in told


def test_a_model_that_cannot_fit_is_not_submitted(llem, sweep: Path) -> None:
    refused = llem("submit", sweep, *huge(sweep))
    assert refused.code == 5
    assert "needs at least" in refused.err
    assert "parameters x 4 B" in refused.err


def test_doctor_overrides_need_a_sweep(llem) -> None:
    ended = llem("doctor", "--set", "base.engine.device=cpu")
    assert ended.code == 2
    assert "there is no sweep" in ended.err


def test_doctor_shows_the_devices_of_a_meter(llem, recording: Path, only_fake: None) -> None:
    report = json.loads(llem("doctor", "--json").out)
    replay = next(source for source in report["sources"] if source["name"] == "replay")
    assert [device["uuid"] for device in replay["devices"]] == ["package"]
    assert report["can_measure"] is True
    assert "replay of package [package] cpu_package, measured_counter" in llem("doctor").out


def test_a_reader_that_goes_away_gets_no_complaint(sweep: Path) -> None:
    for command in ("schema", f"plan {sweep} --json", f"plan {sweep}", "doctor"):
        script = f"{sys.executable} -m llem_ray {command} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode in {0, 1}
        assert done.stderr == ""
