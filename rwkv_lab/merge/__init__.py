"""Merging: tuned weights into a base checkpoint, models with models."""

from rwkv_lab.merge.extract import ExtractResult, extract_lora
from rwkv_lab.merge.merge import merge
from rwkv_lab.merge.plan import MergePlan, MergeResult, PlanRow
from rwkv_lab.merge.recipe import merge_recipe
from rwkv_lab.merge.verify import verify_merge

__all__ = [
    "ExtractResult",
    "MergePlan",
    "MergeResult",
    "PlanRow",
    "extract_lora",
    "merge",
    "merge_recipe",
    "verify_merge",
]
