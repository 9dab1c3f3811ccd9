"""A YAML file as plain values, each with the line it stands on.

Built on PyYAML's event stream, so that nothing is constructed but mappings with text keys, lists and scalars, and so that
depth, size and aliases are limited while the file is read. Scalars follow the YAML 1.2 core schema: ``1e-3`` is a number,
``on``, ``off``, ``yes`` and ``no`` are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml

from llem_ray.config.environment import substitute
from llem_ray.core.errors import ConfigError

MAX_BYTES: Final = 1_000_000
"""Largest sweep file that is read."""
MAX_DEPTH: Final = 40
"""Deepest nesting of lists and mappings."""
MAX_ALIASED: Final = 50_000
"""Most values that aliases may add to those written out."""

Where: TypeAlias = tuple[str | int, ...]
"""Keys and list indices from the top of the file."""

_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG_PREFIX: Final = "tag:yaml.org,2002:"
_TEXT_TAG: Final = f"{_TAG_PREFIX}str"
_CONSTANTS: Final[Mapping[str, Any]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER: Final = re.compile(r"[-+]?[0-9]{1,300}")
_BASED: Final = re.compile(r"0x[0-9a-fA-F]{1,64}|0o[0-7]{1,64}")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE: Final = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TOKEN: Final = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def dotted(where: Where) -> str:
    """``("experiments", 0, "model")`` as ``experiments[0].model``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")


def shorten(value: Any, limit: int = 60) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@dataclass(slots=True)
class Document:
    """A parsed file. ``flags`` tells which values a ``--set`` put there."""

    file: str
    value: dict[str, Any] = field(default_factory=dict)
    lines: dict[Where, int] = field(default_factory=dict)
    flags: dict[Where, str] = field(default_factory=dict)

    def error(
        self, where: Where, message: str, *, found: str | None = None, allowed: str | None = None, hint: str | None = None
    ) -> ConfigError:
        """The error about what stands at ``where``, with its file and line, or the flag it came from."""
        flag = line = None
        for end in range(len(where), -1, -1):
            flag, line = self.flags.get(where[:end]), self.lines.get(where[:end])
            if flag is not None or line is not None:
                break
        if flag is not None:
            message = f"{message} (from --set {flag})"
        return ConfigError(
            message,
            hint=hint,
            file=None if flag is not None else self.file,
            line=None if flag is not None else line,
            field=dotted(where) or None,
            found=found,
            allowed=allowed,
        )


@dataclass(slots=True)
class _Node:
    """A scalar, mapping or list as written. Aliases share the node."""

    line: int
    text: str = ""
    plain: bool = False
    items: list[_Node] | None = None
    entries: list[tuple[str, int, _Node]] | None = None


def read_document(path: Path, environ: Mapping[str, str]) -> Document:
    """Read a YAML file whose top is a mapping.

    Raises:
        ConfigError: It is missing, too large, not text, not YAML, or uses what a sweep file may not: tags, duplicate keys,
            aliases that expand without end, a variable that is not set.
    """
    document = parse_document(_read_text(path), str(path), environ)
    if not isinstance(document.value, dict):
        raise ConfigError(
            "a sweep file is a mapping of keys to values",
            file=str(path),
            line=1,
            found=shorten(document.value),
            allowed="schema_version, name, base, sweep, ...",
        )
    return document


def parse_document(text: str, file: str, environ: Mapping[str, str]) -> Document:
    """Parse YAML text; ``value`` may be of any kind.

    Raises:
        ConfigError: As ``read_document``.
    """
    document = Document(file=file)
    try:
        root = _Composer(document, text).compose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"not valid YAML: {problem}", file=file, line=mark.line + 1 if mark else None) from error
    except yaml.YAMLError as error:
        first = str(error).split("\n", maxsplit=1)[0]
        raise ConfigError(f"not valid YAML: {first}", file=file, allowed="printable text") from error
    document.value = _Expander(document, environ).expand(root, (), aliased=False)
    return document


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(
                "the sweep file is too large", file=str(path), found=f"{size:,} bytes", allowed=f"up to {MAX_BYTES:,} bytes"
            )
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the sweep file cannot be read: {error.strerror}", file=str(path)) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError("the sweep file is too large", file=str(path), allowed=f"up to {MAX_BYTES:,} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise ConfigError("not a text file", file=str(path), line=line, found=found, allowed="UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError("not a text file", file=str(path), line=line, found="a NUL byte", allowed="UTF-8 text")
    return text


class _Composer:
    """Turns PyYAML's events into nodes, and refuses what a sweep file may not hold."""

    def __init__(self, document: Document, text: str) -> None:
        self._document = document
        self._events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        self._anchors: dict[str, _Node] = {}
        self._where: list[str | int] = []

    def compose(self) -> _Node:
        """The one document of the text.

        Raises:
            ConfigError: There is none, or more than one.
        """
        next(self._events)
        event = next(self._events)
        if isinstance(event, yaml.StreamEndEvent):
            raise ConfigError("the file is empty", file=self._document.file, line=1)
        root = self._node(next(self._events))
        next(self._events)
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise self._error(event, "a second YAML document begins here", allowed="one document")
        return root

    def _node(self, event: Any) -> _Node:
        line = _line_of(event)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise self._error(event, f"alias *{event.anchor} has no anchor before it")
            return self._anchors[event.anchor]
        if event.tag is not None and event.tag not in ("!", _TEXT_TAG):
            tag = event.tag.replace(_TAG_PREFIX, "!!")
            raise self._error(event, "YAML tags are not allowed", found=tag, allowed="plain values, and !!str")
        if len(self._where) > MAX_DEPTH:
            raise self._error(event, "nested too deeply", allowed=f"up to {MAX_DEPTH} levels")
        if isinstance(event, yaml.ScalarEvent):
            node = _Node(line, text=event.value, plain=event.tag is None and event.implicit[0])
        elif isinstance(event, yaml.MappingStartEvent):
            node = _Node(line, entries=self._entries())
        else:
            node = _Node(line, items=self._items())
        if event.anchor:
            self._anchors[event.anchor] = node
        return node

    def _items(self) -> list[_Node]:
        items: list[_Node] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            self._where.append(len(items))
            items.append(self._node(event))
            self._where.pop()
        return items

    def _entries(self) -> list[tuple[str, int, _Node]]:
        entries: list[tuple[str, int, _Node]] = []
        seen: dict[str, int] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self._error(event, "a key must be text", found="a list, mapping or alias")
            key, line = event.value, _line_of(event)
            self._where.append(key)
            if key in seen:
                raise self._error(event, f"duplicate key: first on line {seen[key]}, again on line {line}")
            seen[key] = line
            entries.append((key, line, self._node(next(self._events))))
            self._where.pop()
        return entries

    def _error(self, event: Any, message: str, *, found: str | None = None, allowed: str | None = None) -> ConfigError:
        line = _line_of(event)
        field_name = dotted(tuple(self._where)) if len(self._where) <= MAX_DEPTH else None
        return ConfigError(message, file=self._document.file, line=line, field=field_name or None, found=found, allowed=allowed)


def _line_of(event: Any) -> int:
    line: int = event.start_mark.line
    return line + 1


class _Expander:
    """Turns nodes into values, notes their lines, and resolves merge keys, variables and aliases."""

    def __init__(self, document: Document, environ: Mapping[str, str]) -> None:
        self._document = document
        self._environ = environ
        self._seen: set[int] = set()
        self._aliased = 0

    def expand(self, node: _Node, where: Where, *, aliased: bool) -> Any:
        self._document.lines.setdefault(where, node.line)
        aliased = self._count(node, where, aliased=aliased)
        if node.entries is not None:
            return self._mapping(node.entries, where, aliased=aliased)
        if node.items is not None:
            return [self.expand(item, (*where, i), aliased=aliased) for i, item in enumerate(node.items)]
        return self._scalar(node, where)

    def _count(self, node: _Node, where: Where, *, aliased: bool) -> bool:
        aliased = aliased or id(node) in self._seen
        self._seen.add(id(node))
        self._aliased += aliased
        if self._aliased > MAX_ALIASED:
            raise self._document.error(where, "aliases expand to too many values", allowed=f"up to {MAX_ALIASED:,}")
        return aliased

    def _mapping(self, entries: list[tuple[str, int, _Node]], where: Where, *, aliased: bool) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, line, child in entries:
            if key != "<<":
                self._document.lines[*where, key] = line
                value[key] = self.expand(child, (*where, key), aliased=aliased)
        for key, _, child in entries:
            if key == "<<":
                for source in child.items if child.items is not None else [child]:
                    value = {**self._merged(source, where), **value}
        return value

    def _merged(self, source: _Node, where: Where) -> dict[str, Any]:
        self._count(source, where, aliased=True)
        if source.entries is None:
            raise self._document.error((*where, "<<"), "a merge key takes a mapping or a list of mappings")
        return self._mapping(source.entries, where, aliased=True)

    def _scalar(self, node: _Node, where: Where) -> Any:
        text = substitute(node.text, self._environ, partial(self._document.error, where))
        if _TOKEN.search(text):
            raise secret_error(self._document, where)
        return self._typed(text, where) if node.plain else text

    def _typed(self, text: str, where: Where) -> Any:
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _INTEGER.fullmatch(text):
            return int(text)
        if _BASED.fullmatch(text):
            return int(text, 0)
        if _FLOAT.fullmatch(text) and abs(number := float(text)) != float("inf"):
            return number
        if _NOT_FINITE.fullmatch(text) or _FLOAT.fullmatch(text):
            raise self._document.error(where, "not a finite number", found=shorten(text), allowed="a finite number")
        return text


def secret_error(document: Document, where: Where) -> ConfigError:
    """The error for an access token in the file. Never shows it."""
    return document.error(
        where,
        "an access token does not belong in a sweep: it would be stored with the results",
        found="a token (not shown)",
        hint="export HF_TOKEN in the environment; llem-ray reads it from there and never stores it",
    )
