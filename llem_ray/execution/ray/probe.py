"""Looks at a cluster and prints what it found as JSON: a script of its own, because Ray hangs or aborts where it cannot connect.

Run as ``python -P probe.py ADDRESS SECONDS [NODE_IP]``. Imports nothing of llem-ray.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
from typing import Any


def look(address: str, node_ip: str | None) -> dict[str, Any]:
    """Facts about the cluster, or the error's class and text with those of its causes."""
    import ray  # noqa: PLC0415 - a failure to import it is an answer too

    try:
        chosen: dict[str, Any] = {"_node_ip_address": node_ip} if node_ip else {}
        ray.init(address=address, namespace="llem-ray", log_to_driver=False, configure_logging=False, **chosen)
        nodes = [
            {
                "node_id": node["NodeID"],
                "ip": node["NodeManagerAddress"],
                "hostname": node["NodeManagerHostname"],
                "alive": node["Alive"],
                "resources": node.get("Resources", {}),
                "labels": node.get("Labels", {}),
            }
            for node in ray.nodes()
        ]
        gcs = ray.get_runtime_context().gcs_address
        return {"ray": ray.__version__, "python": platform.python_version(), "gcs_address": gcs, "nodes": nodes}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - told to the process that started us
        return {"error": _chain(error)}


def _chain(error: BaseException | None) -> str:
    told = []
    while error is not None:
        told.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(told)


if __name__ == "__main__":
    signal.alarm(int(float(sys.argv[2])) + 10)  # whoever started us may be gone
    answer = look(sys.argv[1], sys.argv[3] if len(sys.argv) > 3 else None)
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a farewell to the cluster may hang
