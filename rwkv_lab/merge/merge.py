"""The main job: tuned weights into a base checkpoint. Plan from headers, check, stream, say what was done."""

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

import torch

from rwkv_lab.checkpoint import Checkpoint, FileFacts, Layout, file_facts, open_checkpoint, write_text
from rwkv_lab.checkpoint.atomic import one_writer
from rwkv_lab.checkpoint.file_layout import file_layout
from rwkv_lab.checkpoint.paths import to_path
from rwkv_lab.checkpoint.source import BLOCK
from rwkv_lab.checkpoint.stream import WORKERS, Findings, OutTensor
from rwkv_lab.checkpoint.write import file_kind, write_stream
from rwkv_lab.checks import Check
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge import lora, overlay, state
from rwkv_lab.merge.change import Change
from rwkv_lab.merge.patterns import pattern_list, select
from rwkv_lab.merge.plan import MergePlan, MergeResult, PlanRow
from rwkv_lab.merge.provenance import RECORD, as_text, beside, provenance
from rwkv_lab.merge.room import check_output, check_room, disk_free, memory_free
from rwkv_lab.progress import human_bytes

log = logging.getLogger(__name__)

METHODS = ("state", "overlay", "lora")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def merge(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    method: str = "auto",
    alpha: float | None = None,
    weights: Sequence[float] | None = None,
    pissa_init: str | Path | None = None,
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
) -> MergeResult:
    """Merge tuned weights into a base checkpoint, streaming; `out` appears whole or not at all.

    Args:
        base: a whole RWKV model: .pth, .safetensors or Hugging Face folder.
        tuned: a state file, a full or partial fine-tune, or a LoRA; any of the same formats.
        out: path of the merged checkpoint; .pth or .safetensors decides its format.
        method: "state", "overlay", "lora", or "auto", which reads it off `tuned`.
        alpha: for "lora" the LoRA's alpha (its delta is scaled by alpha / r), which no file says; for the others
            0 to 1, how far to go towards `tuned`. 0 gives the base, bit for bit.
        weights: for methods that mix models; none of today's three takes it.
        pissa_init: for PiSSA adapters; none of today's three methods takes it.
        include, exclude: shell-style patterns on the output's tensor names: which of them `tuned` may touch.
        dtype: "bf16", "fp16" or "fp32" for every tensor of the output; None keeps each tensor's own.
        scan: "all" looks for NaN and Inf in every tensor of the output, "changed" in those that do not come from the
        base. allowed_dir: the only folder (with those below it) that the output may go to.
        overwrite: allow `out` to exist; never allows it to be an input.
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
    start = time.perf_counter()
    base, tuned, out = (to_path(p, what).absolute() for p, what in ((base, "base"), (tuned, "tuned"), (out, "out")))
    wide = _check_parameters(scan, precision, alpha)
    include, exclude = pattern_list("include", include), pattern_list("exclude", exclude)
    allow_extra = pattern_list("allow_extra", allow_extra)
    out_dtype = _output_dtype(dtype)
    kind = file_kind(out)
    with open_checkpoint(base) as base_ck, open_checkpoint(tuned) as tuned_ck:
        check_output(out, [base_ck, tuned_ck], allowed_dir, overwrite)
        check_output(_beside(out), [base_ck, tuned_ck], allowed_dir, overwrite)
        _refuse_same(base_ck, tuned_ck)
        layout = _check_base(base_ck, allow_extra or [])
        _check_dtypes(base_ck)
        _check_dtypes(tuned_ck)
        method = method_of(tuned_ck) if method == "auto" else method
        _check_method(method, alpha, weights, pissa_init)
        alpha = 1.0 if alpha is None else float(alpha)  # a number of one type: the recipe is a part of the output
        changes = _changes(method, base_ck, tuned_ck, layout, alpha, wide, allow_extra or [])
        chosen = select([c.name for c in changes], include, exclude)
        skipped = tuple(c.name for c in changes if c.name not in chosen)
        applied = [] if alpha == 0 else [c for c in changes if c.name in chosen]
        recipe = {
            "method": method,
            "alpha": alpha,
            "include": include,
            "exclude": exclude,
            "dtype": str(out_dtype).removeprefix("torch.") if out_dtype else None,
            "precision": precision,
            "allow_extra": allow_extra,
            "allow_nonfinite": allow_nonfinite,
        }
        rows, tensors = _output(base_ck, applied, out_dtype)
        memory = _memory_needed(base_ck, tuned_ck, changes, wide)
        # Fingerprints read some tensor data, or all of it, but all of them are of one length: the size is known before.
        blank = [FileFacts(ck.path, ck.bytes, f"{hash}:{'0' * 64}") for ck in (base_ck, tuned_ck)]
        size = file_layout(kind, tensors, {RECORD: as_text(provenance(recipe, blank))}).size
        plan = MergePlan(method, layout, tuple(rows), skipped, size, disk_free(out.parent), memory, memory_free())
        check_room(out, plan.output_bytes, plan.disk_free, plan.memory_needed, plan.memory_free)
        hashing = time.perf_counter()
        inputs = (file_facts(base_ck, hash), file_facts(tuned_ck, hash))
        hashing = time.perf_counter() - hashing
        if hash == "sha256":
            log.info("sha256 of both inputs took %.1f s", hashing)
        made = provenance(recipe, inputs)
        layout_out = file_layout(kind, tensors, {RECORD: as_text(made)})
        log.info(
            "%s: %d of %d tensors change, output %s",
            method,
            len(plan.changed),
            len(rows),
            human_bytes(plan.output_bytes),
        )
        planned = time.perf_counter()
        result = MergeResult(plan, base, tuned, out, recipe, inputs, seconds={"plan": planned - start, "hash": hashing})
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


def method_of(tuned: Checkpoint) -> str:
    """The method that fits what `tuned` is.

    Raises:
        LayoutError: none of today's methods does.
    """
    methods = {"state": "state", "lora": "lora", "model": "overlay", "partial": "overlay"}
    if tuned.kind in methods:
        return methods[tuned.kind]
    why = f": {tuned.reason}" if tuned.reason else ""
    raise LayoutError(
        f"{tuned.path} is of kind {tuned.kind!r}{why}.\nMerged can be: a state, a full or partial fine-tune, a LoRA."
    )


def check_alpha(method: str, alpha: float | None) -> None:
    """Refuse an alpha that the method cannot use.

    Raises:
        ParameterError: missing for a LoRA, out of range, or not a finite number.
    """
    if alpha is not None and not math.isfinite(alpha):
        raise ParameterError(f"alpha is {alpha}; it must be a finite number")
    if method == "lora":
        if alpha is None:
            raise ParameterError(
                "alpha is missing: a LoRA file does not say it, and the delta is scaled by alpha / r.\n"
                "Give the lora_alpha it was trained with. (For a PiSSA adapter no alpha is right.)"
            )
        if not 0 <= alpha <= torch.finfo(torch.float32).max:
            raise ParameterError(f"alpha is {alpha}; a LoRA's alpha is 0 or more, and a number of float32")
    elif alpha is not None and not 0 <= alpha <= 1:
        raise ParameterError(f"alpha is {alpha}; for method {method!r} it is a share of the way, 0 to 1")


def _check_parameters(scan: str, precision: str, alpha: float | None) -> torch.dtype:
    """The precision as a dtype."""
    if scan not in ("all", "changed"):
        raise ParameterError(f"scan={scan!r}: it must be 'all' or 'changed'")
    if precision not in ("float32", "float64"):
        raise ParameterError(f"precision={precision!r}: it must be 'float32' or 'float64'")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float))):
        raise ParameterError(f"alpha={alpha!r}: it must be a number")
    return torch.float64 if precision == "float64" else torch.float32


def _output_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype in DTYPES:
        return DTYPES[dtype]
    raise ParameterError(f"dtype={dtype!r}: it must be one of {', '.join(DTYPES)}, or None to keep each tensor's own")


def _check_method(method: str, alpha: float | None, weights, pissa_init) -> None:
    if method not in METHODS:
        raise ParameterError(f"method={method!r}: it must be 'auto' or one of {', '.join(METHODS)}")
    if weights is not None:
        raise ParameterError(f"method {method!r} takes no weights: they are for mixing several models")
    if pissa_init is not None:
        raise ParameterError(f"method {method!r} takes no pissa_init: it is for PiSSA adapters")
    check_alpha(method, alpha)


def _check_base(base: Checkpoint, allow_extra: list[str]) -> Layout:
    """The base must be a whole model, without a name that its generation does not know."""
    identity = base.identity
    if identity.layout is None:
        raise LayoutError(f"the base {base.path} is not a whole RWKV model (kind {base.kind!r}): {base.reason}")
    if identity.prefix:
        raise LayoutError(
            f"every name in the base {base.path} begins with {identity.prefix!r}; save it without that prefix"
        )
    misfit = identity.misfit
    if misfit.missing:
        more = f" and {len(misfit.missing) - 10} more" if len(misfit.missing) > 10 else ""
        raise LayoutError(
            f"the base {base.path} ({identity.layout}) lacks {len(misfit.missing)} tensors: "
            f"{', '.join(misfit.missing[:10])}{more}"
        )
    if misfit.wrong:
        name, found, expected = misfit.wrong[0]
        raise LayoutError(f"{name} in {base.path} has shape {list(found)}; its model needs {list(expected)}")
    extra = [n for n in misfit.extra if not any(fnmatchcase(n, p) for p in allow_extra)]
    if extra:
        raise LayoutError(
            f"the base {base.path} has {len(extra)} tensors that RWKV-{identity.layout.version} does not know: "
            f"{', '.join(extra[:10])}.\nIf they belong there, name them in allow_extra."
        )
    return identity.layout


def _refuse_same(base: Checkpoint, tuned: Checkpoint) -> None:
    if any(os.path.samestat(os.fstat(b.fd), os.fstat(t.fd)) for b in base.files for t in tuned.files):
        raise ParameterError(f"base and tuned are the same file {tuned.path}; the output would be the base")


def _check_dtypes(ck: Checkpoint) -> None:
    for name, t in ck.info.items():
        if t.dtype not in _FLOATS:
            raise LayoutError(
                f"{name} in {ck.path} is {t.dtype}; weights must be bfloat16, float16, float32 or float64"
            )
    doubles = sum(t.dtype == torch.float64 for t in ck.info.values())
    if doubles:
        log.warning("%s holds %d float64 tensors; RWKV models have none", ck.path, doubles)


def _changes(
    method: str,
    base: Checkpoint,
    tuned: Checkpoint,
    layout: Layout,
    alpha: float,
    precision: torch.dtype,
    allow_extra: list[str],
) -> list[Change]:
    if method == "state":
        return state.changes(base, tuned, layout, alpha, precision)
    job = lora.changes if method == "lora" else overlay.changes
    return job(base, tuned, layout, alpha, precision, allow_extra)


def _output(
    base: Checkpoint, applied: list[Change], out_dtype: torch.dtype | None
) -> tuple[list[PlanRow], list[OutTensor]]:
    """The output's tensors: the base's in their order, then new ones."""
    changes = {c.name: c for c in applied}
    rows, tensors = [], []
    for name in [*base.info, *(n for n in changes if n not in base.info)]:
        change, info = changes.get(name), base.info.get(name)
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


def _memory_needed(base: Checkpoint, tuned: Checkpoint, changes: list[Change], precision: torch.dtype) -> int:
    """Upper bound of the anonymous memory: each thread's blocks, a LoRA's two halves, tensors that must be gathered."""
    # Values, product and rounded copy of one block in float64: a dozen blocks, of which the allocator keeps old ones.
    # Blends of models of any size were seen to need 80 MB in all.
    blocks = 48 * BLOCK
    halves = 0
    if any(c.action == "lora" for c in changes):
        per_matrix: dict[str, int] = {}
        for name, t in tuned.info.items():
            stem = name.rsplit(".lora_", 1)[0]
            per_matrix[stem] = per_matrix.get(stem, 0) + t.nbytes + t.numel * precision.itemsize
        halves = max(per_matrix.values())
    views = [t for ck in (base, tuned) for t in ck.info.values() if t.stride is not None]
    gathered = 2 * max((t.span + t.nbytes for t in views), default=0)  # one of the base, one of tuned, for a blend
    return WORKERS * (blocks + halves + gathered)


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
