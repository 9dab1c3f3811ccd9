"""``--set key=value``: values from the command line, put into the file before it is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llem_ray.config.document import Document, Where, parse_document
from llem_ray.config.fields import closest
from llem_ray.config.file import TREE
from llem_ray.config.patches import EXPERIMENT
from llem_ray.core.errors import ConfigError


def apply_overrides(document: Document, overrides: Sequence[str], environ: Mapping[str, str]) -> None:
    """Put each ``key=value`` into the document. The value is YAML.

    A key is a path in the file (``measure.min_window_s``, ``sweep.workload.batch_size``, ``base.model.dtype``) or one of an
    experiment (``model.dtype``), short for ``base.model.dtype``.

    Raises:
        ConfigError: It is not ``key=value``, the key does not begin like any in the file, or the value is not YAML.
    """
    for flag in overrides:
        key, separator, text = flag.partition("=")
        if not separator or not key:
            raise ConfigError("--set takes key=value", found=flag, allowed="for example workload.batch_size=8")
        where = _where(key, flag)
        _put(document, where, _value(key, text, environ), flag)


def _value(key: str, text: str, environ: Mapping[str, str]) -> object:
    if not text.strip():
        return None
    try:
        return parse_document(text, "--set", environ).value
    except ConfigError as error:
        parts = [key, *([error.field] if error.field else [])]
        message = f"{error.message} (from --set)"
        raise ConfigError(message, error.hint, field=".".join(parts), found=error.found, allowed=error.allowed) from error


def _where(key: str, flag: str) -> Where:
    head, _, rest = key.partition(".")
    if head in EXPERIMENT.children:
        return ("base", *key.split("."))
    if head not in TREE.children:
        known = [*TREE.children, *EXPERIMENT.children]
        leaves = [".".join(leaf.path) for leaf in (*EXPERIMENT.leaves(), *TREE.leaves())]
        hint = closest(head, known) or closest(key, leaves)
        raise ConfigError(f"unknown key {key!r} (from --set {flag})", field=key, allowed=", ".join(known), hint=hint)
    if head == "sweep" and rest:
        return (head, rest)
    return tuple(key.split("."))


def _put(document: Document, where: Where, value: object, flag: str) -> None:
    node = document.value
    for depth, part in enumerate(where[:-1], start=1):
        child = node.get(str(part))
        if child is None:
            child = node[str(part)] = {}
        if not isinstance(child, dict):
            message = f"cannot be set: {'.'.join(map(str, where[:depth]))} is not a mapping"
            raise ConfigError(f"{message} (from --set {flag})", field=".".join(map(str, where)), hint="set the whole of it")
        node = child
    node[str(where[-1])] = value
    document.flags[where] = flag
    for stale in [line for line in document.lines if line[: len(where)] == where]:
        del document.lines[stale]
