"""Prompts from files: JSON Lines, Parquet, and conversations in the form of ShareGPT."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import PromptSpec

FIELD: Final = "workload.prompts"
CONVERSATIONS: Final = "conversations"
"""Key of a ShareGPT entry that holds its turns."""
_HUMAN: Final = frozenset({"human", "user"})
_BATCH: Final = 4096


class Exchange(NamedTuple):
    """One turn of a conversation."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """What was read from a prompt source, in its order."""

    texts: tuple[str, ...] = ()
    """The prompts; none of ``synthetic``."""
    answers: tuple[str, ...] | None = None
    """The known answer of each prompt; None where the source has none."""
    conversations: tuple[tuple[Exchange, ...], ...] = ()
    """All turns of each conversation, where these were asked for; the prompts are their first ones."""


class Entry(NamedTuple):
    """One value of a source and where it stands: a line of a text file, or the text ``row N``."""

    value: Any
    line: int | None
    label: str


def read_prompt_file(spec: PromptSpec, path: Path, *, all_turns: bool = False) -> PromptSet:
    """The prompts of a JSON Lines, JSON or Parquet file, with all turns of conversations where asked for.

    Raises:
        ConfigError: The file is missing, empty or malformed, or a line or row has no prompt; it is named.
    """
    if path.suffix == ".parquet":
        return prompts_of(_parquet_rows(path, wanted_columns(spec)), spec, str(path), all_turns=all_turns)
    text = read_text(path, "prompts file", f"{FIELD}.path")
    if text.lstrip().startswith("[") and (spec.format == "sharegpt" or path.suffix != ".jsonl"):
        return prompts_of(_array_items(text, str(path)), spec, str(path), all_turns=all_turns)
    return prompts_of(_lines(text, str(path)), spec, str(path), all_turns=all_turns)


def prompts_of(entries: Iterable[Entry], spec: PromptSpec, source: str, *, all_turns: bool = False) -> PromptSet:
    """Prompts, and answers where the spec asks for them, of the first ``limit`` entries that have any.

    Args:
        entries: What the source holds.
        spec: Which columns, in which form.
        source: File or data set, for errors.
        all_turns: Keep all turns of conversations, not only their first ones.

    Raises:
        ConfigError: An entry has no prompt, or there is none at all.
    """
    turns = (said for entry in entries if (said := _turns_of(entry, spec, source, all_turns=all_turns)))
    found = list(islice(turns, spec.limit))
    if not found:
        allowed = "at least one prompt" if spec.format == "column" else "at least one human turn with an answer"
        field = f"{FIELD}.{'dataset' if spec.source == 'dataset' else 'path'}"
        raise ConfigError("there are no prompts in it: it is empty", file=source, field=field, found="0 prompts", allowed=allowed)
    with_answers = spec.format == "sharegpt" or spec.answer_column is not None
    return PromptSet(
        texts=tuple(said[0].prompt for said in found),
        answers=tuple(said[0].answer for said in found) if with_answers else None,
        conversations=tuple(found) if all_turns else (),
    )


def wanted_columns(spec: PromptSpec) -> tuple[str, ...]:
    """Columns of a table that are read."""
    if spec.format == "sharegpt":
        return (CONVERSATIONS,)
    return (spec.column,) if spec.answer_column is None else (spec.column, spec.answer_column)


def require_columns(wanted: Sequence[str], there: Sequence[str], source: str) -> None:
    """Refuse a table without the columns.

    Raises:
        ConfigError: One is missing; those there are listed, with a suggestion.
    """
    for name in wanted:
        if name not in there:
            raise _no_column(name, wanted, there, source, None)


def read_text(path: Path, kind: str, field: str) -> str:
    """Text of a UTF-8 file.

    Raises:
        ConfigError: It is missing, cannot be read, or is not UTF-8; the line is named.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"the {kind} does not exist", file=str(path), field=field) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"the {kind} is not UTF-8 text", file=str(path), line=line, field=field, allowed="UTF-8") from error
    except OSError as error:
        raise ConfigError(f"the {kind} cannot be read: {error.strerror}", file=str(path), field=field) from error


def _lines(text: str, path: str) -> Iterator[Entry]:
    # Only \n ends a JSON line; splitlines() would also cut at characters that JSON strings may hold raw.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield Entry(json.loads(line), number, "")
        except json.JSONDecodeError as error:
            message = f"not JSON: {error.msg} at column {error.colno}"
            allowed = "a JSON object or string"
            raise ConfigError(message, file=path, line=number, field=FIELD, found=_shown(line), allowed=allowed) from error


def _array_items(text: str, path: str) -> Iterator[Entry]:
    """Items of a JSON array, each with the line it begins on."""
    decoder = json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if text[at : at + 1] == "]":
            return
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            message = f"not JSON: {error.msg} at column {error.colno}"
            raise ConfigError(message, file=path, line=error.lineno, field=FIELD, allowed="a JSON list") from error
        yield Entry(value, line, "")
        at = end


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Entry]:
    try:
        with pq.ParquetFile(path) as file:
            require_columns(columns, file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=list(columns)):
                for row in batch.to_pylist():
                    yield Entry(row, None, f"row {number}: ")
                    number += 1
    except FileNotFoundError as error:
        raise ConfigError("the prompts file does not exist", file=str(path), field=f"{FIELD}.path") from error
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ConfigError(f"the prompts file cannot be read: {reason}", file=str(path), field=f"{FIELD}.path") from error


def _turns_of(entry: Entry, spec: PromptSpec, source: str, *, all_turns: bool) -> tuple[Exchange, ...]:
    """Prompts with their known answers (or empty texts); none for an entry to be left out."""
    if spec.format == "sharegpt":
        return tuple(islice(_exchanges(entry, source), None if all_turns else 1))
    wanted = wanted_columns(spec)
    if not isinstance(entry.value, dict):
        if len(wanted) > 1:
            raise _refused(entry, source, "has no columns", entry.value, f"an object with {' and '.join(wanted)}")
        return (Exchange(_text(entry, source, entry.value, "prompt"), ""),)
    for name in wanted:
        if name not in entry.value:
            raise _no_column(name, wanted, list(entry.value), source, entry)
    prompt = _text(entry, source, entry.value[spec.column], "prompt")
    return (Exchange(prompt, _text(entry, source, entry.value[spec.answer_column], "answer") if spec.answer_column else ""),)


def _exchanges(entry: Entry, source: str) -> Iterator[Exchange]:
    """From the first human turn on, each with the turn after it, up to where these do not alternate or one of them is blank."""
    if not isinstance(entry.value, dict) or not isinstance(turns := entry.value.get(CONVERSATIONS), list):
        raise _refused(
            entry, source, f"has no list of {CONVERSATIONS}", entry.value, f"{{{CONVERSATIONS}: [{{from, value}}, ...]}}"
        )
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
            raise _refused(entry, source, "has a turn that is none", turn, "a turn is {from: text, value: text}")
    first = next((index for index, turn in enumerate(turns) if turn["from"] in _HUMAN), len(turns))
    for turn, following in zip(turns[first::2], turns[first + 1 :: 2], strict=False):
        answered = turn["from"] in _HUMAN and following["from"] not in _HUMAN
        if not (answered and turn["value"].strip() and following["value"].strip()):
            return
        yield Exchange(turn["value"], following["value"])


def _text(entry: Entry, source: str, value: Any, kind: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _refused(entry, source, f"is not {'an' if kind == 'answer' else 'a'} {kind}", value, "a text that is not empty")
    return value


def _no_column(name: str, wanted: Sequence[str], there: Sequence[str], source: str, entry: Entry | None) -> ConfigError:
    key = "answer_column" if len(wanted) > 1 and name == wanted[1] else "column"
    close = difflib.get_close_matches(name, list(there), n=1)
    hint = f"did you mean `{key}: {close[0]}`?" if close else f"set {FIELD}.{key}"
    if CONVERSATIONS in there:
        hint = f"set {FIELD}.format: sharegpt"
    if name == CONVERSATIONS:
        hint = f"set {FIELD}.format: column"
    return ConfigError(
        f"{entry.label if entry else ''}has no column {name!r}",
        hint,
        file=source,
        line=entry.line if entry else None,
        field=f"{FIELD}.{key}" if entry is None else FIELD,
        found=f"columns {', '.join(there) or 'none'}",
        allowed=f"a column {name!r}",
    )


def _refused(entry: Entry, source: str, message: str, found: Any, allowed: str) -> ConfigError:
    message = f"{entry.label}{message}"
    return ConfigError(message, file=source, line=entry.line, field=FIELD, found=_shown(found), allowed=allowed)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value.strip() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
