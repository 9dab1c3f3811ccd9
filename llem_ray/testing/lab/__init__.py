"""A test rig of real separate hosts on one machine: namespaces with their own address, clock, processes, raylet and fake NVML.

Linux, root, iproute2 and util-linux; ``Lab.why_not()`` says what is missing.
"""

from llem_ray.testing.lab.host import Host
from llem_ray.testing.lab.lab import Lab
from llem_ray.testing.lab.machine import Entered, Process, cleanup_stale
from llem_ray.testing.lab.spec import HostSpec, default_gpus

__all__ = ["Entered", "Host", "HostSpec", "Lab", "Process", "cleanup_stale", "default_gpus"]
