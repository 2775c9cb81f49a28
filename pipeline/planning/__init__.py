"""Predict what a run will need, before it starts.

    plan = make_plan(load_config("demo"))
    plan.fits, plan.disk_bytes, plan.uploaded_bytes

Sizes come from metadata: headers, and what the Hub says of a repository. Nothing here imports torch, but to ask a
GPU that is there for its memory.
"""

from pipeline.planning.plan import Plan, Shortage, make_plan

__all__ = ["Plan", "Shortage", "make_plan"]
