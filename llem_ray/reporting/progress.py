"""Progress of a run in the terminal: a live line where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichBar

from llem_ray.core.progress import Progress, ProgressEvent
from llem_ray.reporting.numbers import format_duration, format_value


class ProgressView(Progress, Protocol):
    """Shows progress between ``with`` and the block's end."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def describe_event(event: ProgressEvent) -> str:
    """Power, J/token so far and time to go: the parts that are known."""
    parts = []
    if event.watts is not None:
        parts.append(("est. " if event.watts_estimated else "") + f"{format_value(event.watts, 3)} W")
    if event.j_per_token is not None:
        parts.append(("est. " if event.j_per_token_estimated else "") + f"{format_value(event.j_per_token, 3)} J/token")
    if event.eta_s is not None:
        parts.append(f"{'at most ' if event.at_most else ''}{format_duration(event.eta_s)} left")
    return ", ".join(parts)


def count_event(event: ProgressEvent) -> str:
    """``3/24``; ``3 of at most 24`` where further trials may turn out to be not needed."""
    return f"{event.trial} of at most {event.total}" if event.at_most else f"{event.trial}/{event.total}"


class LiveProgress:
    """A bar with trial, phase, watts, J/token so far and time to go, kept up to date in place."""

    live = True

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.fields[count]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[phase]}", style="bold"),
            TextColumn("{task.fields[label]}"),
            TextColumn("{task.fields[facts]}", style="cyan"),
        )
        self._bar = RichBar(*columns, console=console, transient=True, refresh_per_second=4)
        self._task = self._bar.add_task("run", total=None, count="", phase="starting", label="", facts="")

    def update(self, event: ProgressEvent) -> None:
        """Show the event."""
        self._bar.update(
            self._task,
            completed=event.trial,
            total=event.total,
            count=count_event(event),
            phase=escape(event.phase),
            label=escape(event.label),
            facts=describe_event(event),
        )

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


class PlainProgress:
    """A line whenever another trial or phase begins: for logs and pipes."""

    live = False

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: tuple[int, str, str] | None = None

    def update(self, event: ProgressEvent) -> None:
        """Print a line if trial, phase or settings changed."""
        key = (event.trial, event.phase, event.label)
        if key == self._shown:
            return
        self._shown = key
        text = f"trial {count_event(event)}: {event.phase}"
        text += "".join(f", {part}" for part in (event.label, describe_event(event)) if part)
        self.message(text)

    def message(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return


def open_progress(console: Console) -> ProgressView:
    """The view that suits the console: live in a terminal, plain lines elsewhere."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)
