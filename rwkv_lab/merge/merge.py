"""`merge`: tuned weights into a base checkpoint, models with models. Open, plan from headers, write."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from rwkv_lab.arguments import checked
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.families import family_of
from rwkv_lab.merge.inputs import merged_in_itself, open_inputs, open_tuned
from rwkv_lab.merge.plan import MergeResult
from rwkv_lab.merge.planning import layout_of_inputs, plan_merge, with_method
from rwkv_lab.merge.spec import MergeOptions, MergeSpec
from rwkv_lab.merge.writing import write_merge

AnyPath = str | os.PathLike[str]


def merge(
    base: AnyPath,
    tuned: AnyPath | Sequence[AnyPath] | None,
    out: AnyPath,
    method: str = "auto",
    *,
    alpha: float | Mapping[str, Any] | Sequence[Any] | None = None,
    weights: Sequence[Any] | Mapping[str, Any] | None = None,
    pissa_init: AnyPath | Sequence[AnyPath | None] | None = None,
    parameters: Mapping[str, Any] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    scan: str = "all",
    dtype: str | torch.dtype | None = None,
    allowed_dir: AnyPath | None = None,
    overwrite: bool = False,
    allow_other_base: bool = False,
    dry_run: bool = False,
    allow_extra: Sequence[str] | None = None,
    allow_nonfinite: bool = False,
    precision: str = "float32",
    hash: str = "records",
) -> MergeResult:
    """Merge tuned weights into a base checkpoint, streaming; `out` appears whole or not at all.

    Args:
        base: a whole RWKV model: .pth, .safetensors or Hugging Face folder.
        tuned: a state file, a full or partial fine-tune, any of the same formats; or an adapter: LoRA, PiSSA or MiSS,
            of RWKV-LM-LoRA, RWKV-PEFT, rwkv_lab, or a folder of Hugging Face's peft. A list of adapters, or of
            fine-tunes for the methods that mix several models.
        out: path of the merged checkpoint; .pth or .safetensors decides its format.
        method: "state", "overlay", "lora", "pissa", "miss" ("adapters" for several kinds), or "auto", which reads it
            off `tuned`; "linear", "slerp",
            "task_arithmetic", "ties", "dare_linear", "dare_ties" or "model_stock" mix whole models, "passthrough"
            stacks their layers.
        alpha: for "lora" the LoRA's alpha (its delta is scaled by alpha / r), where its file does not state it; for
            "state", "overlay" and "slerp" 0 to 1, how far to go towards `tuned`; for the other methods the factor
            on what is added to the base. 0 gives the base, bit for bit.
        weights: [w_base, w_tuned, …] for "linear", [w_tuned, …] for those that add deltas and for adapters, which are
            taken in the order of the list.
        pissa_init: of a PiSSA adapter, what it started from: it goes with the original base then. "svd": computed again
            from the base by the exact SVD; right only if training began with that, and refused where it is not
            determined.
        parameters: what else the method takes, by name (`MERGE_METHODS[method].parameters`), such as density and seed,
            or layers for "passthrough", and for adapters use_rslora, bat, residual_base, quant and unmerge. Of a
            mixing method every number may be a setting that differs from tensor to tensor (`settings`), alpha and
            weights too: parameters={"alpha": {"blocks.*.att": 0.3}}.
        include, exclude: patterns on the output's tensor names (`rwkv_lab.patterns`): which of them may change.
        scan: "all" looks for NaN and Inf in every tensor of the output, "changed" in those that do not come from the
            base.
        dtype: "bf16", "fp16" or "fp32" for every tensor of the output; None keeps each tensor's own.
        allowed_dir: the only folder (with those below it) that the output may go to.
        overwrite: allow `out` to exist; never allows it to be an input.
        allow_other_base: adapters and states that rwkv_lab trained name their base by its values; merge them into
            another one all the same.
        dry_run: stop after the plan; nothing is written.
        allow_extra: patterns of tensor names that may be there although the generation does not know them.
        allow_nonfinite: record NaN, Inf and overflow instead of refusing them.
        precision: "float32" or "float64" for the arithmetic; the result is rounded to the output dtype once.
        hash: "records" fingerprints the inputs for free, "sha256" reads them whole.
    Returns:
        The plan, and unless `dry_run` what was written and checked.
    Raises:
        ParameterError, LayoutError, OutputError, UnsafeFileError, CorruptFileError: before any tensor data is read.
        NumericsError: NaN, Inf or overflow on the way; nothing is left behind.
    """
    given = dict(locals())
    spec = MergeSpec.read({name: given[name] for name in MergeSpec.model_fields})
    return run_merge(spec, out, MergeOptions.read({name: given[name] for name in MergeOptions.model_fields}))


@checked
def run_merge(spec: MergeSpec, out: AnyPath, options: MergeOptions | None = None) -> MergeResult:
    """As `merge`, of a spec: open, plan, write.

    Raises:
        RwkvLabError: as `merge`.
    """
    start = time.perf_counter()
    spec = merged_in_itself(spec)
    with open_inputs(spec) as inputs:
        plan = plan_merge(inputs, spec, out, options)
        planned = time.perf_counter()
        result = write_merge(plan)
    return replace(result, seconds={"plan": planned - start, **result.seconds})


@checked
def check_spec(spec: MergeSpec) -> None:
    """Refuse what a spec and the headers of its tuned files can tell, before a base is there.

    Raises:
        ParameterError: options that the method does not take, or that the files leave open.
        LayoutError, CorruptFileError, UnsafeFileError: of the tuned files.
    """
    if spec.method != "auto":
        family_of(spec.method).check(spec)
    with ExitStack() as stack:
        tuned, init = open_tuned(spec, stack)
        spec = with_method(spec, tuned)
        family = family_of(spec.method)
        family.check_tuned(tuned, init, family.check(spec))


@checked
def check_files(spec: MergeSpec) -> None:
    """Refuse what a spec and the headers of all its files can tell, without the libraries that a merge needs.

    Raises:
        ParameterError: options that the method does not take, or that the files leave open.
        LayoutError, CorruptFileError, UnsafeFileError: files that cannot be merged, or do not belong together.
    """
    check_spec(spec)
    spec = merged_in_itself(spec)
    with open_inputs(spec) as inputs:
        layout, _ = layout_of_inputs(inputs, spec)
        spec = with_method(spec, inputs.tuned)
        family = family_of(spec.method)
        family.check_inputs(inputs, family.check(spec), layout)
