"""Merging: tuned weights into a base checkpoint, models with models."""

from rwkv_lab.merge.extract import ExtractResult, extract_lora
from rwkv_lab.merge.families import MERGE_METHODS, Method
from rwkv_lab.merge.inputs import InputFile, MergeInputs, open_inputs
from rwkv_lab.merge.merge import check_files, check_spec, merge, run_merge
from rwkv_lab.merge.plan import MergePlan, MergeResult, PlanRow
from rwkv_lab.merge.planning import plan_merge
from rwkv_lab.merge.recipe import merge_recipe, read_recipe
from rwkv_lab.merge.spec import ExtractSpec, MergeOptions, MergeSpec
from rwkv_lab.merge.verify import verify_merge
from rwkv_lab.merge.writing import write_merge

__all__ = [
    "MERGE_METHODS",
    "ExtractResult",
    "ExtractSpec",
    "InputFile",
    "MergeInputs",
    "MergeOptions",
    "MergePlan",
    "MergeResult",
    "MergeSpec",
    "Method",
    "PlanRow",
    "check_files",
    "check_spec",
    "extract_lora",
    "merge",
    "merge_recipe",
    "open_inputs",
    "plan_merge",
    "read_recipe",
    "run_merge",
    "verify_merge",
    "write_merge",
]
