"""A window on the clock of another host."""

from __future__ import annotations

from llem_ray.core.energy import Window
from llem_ray.execution.meter import Meter


def moved_window(window: Window, host: str, meter: Meter) -> Window | None:
    """A window on another host's clock, with the error of both offsets; None when one is not known."""
    if window.node == host:
        return window
    clocks = meter.clocks
    edges = []
    for stamp_ns in (window.begin_ns, window.end_ns):
        ours_ns = clocks.to_own(window.node, stamp_ns)
        there, here = (None, None) if ours_ns is None else (clocks.offset(window.node, ours_ns), clocks.offset(host, ours_ns))
        if ours_ns is None or there is None or here is None:
            return None
        edges.append((ours_ns + here.offset_ns, window.delta_ns + there.delta_ns + here.delta_ns))
    (begin_ns, begin_delta_ns), (end_ns, end_delta_ns) = edges
    return Window(node=host, begin_ns=begin_ns, end_ns=end_ns, delta_ns=max(begin_delta_ns, end_delta_ns))
