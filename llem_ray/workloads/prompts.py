"""From a prompt source to requests: token ids of exact length, the same for every engine, fixed by a seed."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from llem_ray.core.backend import Request
from llem_ray.core.errors import ConfigError
from llem_ray.core.spec import PromptSpec, WorkloadSpec

Encode = Callable[[Sequence[str]], list[list[int]]]

FIELD = "workload.prompts"


def load_prompts(spec: PromptSpec, base_dir: str | os.PathLike[str] = ".") -> Sequence[str]:
    """The texts of a prompt source, in file order; empty for ``synthetic``, which has none.

    Args:
        spec: Which source.
        base_dir: Folder that a relative ``path`` starts from.

    Raises:
        ConfigError: The file is missing, empty, not UTF-8, or has a line without a prompt; the line is named.
    """
    if spec.source == "file":
        if spec.path is None:
            raise ConfigError("`source: file` needs a path", field=f"{FIELD}.path", found="nothing", allowed="a JSON Lines file")
        path = Path(base_dir) / Path(spec.path).expanduser()
        return _parse_lines(_read_text(path), str(path), spec.column)
    if spec.path is not None:
        raise ConfigError(
            f"a path has no meaning with `source: {spec.source}`",
            field=f"{FIELD}.path",
            found=spec.path,
            allowed="`source: file`",
        )
    if spec.source == "synthetic":
        return ()
    shipped = files("llem_ray.workloads") / "data" / "prompts.jsonl"
    return _parse_lines(shipped.read_text(encoding="utf-8"), str(shipped), "prompt")


def build_requests(
    workload: WorkloadSpec,
    encode: Encode,
    vocab_size: int,
    context_tokens: int,
    prompts: Sequence[str],
    special_token_ids: Collection[int] = (),
) -> tuple[Request, ...]:
    """The distinct requests of one pass; ``request_id`` is the index as a decimal number.

    Prompts are taken in an order drawn from ``workload.seed``, and drawn anew each time the set is used up. With
    ``input_tokens`` a longer prompt is cut at its end and a shorter one continued with the prompts that follow it in that
    order; special tokens between them stay, as in packed training text. Request i starts with the i-th prompt of the order,
    so no two requests of one round share their beginning.

    Args:
        workload: Lengths, number of requests, seed.
        encode: The engine's tokenizer, see ``InferenceBackend.encode``. Not called for ``synthetic``.
        vocab_size: Number of token ids of the model.
        context_tokens: Longest prompt plus output the model takes.
        prompts: What ``load_prompts`` returned.
        special_token_ids: Ids that synthetic prompts leave out.

    Raises:
        ConfigError: A prompt is empty, its ids are outside the vocabulary, or it is too long for the context.
    """
    count = workload.requests if workload.requests is not None else workload.batch_size
    if workload.input_tokens is not None and workload.input_tokens + workload.output_tokens > context_tokens:
        raise _too_long("prompt 0", workload.input_tokens, workload.output_tokens, context_tokens, "workload.input_tokens")
    if workload.prompts.source == "synthetic":
        ids = _synthetic(workload, count, vocab_size, special_token_ids)
    else:
        if not prompts:
            raise ConfigError("there are no prompts", field=FIELD, found="0 prompts", allowed="at least 1")
        ids = _from_texts(workload, count, _Texts(prompts, encode, vocab_size), context_tokens)
    return tuple(
        Request(
            request_id=str(index),
            prompt_token_ids=prompt,
            max_new_tokens=workload.output_tokens,
            ignore_eos=workload.ignore_eos,
        )
        for index, prompt in enumerate(ids)
    )


def batches(requests: Sequence[Request], batch_size: int) -> Iterator[tuple[Request, ...]]:
    """Consecutive groups of ``batch_size`` requests; the last may be smaller."""
    for start in range(0, len(requests), batch_size):
        yield tuple(requests[start : start + batch_size])


class _Texts:
    """Prompts that are encoded when first asked for: a file may hold far more than a pass needs."""

    def __init__(self, prompts: Sequence[str], encode: Encode, vocab_size: int) -> None:
        self._prompts = prompts
        self._encode = encode
        self._vocab_size = vocab_size
        self._ids: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def fetch(self, indices: Sequence[int]) -> None:
        """Encode several prompts in one call."""
        wanted = [index for index in dict.fromkeys(indices) if index not in self._ids]
        if not wanted:
            return
        for index, ids in zip(wanted, self._encode([self._prompts[index] for index in wanted]), strict=True):
            if not ids:
                raise ConfigError(f"prompt {index} has no tokens", field=FIELD, found=repr(self._prompts[index][:40]))
            if max(ids) >= self._vocab_size:
                raise ConfigError(
                    f"prompt {index} has token id {max(ids)}, beyond the model's vocabulary of {self._vocab_size}",
                    "does the tokenizer belong to the model?",
                    field="model.tokenizer",
                )
            self._ids[index] = tuple(ids)

    def __getitem__(self, index: int) -> tuple[int, ...]:
        self.fetch([index])
        return self._ids[index]


def _from_texts(workload: WorkloadSpec, count: int, texts: _Texts, context_tokens: int) -> Iterator[tuple[int, ...]]:
    order = _order(len(texts), workload.seed)
    firsts = [next(order) for _ in range(count)]
    texts.fetch(firsts)
    if workload.input_tokens is None:
        for index in firsts:
            if len(texts[index]) + workload.output_tokens > context_tokens:
                raise _too_long(f"prompt {index}", len(texts[index]), workload.output_tokens, context_tokens, FIELD)
            yield texts[index]
        return
    for start in range(count):
        ids = list(texts[firsts[start]])
        following = start + 1
        while len(ids) < workload.input_tokens:
            if following == len(firsts):
                firsts.append(next(order))
            ids += texts[firsts[following]]
            following += 1
        yield tuple(ids[: workload.input_tokens])


def _order(count: int, seed: int) -> Iterator[int]:
    """Endless rounds over all indices, each in its own order. By hash, so that no library update can change it."""
    cycle = 0
    while True:
        keys = [(hashlib.sha256(f"{seed}/{cycle}/{index}".encode()).digest(), index) for index in range(count)]
        yield from (index for _, index in sorted(keys))
        cycle += 1


def _synthetic(
    workload: WorkloadSpec, count: int, vocab_size: int, special_token_ids: Collection[int]
) -> Iterator[tuple[int, ...]]:
    if workload.input_tokens is None:
        raise ConfigError(
            "synthetic prompts have no natural length",
            field="workload.input_tokens",
            found="nothing",
            allowed="a number of tokens",
        )
    special = frozenset(special_token_ids)
    allowed = [index for index in range(vocab_size) if index not in special]
    if not allowed:
        raise ConfigError(f"all {vocab_size} token ids of the model are special", field=f"{FIELD}.source")
    for index in range(count):
        draws = random.Random(f"{workload.seed}/{index}")  # noqa: S311 - not a secret
        yield tuple(allowed[int(draws.random() * len(allowed))] for _ in range(workload.input_tokens))


def _too_long(prompt: str, input_tokens: int, output_tokens: int, context_tokens: int, field: str) -> ConfigError:
    return ConfigError(
        f"{prompt} is too long for the model: {input_tokens} prompt + {output_tokens} output"
        f" = {input_tokens + output_tokens} tokens",
        "lower workload.input_tokens or workload.output_tokens",
        field=field,
        found=f"{input_tokens + output_tokens} tokens",
        allowed=f"at most {context_tokens} tokens, the model's context",
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError("the prompts file does not exist", file=str(path), field=f"{FIELD}.path") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            "the prompts file is not UTF-8 text", file=str(path), line=line, field=f"{FIELD}.path", allowed="JSON Lines"
        ) from error
    except OSError as error:
        raise ConfigError(f"the prompts file cannot be read: {error.strerror}", file=str(path), field=f"{FIELD}.path") from error


def _parse_lines(text: str, path: str, column: str) -> tuple[str, ...]:
    prompts = []
    # Only \n ends a JSON line; splitlines() would also cut at characters that JSON strings may hold raw.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            prompts.append(_parse_line(line, path, number, column))
    if not prompts:
        raise ConfigError(
            "the prompts file is empty", file=path, field=f"{FIELD}.path", allowed="one JSON object or string a line"
        )
    return tuple(prompts)


def _parse_line(line: str, path: str, number: int, column: str) -> str:
    def refused(message: str, found: Any, allowed: str, hint: str | None = None) -> ConfigError:
        return ConfigError(message, hint, file=path, line=number, field=FIELD, found=_shown(found), allowed=allowed)

    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise refused(f"not JSON: {error.msg} at column {error.colno}", line, "a JSON object or string") from error
    if isinstance(value, dict):
        if column not in value:
            close = difflib.get_close_matches(column, list(value), n=1)
            hint = f"did you mean `column: {close[0]}`?" if close else f"set {FIELD}.column"
            raise refused(f"has no column {column!r}", f"columns {', '.join(value) or 'none'}", f"a column {column!r}", hint)
        value = value[column]
    if not isinstance(value, str) or not value.strip():
        raise refused("is not a prompt", value, "a text that is not empty")
    return value


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value.strip() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
