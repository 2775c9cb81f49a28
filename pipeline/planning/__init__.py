"""Predict what a run will need, before it starts.

    plan = make_plan(load_config("demo"))
    plan.fits, plan.disk_bytes, plan.uploaded_bytes

Sizes come from metadata: file headers and the Hub's answers. torch is imported only to ask a GPU for its memory.
"""

from pipeline.planning.plan import Plan, Shortage, make_plan

__all__ = ["Plan", "Shortage", "make_plan"]
