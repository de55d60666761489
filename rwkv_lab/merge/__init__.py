"""Merging: tuned weights into a base checkpoint, models with models."""

from rwkv_lab.merge.merge import merge
from rwkv_lab.merge.plan import MergePlan, MergeResult, PlanRow
from rwkv_lab.merge.recipe import merge_recipe
from rwkv_lab.merge.verify import verify_merge

__all__ = ["MergePlan", "MergeResult", "PlanRow", "merge", "merge_recipe", "verify_merge"]
