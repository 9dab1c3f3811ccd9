"""A cell's label in a table: its settings, broken where they can be read."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

_VALUES = re.compile(r"[^=]*=?")
_PARTS = re.compile(r"[^,_/-]*[,_/-]?")
NARROW = 12
"""A column of labels is at least so wide."""


class Label:
    """Text that is broken between words.

    A word is broken only where it does not fit: after ``=``, else after ``,``, ``_``, ``/`` or ``-``.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines of the label."""
        yield Text("\n".join(break_label(self._text, options.max_width)), no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """From ``NARROW`` on; all of it in one line at most."""
        return Measurement(min(NARROW, len(self._text)), len(self._text)).with_maximum(options.max_width)


def break_label(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` characters."""
    lines = [""]
    for word in text.split():
        if len(word) <= width:
            lines = _put(lines, word, width, " ")
            continue
        lines = [*lines, ""] if lines[-1] else lines
        for piece in _pieces(word, width):
            lines = _put(lines, piece, width, "")
    return lines


def _put(lines: list[str], word: str, width: int, gap: str) -> list[str]:
    together = lines[-1] + gap + word if lines[-1] else word
    return [*lines[:-1], together] if len(together) <= width else [*lines, word]


def _pieces(word: str, width: int) -> Iterator[str]:
    for value in filter(None, _VALUES.findall(word)):
        for part in [value] if len(value) <= width else filter(None, _PARTS.findall(value)):
            yield from (part[begin : begin + width] for begin in range(0, len(part), width))
