"""Sweep to trials to plan to placement. Pure."""

from llem_ray.planning.estimate import PastRun, estimate_cost
from llem_ray.planning.plan import gang_gpus, make_plan, run_hash, trial_id
from llem_ray.planning.serialise import plan_from_dict, plan_to_dict

__all__ = ["PastRun", "estimate_cost", "gang_gpus", "make_plan", "plan_from_dict", "plan_to_dict", "run_hash", "trial_id"]
