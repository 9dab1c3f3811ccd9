"""Bad input as a user meets it: one clear message that says where, the documented exit code, and nothing left behind."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llem_ray.core.plugins import install_command

BAD_SWEEPS = {
    "unknown key": ("repeats: 2", "repaets: 2", ["sweep.yaml:9", "repaets", "did you mean", "repeats"]),
    "unknown nested key": ("input_tokens: 8", "inputtokens: 8", ["sweep.yaml:6", "inputtokens", "input_tokens"]),
    "wrong type": ("repeats: 2", "repeats: many", ["sweep.yaml:9", "repeats", "many"]),
    "out of range": ("min_window_s: 0.2", "min_window_s: 0", ["sweep.yaml:10", "min_window_s", "0"]),
    "empty axis": ("batch_size: [1, 2]", "batch_size: []", ["sweep.yaml:8", "workload.batch_size"]),
    "unresolved variable": ("name: tiny", "name: ${LLEM_NO_SUCH_VARIABLE}", ["sweep.yaml:2", "LLEM_NO_SUCH_VARIABLE"]),
    "duplicate key": ("repeats: 2", "repeats: 2\nrepeats: 3", ["duplicate key", "sweep.yaml:10"]),
    "python tag": ("name: tiny", "name: !!python/object/apply:os.system ['true']", ["sweep.yaml:2", "tag"]),
    "over the limit": ("batch_size: [1, 2]", "seed: {range: [1, 4000000, 1]}", ["4,000,000"]),
    "expands to nothing": ("repeats: 2", "repeats: 2\nexclude: [{workload.output_tokens: 4}]", ["expands to nothing", "exclude"]),
    "an access token": ("name: tiny", "name: hf_abcdefghijklmnopqrstuvwx", ["access token", "HF_TOKEN"]),
}


@pytest.mark.parametrize("name", BAD_SWEEPS)
@pytest.mark.parametrize("command", ["validate", "plan", "submit"])
def test_a_bad_sweep_is_refused(llem, sweep: Path, command: str, name: str) -> None:
    good, bad, says = BAD_SWEEPS[name]
    text = sweep.read_text()
    assert good in text
    sweep.write_text(text.replace(good, bad))
    ended = llem(command, sweep)
    assert ended.code == 2, ended
    assert ended.err.startswith("error: ")
    assert ended.err.count("error: ") == 1
    assert "Traceback" not in ended.err
    for part in says:
        assert part.lower() in ended.err.lower()
    assert "hf_abcdef" not in ended.err
    assert not Path("runs").exists()


FILES = {
    "missing": (None, "No such file"),
    "empty": (b"", "empty"),
    "binary": (bytes(range(256)) * 16, "not a text file"),
    "huge": (b"name: x\n" * 7_000_000, "too large"),
    "alias bomb": (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 106)),
        "alias",
    ),
    "a list": (b"- 1\n- 2\n", "mapping"),
    "not YAML": (b"a: [1\nb: 2\n", "not valid YAML"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_sweep_is_refused(llem, tmp_path: Path, name: str) -> None:
    content, says = FILES[name]
    if content is not None:
        (tmp_path / "bad.yaml").write_bytes(content)
    ended = llem("submit", "bad.yaml")
    assert ended.code == 2
    assert says in ended.err
    assert ended.err.startswith("error: bad.yaml")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("repeats", "key=value"),
        ("=3", "key=value"),
        ("repaets=3", "repeats"),
        ("repeats=x", "--set repeats=x"),
        ("workload.batch_sizee=3", "batch_size"),
        ("name=[", "not valid YAML"),
        ("repeats.deep=1", "repeats"),
    ],
)
def test_a_bad_override_is_refused(llem, sweep: Path, override: str, says: str) -> None:
    ended = llem("submit", sweep, "--set", override)
    assert ended.code == 2
    assert says in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "prompts.jsonl"),
        ("", "prompts.jsonl"),
        ('{"prompt": "a"}\n{"prompt": \n', "prompts.jsonl:2"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "prompts.jsonl:2"),
        ('{"prompt": 3}\n', "prompts.jsonl:1"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(llem, sweep: Path, tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "prompts.jsonl").write_text(content)
    ended = llem("submit", "--inline", sweep, "--set", "workload.prompts={source: file, path: prompts.jsonl}")
    assert ended.code == 2
    assert says in ended.err
    assert not Path("runs").exists()


def llama_config(**changes: object) -> dict[str, object]:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 512}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, **changes}


@pytest.mark.parametrize(
    ("files", "model", "says"),
    [
        (None, "{id: ./model}", "model"),
        ({}, "{id: ./model}", "config.json"),
        ({"config.json": "{broken"}, "{id: ./model}", "config.json"),
        ({"config.json": json.dumps({"a": 1})}, "{id: ./model}", "config.json"),
        (None, "{config: ./absent/config.json}", "absent/config.json"),
        (None, "{config: no-such-builtin}", "llama-tiny"),
        ({"config.json": json.dumps(llama_config())}, "{config: ./model/config.json, tokenizer: ./nowhere}", "nowhere"),
    ],
)
def test_a_bad_model_is_refused_before_anything_runs(
    llem, sweep: Path, tmp_path: Path, files: dict[str, str] | None, model: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if files is not None:
        (tmp_path / "model").mkdir()
        for name, text in files.items():
            (tmp_path / "model" / name).write_text(text)
    sweep.write_text(sweep.read_text().replace("{config: llama-tiny}", model).replace("backend: fake", "backend: transformers"))
    ended = llem("submit", "--inline", sweep)
    assert ended.code == 2, ended
    assert says in ended.err
    assert "Traceback" not in ended.err
    assert not Path("runs").exists()


def test_an_unknown_engine_names_the_known_ones(llem, sweep: Path) -> None:
    ended = llem("submit", sweep, "--set", "engine.backend=vlm")
    assert ended.code == 5
    assert "unknown engine 'vlm'; known: fake, " in ended.err


def test_an_unknown_engine_argument_is_refused(llem, sweep: Path) -> None:
    ended = llem("submit", sweep, "--set", "engine.engine_args={decode_sm: 3}")
    assert ended.code == 2
    assert "decode_sm" in ended.err
    assert "decode_ms" in ended.err
    assert "from --set engine.engine_args" in ended.err
    text = sweep.read_text()
    sweep.write_text(text.replace("engine: {", "engine: {engine_args: {decode_sm: 3}, "))
    line = next(number for number, line in enumerate(sweep.read_text().splitlines(), 1) if "decode_sm" in line)
    for command in ("submit", "doctor"):
        ended = llem(command, sweep)
        assert ended.code == 2
        assert f"sweep.yaml:{line}: engine.engine_args.decode_sm: unknown engine argument\n  found: decode_sm\n" in ended.err


def test_an_engine_that_is_not_installed_comes_with_the_pip_command(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *more: None if name == 'torch' else find(name, *more)\n"
    )
    command = [sys.executable, "-m", "llem_ray", "submit", "--inline", str(sweep), "--set", "engine.backend=transformers"]
    path = os.pathsep.join(filter(None, (str(tmp_path / "blocked"), os.environ.get("PYTHONPATH"))))
    environ = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "torch, not installed here" in done.stderr
    assert install_command("transformers") in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_gpus_that_are_not_there_are_refused(llem, sweep: Path) -> None:
    ended = llem("submit", "--inline", sweep, "--set", "engine.device=cuda", "--set", "engine.tensor_parallel=2")
    assert ended.code == 5
    assert "2 GPUs" in ended.err


def test_a_power_source_that_cannot_work_is_refused(llem, sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLEM_RAY_REPLAY", raising=False)
    ended = llem("submit", "--inline", sweep)
    assert ended.code == 4
    assert "LLEM_RAY_REPLAY" in ended.err
    monkeypatch.setenv("LLEM_RAY_REPLAY", "absent.csv")
    ended = llem("submit", "--inline", sweep)
    assert ended.code == 2
    assert "absent.csv" in ended.err
    ended = llem("submit", "--inline", sweep, "--set", "measure.sources=[wattmeter]")
    assert ended.code == 5
    assert "unknown power source 'wattmeter'" in ended.err


def test_a_results_folder_that_is_a_file_is_refused(llem, sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    ended = llem("submit", "--inline", sweep)
    assert ended.code == 5
    assert "runs" in ended.err
    assert "Traceback" not in ended.err
    assert (tmp_path / "runs").read_text() == "in the way"


@pytest.mark.parametrize("command", [("validate",), ("plan",), ("submit", "--inline")])
def test_tokens_beyond_the_context_are_refused_before_anything_starts(
    command: tuple[str, ...], llem, sweep: Path, tmp_path: Path, recording: Path
) -> None:
    sweep.write_text(
        sweep.read_text().replace("backend: fake", "backend: transformers").replace("output_tokens: 4", "output_tokens: 2041")
    )
    ended = llem(*command, sweep)
    assert ended.code == 2, ended
    assert "sweep.yaml:6: workload.output_tokens: request 0 is too long for the model: 8 prompt + 2041 output = 2049" in ended.err
    assert "found: 2041" in ended.err
    assert "allowed: at most 2048 tokens together, the model's context" in ended.err
    assert not (tmp_path / "runs").exists()


@contextmanager
def small_disk(path: Path, options: str) -> Iterator[None]:
    """A disk of its own at ``path``; skips where this user may not mount one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs a root that may mount")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_read_only_results_disk_is_refused(llem, sweep: Path, tmp_path: Path, recording: Path) -> None:
    with small_disk(tmp_path / "disk", "ro"):
        ended = llem("submit", "--inline", sweep, "--results", "disk")
        assert ended.code == 5
        assert "Read-only file system" in ended.err
        assert "another results folder" in ended.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_results_folder_that_may_not_be_written_is_refused(llem, sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir(mode=0o555)
    ended = llem("submit", "--inline", sweep, "--results", "results")
    assert ended.code == 5
    assert "Permission denied" in ended.err
    assert "another results folder" in ended.err


def test_a_full_results_disk_is_refused_before_anything_is_measured(llem, sweep: Path, tmp_path: Path, recording: Path) -> None:
    with small_disk(tmp_path / "disk", "size=2m"):
        ended = llem("submit", "--inline", sweep, "--results", "disk")
        assert ended.code == 5
        assert "MB free" in ended.err
        assert "submit the sweep again" in ended.err
        assert not list((tmp_path / "disk").glob("*/journal.jsonl"))


@pytest.mark.parametrize("command", ["status", "watch", "logs", "stop", "show", "export"])
def test_a_run_that_is_not_there_is_named(llem, command: str) -> None:
    more = ["--to", "csv", "out.csv"] if command == "export" else []
    ended = llem(command, "nothing", *more)
    assert ended.code == 5
    assert "no run 'nothing' under runs" in ended.err
    assert "llem-ray submit" in ended.err


def test_a_folder_that_is_no_run_is_named(llem, tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    ended = llem("show", tmp_path / "holiday")
    assert ended.code == 5
    assert "is not a run directory" in ended.err
