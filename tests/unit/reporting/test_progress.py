from __future__ import annotations

import io

from rich.console import Console

from llem_ray.core.progress import ProgressEvent
from llem_ray.reporting.progress import LiveProgress, PlainProgress, open_progress


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def printed(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def event(trial: int, phase: str = "trial", **more: object) -> ProgressEvent:
    return ProgressEvent(trial=trial, total=3, phase=phase, label=f"batch_size=[{trial}]", **more)  # type: ignore[arg-type]


def test_without_a_terminal_a_line_is_printed_when_the_trial_or_phase_changes() -> None:
    target = console(terminal=False)
    with open_progress(target) as view:
        assert isinstance(view, PlainProgress)
        view.update(event(1, "load"))
        view.update(event(1, watts=123.4, watts_estimated=True))
        view.update(event(1, watts=150.0))
        view.message("trial [b]c0-r0[/b] failed, trying again")
        view.update(event(2, watts=150.0, j_per_token=0.4213, eta_s=75.0))
    assert printed(target).splitlines() == [
        "trial 1/3: load, batch_size=[1]",
        "trial 1/3: trial, batch_size=[1], est. 123 W",
        "trial [b]c0-r0[/b] failed, trying again",
        "trial 2/3: trial, batch_size=[2], 150 W, 0.421 J/token, 1 min 15 s left",
    ]


def test_a_run_with_a_target_says_that_its_count_is_a_limit() -> None:
    target = console(terminal=False)
    with open_progress(target) as view:
        view.update(event(2, at_most=True, eta_s=75.0))
    assert printed(target) == "trial 2 of at most 3: trial, batch_size=[2], at most 1 min 15 s left\n"
    live = console(terminal=True)
    with open_progress(live) as view:
        view.update(event(2, at_most=True))
    assert "2 of at most 3" in printed(live)


def test_in_a_terminal_one_line_is_kept_up_to_date_and_messages_stay() -> None:
    target = console(terminal=True)
    with open_progress(target) as view:
        assert isinstance(view, LiveProgress)
        view.update(event(2, watts=150.0, j_per_token=0.4213, eta_s=75.0))
        view.message("retrying [c0-r0]")
    text = printed(target)
    assert "2/3" in text
    assert "batch_size=[2]" in text
    assert "150 W, 0.421 J/token" in text
    assert "retrying [c0-r0]" in text


def test_the_live_view_is_stopped_when_the_run_fails() -> None:
    target = console(terminal=True)
    try:
        with LiveProgress(target) as view:
            view.update(event(1))
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    before = printed(target)
    target.print("after")
    assert printed(target) == before + "after\n"
