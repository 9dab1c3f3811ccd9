"""Notices that vLLM's engine process ended, and wakes whoever waits for it.

vLLM's own monitor notices too, but only marks its synchronous client: a step that waits for the next output, or a call that waits
for its answer, waits on.
"""

from __future__ import annotations

import threading
from multiprocessing import connection
from typing import Any, Final

from vllm.v1.engine.exceptions import EngineDeadError

LOOK_S: Final = 1.0
"""How often ``stop`` is looked for."""


class CoreWatch:
    """Watches the processes of a synchronous client; does nothing where the engine runs in this process.

    Args:
        client: vLLM's ``EngineCoreClient``.
    """

    def __init__(self, client: Any) -> None:
        self._stopped = threading.Event()
        manager = getattr(getattr(client, "resources", None), "engine_manager", None)
        if manager is not None and hasattr(client, "outputs_queue"):
            arguments = (client, [process.sentinel for process in manager.processes], self._stopped)
            threading.Thread(target=_watch, args=arguments, daemon=True, name="llem-ray-core-watch").start()

    def stop(self) -> None:
        """An end is expected from now on."""
        self._stopped.set()


def _watch(client: Any, sentinels: list[int], stopped: threading.Event) -> None:
    while not stopped.is_set():
        if connection.wait(sentinels, timeout=LOOK_S):
            break
    if stopped.is_set():
        return
    # In this order: a call that comes later is refused by this mark, an earlier one is in the table.
    client.resources.engine_dead = True
    for result in list(client.utility_results.values()):
        if not result.done():
            result.set_exception(EngineDeadError())
    client.outputs_queue.put_nowait(EngineDeadError())
