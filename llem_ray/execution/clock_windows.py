"""A window on the clock of another host."""

from __future__ import annotations

from llem_ray.core.energy import Window
from llem_ray.execution.clocks import ClockTable


def moved_window(window: Window, host: str, clocks: ClockTable) -> Window | None:
    """A window on another host's clock, with the error of both offsets; None when one is not known.

    That of the marking host's own offset is the same on every other host, whichever it is moved to.
    """
    if window.node == host:
        return window
    edges_ns, own_ns, marked_ns = [], [], []
    for stamp_ns in (window.begin_ns, window.end_ns):
        ours_ns = clocks.to_own(window.node, stamp_ns)
        there, here = (None, None) if ours_ns is None else (clocks.offset(window.node, ours_ns), clocks.offset(host, ours_ns))
        if ours_ns is None or there is None or here is None:
            return None
        edges_ns.append(ours_ns + here.offset_ns)
        own_ns.append(here.delta_ns)
        marked_ns.append(window.delta_ns + there.delta_ns)
    begin_ns, end_ns = edges_ns
    common_ns = max(marked_ns)
    return Window(node=host, begin_ns=begin_ns, end_ns=end_ns, delta_ns=max(own_ns) + common_ns, common_delta_ns=common_ns)
