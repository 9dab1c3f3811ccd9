"""Sweep to trials to plan to placement. Pure."""

from llem_ray.planning.estimate import PastRun, estimate_cost
from llem_ray.planning.ordering import lower_bound_s, order_requests
from llem_ray.planning.packing import GangRequest, NodeRoom, Seat, seats_for, why_infeasible
from llem_ray.planning.plan import gang_gpus, make_plan, run_hash, trial_id
from llem_ray.planning.schedule import Running, Schedule, Start, next_starts, simulate
from llem_ray.planning.serialise import plan_from_dict, plan_to_dict

__all__ = [
    "GangRequest",
    "NodeRoom",
    "PastRun",
    "Running",
    "Schedule",
    "Seat",
    "Start",
    "estimate_cost",
    "gang_gpus",
    "lower_bound_s",
    "make_plan",
    "next_starts",
    "order_requests",
    "plan_from_dict",
    "plan_to_dict",
    "run_hash",
    "seats_for",
    "simulate",
    "trial_id",
    "why_infeasible",
]
