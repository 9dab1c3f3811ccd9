"""Calls that may never return, with a deadline; and the thread of the event loop that TensorRT-LLM streams into."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from llem_ray.core.errors import HangError

T = TypeVar("T")

STOP_S: Final = 1.5


def within(timeout_s: float, what: str, call: Callable[[], T]) -> T:
    """The result of ``call``, made in a thread of its own: TensorRT-LLM takes timeouts, and ignores them.

    Args:
        timeout_s: Deadline.
        what: Named in the error.
        call: Goes on in its thread after the deadline; nobody waits for it then.

    Raises:
        HangError: It has not returned in time.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name=f"llem-ray-{what}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise HangError(f"TensorRT-LLM has not answered within {timeout_s:g} s: {what}")
    if errors:
        raise errors[0]
    return results[0]


class EventLoop:
    """An asyncio loop in a thread of its own. TensorRT-LLM assumes that all requests of an engine share one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llem-ray-tensorrt", daemon=True)
        self._thread.start()

    def start(self, coroutine: Any) -> Any:
        """Run it in the loop; a ``concurrent.futures.Future``. Called from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function: Callable[[], object]) -> None:
        """Call it in the loop, soon. Called from any thread."""
        self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        """End the loop, within ``STOP_S``; one that is stuck in the library is left to its daemon thread."""
        self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join(STOP_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _cancel(self) -> None:
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        ended = asyncio.gather(*tasks, return_exceptions=True)
        ended.add_done_callback(lambda _: self._loop.stop())
