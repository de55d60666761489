"""The main job: tuned weights into a base checkpoint. Plan from headers, check, stream, say what was done."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch

from rwkv_lab.checkpoint import Checkpoint, FileFacts, Layout, TensorInfo, file_facts, open_checkpoint, write_text
from rwkv_lab.checkpoint.atomic import one_writer
from rwkv_lab.checkpoint.file_layout import file_layout
from rwkv_lab.checkpoint.source import BLOCK
from rwkv_lab.checkpoint.stream import WORKERS, Findings, OutTensor
from rwkv_lab.checkpoint.write import file_kind, write_stream
from rwkv_lab.checks import Check
from rwkv_lab.errors import ParameterError
from rwkv_lab.machine import disk_free, memory_free
from rwkv_lab.merge import adapter, mix, overlay, stack, state
from rwkv_lab.merge.change import Change
from rwkv_lab.merge.contained import adapters_in, after_merging, after_mixing
from rwkv_lab.merge.meaning import notes_on
from rwkv_lab.merge.methods import ADAPTERS, INTO_BASE
from rwkv_lab.merge.mixing import MIXING
from rwkv_lab.merge.patterns import pattern_list, select
from rwkv_lab.merge.plan import MergePlan, MergeResult, PlanRow
from rwkv_lab.merge.provenance import RECORD, as_text, beside, provenance
from rwkv_lab.merge.refusals import (
    check_base,
    check_dtypes,
    check_method,
    check_parameters,
    method_of,
    mixing_values,
    output_dtype,
    plain,
    refuse_same,
)
from rwkv_lab.merge.room import check_output, check_room
from rwkv_lab.paths import to_path
from rwkv_lab.progress import human_bytes

log = logging.getLogger(__name__)


def merge(
    base: str | Path,
    tuned: str | Path | Sequence[str | Path] | None,
    out: str | Path,
    method: str = "auto",
    alpha: float | Mapping | Sequence | None = None,
    weights: Sequence[float] | None = None,
    pissa_init: str | Path | Sequence | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    scan: str = "all",
    allowed_dir: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_extra: Sequence[str] | None = None,
    allow_nonfinite: bool = False,
    precision: str = "float32",
    hash: str = "records",
    parameters: Mapping[str, object] | None = None,
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
        alpha: for "lora" the LoRA's alpha (its delta is scaled by alpha / r), where its file does not say it; for
            "state", "overlay" and "slerp" 0 to 1, how far to go towards `tuned`; for the other methods the factor
            on what is added to the base. 0 gives the base, bit for bit.
        weights: [w_base, w_tuned, …] for "linear", [w_tuned, …] for those that add deltas and for adapters, which are
            taken in the order of the list.
        pissa_init: of a PiSSA adapter, what it started from: it goes with the original base then.
        include, exclude: shell-style patterns on the output's tensor names: which of them `tuned` may touch.
        dtype: "bf16", "fp16" or "fp32" for every tensor of the output; None keeps each tensor's own.
        scan: "all" looks for NaN and Inf in every tensor of the output, "changed" in those that do not come from the
            base.
        allowed_dir: the only folder (with those below it) that the output may go to.
        overwrite: allow `out` to exist; never allows it to be an input.
        dry_run: stop after the plan; nothing is written.
        allow_extra: patterns of tensor names that may be there although the generation does not know them.
        allow_nonfinite: record NaN, Inf and overflow instead of refusing them.
        precision: "float32" or "float64" for the arithmetic; the result is rounded to the output dtype once.
        hash: "records" fingerprints the inputs for free, "sha256" reads them whole.
        parameters: what else the method takes, by name, such as density and seed (`rwkv_lab.merge.mixing`), or layers
            for "passthrough", and for adapters use_rslora, bat, residual_base, quant and unmerge
            (`rwkv_lab.merge.adapter.TAKES`). Of a mixing method every number may be a setting that differs from
            tensor to tensor (`settings`), alpha and weights too: parameters={"alpha": {"blocks.*.att": 0.3}}.
    Returns:
        The plan, and unless `dry_run` what was written and checked.
    Raises:
        ParameterError, LayoutError, OutputError, UnsafeFileError, CorruptFileError: before any tensor data is read.
        NumericsError: NaN, Inf or overflow on the way; nothing is left behind.
    """
    start = time.perf_counter()
    base, out = (to_path(p, what).absolute() for p, what in ((base, "base"), (out, "out")))
    tuned = _paths(tuned, method)
    wide = check_parameters(scan, precision)
    include, exclude = pattern_list("include", include), pattern_list("exclude", exclude)
    allow_extra = pattern_list("allow_extra", allow_extra)
    out_dtype = output_dtype(dtype)
    kind = file_kind(out)
    with ExitStack() as opened:
        base_ck, *tuned_cks = [opened.enter_context(open_checkpoint(p)) for p in (base, *tuned)]
        for path in (out, _beside(out)):
            check_output(path, [base_ck, *tuned_cks], allowed_dir, overwrite)
        refuse_same(base_ck, tuned_cks)
        layout = check_base(base_ck, allow_extra or [])
        for ck in (base_ck, *tuned_cks):
            check_dtypes(ck)
        asked, method = method, _method(tuned_cks) if method == "auto" else method
        check_method(method, alpha, weights, parameters, pissa_init)
        beside_base = None
        if method in ADAPTERS:
            beside_base = opened.enter_context(
                adapter.open_adapters(tuned_cks, asked, alpha, weights, pissa_init, parameters or {})
            )
            method = beside_base.method
            for path in (out, _beside(out)):
                check_output(path, beside_base.init_files, allowed_dir, overwrite)
            changes = adapter.changes(base_ck, tuned_cks, layout, beside_base, wide, allow_extra or [])
            values, layout_after = _adapter_values(alpha, beside_base, parameters), layout
        else:
            values = _values(method, alpha, weights, parameters)
            changes, layout_after = _changes(method, base_ck, tuned_cks, layout, values, wide, allow_extra or [])
        kept = {} if method == "passthrough" else base_ck.info
        if not kept and (include or exclude):
            raise ParameterError(
                "include and exclude say what may change in the base; method 'passthrough' makes a new model"
            )
        chosen = select([c.name for c in changes], include, exclude)
        skipped = tuple(c.name for c in changes if c.name not in chosen)
        nothing = method in (*INTO_BASE, *ADAPTERS) and values["alpha"] == 0
        applied = [] if nothing else [c for c in changes if c.name in chosen]
        contains, notes = adapters_in(base_ck), ()
        if beside_base and applied:
            contains, notes = after_merging(base_ck, tuned_cks, beside_base, include, exclude)
        elif any(c.source != "base" for c in applied):
            contains = after_mixing(base_ck, tuned_cks, [c.name for c in applied])
        recipe = {
            "method": method,
            "alpha": values.pop("alpha", None),
            "weights": values.pop("weights", None),
            "parameters": values,
            "include": include,
            "exclude": exclude,
            "dtype": str(out_dtype).removeprefix("torch.") if out_dtype else None,
            "precision": precision,
            "allow_extra": allow_extra,
            "allow_nonfinite": allow_nonfinite,
        }
        rows, tensors = _output(kept, applied, out_dtype)
        inits = beside_base.init_files if beside_base else []
        memory = _memory_needed([base_ck, *tuned_cks], changes)
        if beside_base:
            memory += WORKERS * adapter.memory_for(base_ck, beside_base, wide)
        # Fingerprints read some tensor data, or all of it, but all of them are of one length: the size is known before.
        blank = [FileFacts(ck.path, ck.bytes, f"{hash}:{'0' * 64}") for ck in (base_ck, *tuned_cks, *inits)]
        size = file_layout(kind, tensors, {RECORD: as_text(provenance(recipe, blank, contains))}).size
        plan = MergePlan(
            method,
            layout_after,
            tuple(rows),
            skipped,
            size,
            disk_free(out.parent),
            memory,
            memory_free(),
            (*notes, *adapter.notes_on_adapters(base_ck, beside_base))
            if beside_base
            else notes_on(method, layout_after, [r for r in rows if r.action in ("mix", "layer")]),
        )
        check_room(out, plan.output_bytes, plan.disk_free, plan.memory_needed, plan.memory_free)
        hashing = time.perf_counter()
        inputs = tuple(file_facts(ck, hash) for ck in (base_ck, *tuned_cks, *inits))
        hashing = time.perf_counter() - hashing
        if hash == "sha256":
            log.info("sha256 of %d inputs took %.1f s", len(inputs), hashing)
        made = provenance(recipe, inputs, contains)
        layout_out = file_layout(kind, tensors, {RECORD: as_text(made)})
        log.info(
            "%s: %d of %d tensors change, output %s",
            method,
            len(plan.changed),
            len(rows),
            human_bytes(plan.output_bytes),
        )
        planned = time.perf_counter()
        result = MergeResult(
            plan,
            base,
            tuned,
            out,
            recipe,
            inputs,
            seconds={"plan": planned - start, "hash": hashing},
            pissa_init=beside_base.inits if beside_base else (),
        )
        if dry_run:
            return result
        untouched = {r.name for r in rows if r.action == "copy"}
        with one_writer(out, _beside(out), overwrite) as before_publishing:
            findings = write_stream(
                out,
                tensors,
                layout_out,
                overwrite,
                lambda t: scan == "all" or t.name not in untouched,
                not allow_nonfinite,
                before_publishing,
            )
            written = _describe_output(out, made, findings, overwrite)
    checks = _streaming_checks(plan, findings, scan, allow_nonfinite, written[0])
    seconds = result.seconds | {"merge": time.perf_counter() - planned}
    return replace(result, outputs=written, checks=checks, seconds=seconds)


def _paths(tuned: object, method: str) -> tuple[Path, ...]:
    """The tuned files, of which a method may take several, and stacking none."""
    given = (
        list(tuned)
        if isinstance(tuned, (list, tuple))
        else []
        if tuned is None and method == "passthrough"
        else [tuned]
    )
    if method in INTO_BASE and len(given) != 1 or method in ("auto", *ADAPTERS) and not given:
        raise ParameterError(
            f"tuned names {len(given)} files; method {method!r} takes one. Name a method that mixes models"
        )
    return tuple(to_path(p, "tuned").absolute() for p in given)


def _method(tuned: Sequence[Checkpoint]) -> str:
    """The method that fits what the tuned files are; of several, only adapters say it."""
    methods = {method_of(ck) for ck in tuned}
    if len(tuned) > 1 and not methods <= set(ADAPTERS):
        raise ParameterError(
            f"tuned names {len(tuned)} files; method 'auto' takes one, or adapters. Name a method that mixes models"
        )
    return methods.pop() if len(methods) == 1 else "adapters"


def _adapter_values(alpha: object, adapters: adapter.Adapters, parameters: Mapping | None) -> dict[str, object]:
    """As `_values`. Of alpha what was given: what a file says itself need not be said again."""
    given = plain("parameters", dict(parameters or {}))
    given = {k: v for k, v in given.items() if k not in ("quant", "unmerge") and v is not None}
    given |= {"quant": adapters.quant} if adapters.quant != "none" else {}
    given |= {"unmerge": True} if adapters.unmerge else {}
    several = len(adapters.weights) > 1 or adapters.weights != (1.0,)
    asked = [None if a is None else float(a) for a in alpha] if isinstance(alpha, (list, tuple)) else alpha
    asked = float(asked) if isinstance(asked, int) else asked
    return {"alpha": asked, "weights": list(adapters.weights) if several else None, **given}


def _values(method: str, alpha: object, weights: object, parameters: Mapping | None) -> dict[str, object]:
    """What decides the values that a method computes: it goes into the recipe."""
    if method in MIXING:
        return mixing_values(method, alpha, weights, parameters)
    if method in INTO_BASE:  # a number of one type: the recipe is a part of the output
        return {"alpha": 1.0 if alpha is None else float(alpha)}
    given = {"alpha": alpha, "weights": weights, **(parameters or {})}
    wrong = [name for name, value in given.items() if value is not None and name != "layers"]
    if wrong:
        raise ParameterError(f"method {method!r} takes no {wrong[0]}; it takes layers, in parameters")
    return {"layers": plain("layers", given.get("layers"))}


def _changes(
    method: str,
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    layout: Layout,
    values: Mapping[str, object],
    precision: torch.dtype,
    allow_extra: list[str],
) -> tuple[list[Change], Layout]:
    """What does not simply come from the base, and the layout of the output."""
    if method == "passthrough":
        return stack.changes(base, tuned, layout, values["layers"])
    if method in MIXING:
        return mix.changes(method, base, tuned, layout, values, precision, allow_extra), layout
    if method == "state":
        return state.changes(base, tuned[0], layout, values["alpha"], precision), layout
    return overlay.changes(base, tuned[0], layout, values["alpha"], precision, allow_extra), layout


def _output(
    kept: Mapping[str, TensorInfo], applied: list[Change], out_dtype: torch.dtype | None
) -> tuple[list[PlanRow], list[OutTensor]]:
    """The output's tensors: what is kept of the base in its order, then new ones."""
    changes = {c.name: c for c in applied}
    rows, tensors = [], []
    for name in [*kept, *(n for n in changes if n not in kept)]:
        change, info = changes.get(name), kept.get(name)
        if change is None:
            change = Change(name, "copy", "base", info.shape, info.dtype, copy=info)
        dtype = out_dtype or change.dtype
        action, compute = change.action, change.compute
        if change.copy is not None and dtype != change.dtype:
            action, compute = ("cast" if action == "copy" else action), change.copy.blocks
        tensor = OutTensor(name, change.shape, dtype, source=change.copy, compute=compute)
        rows.append(PlanRow(name, action, change.source, change.shape, dtype, tensor.nbytes))
        tensors.append(tensor)
    return rows, tensors


def _memory_needed(inputs: Sequence[Checkpoint], changes: list[Change]) -> int:
    """Upper bound of the anonymous memory: each thread's blocks, tensors that must be gathered."""
    # Values, product and rounded copy of one block in float64: a dozen blocks, of which the allocator keeps old ones.
    # Blends of models of any size were seen to need 80 MB in all; each further model brings its own blocks and deltas.
    mixed = any(c.action == "mix" for c in changes)
    blocks = (48 + (32 * (len(inputs) - 1) if mixed else 0)) * BLOCK
    # One view of each file at a time: a mix reads them together.
    gathered = sum(
        max((t.span + t.nbytes for t in ck.info.values() if t.stride is not None), default=0) for ck in inputs
    )
    return WORKERS * (blocks + gathered)


def _beside(out: Path) -> Path:
    return out.with_name(out.name + ".json")


def _describe_output(out: Path, made: dict, findings: list[Findings], overwrite: bool) -> tuple[FileFacts, FileFacts]:
    """Write the provenance beside the output; facts of both files."""
    facts, note = file_facts(out), _beside(out)
    text = beside(made, facts, findings)
    write_text(note, text, overwrite)
    data = text.encode()
    return facts, FileFacts(note, len(data), f"sha256:{sha256(data).hexdigest()}")


def _streaming_checks(
    plan: MergePlan, findings: list[Findings], scan: str, allow_nonfinite: bool, written: FileFacts
) -> tuple[Check, ...]:
    looked_at = sum(scan == "all" or r.action != "copy" for r in plan.rows)
    limit = "any: allow_nonfinite" if allow_nonfinite else 0
    unfit = f"tensors with NaN, Inf or overflow, of {looked_at} scanned"
    return (
        Check(unfit, len(findings), limit, allow_nonfinite or not findings),
        Check("size of the output, bytes", written.bytes, plan.output_bytes, written.bytes == plan.output_bytes),
    )
