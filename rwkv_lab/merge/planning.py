"""The plan of a merge, from headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, FileFacts, Layout, TensorInfo
from rwkv_lab.checkpoint.file_layout import file_layout
from rwkv_lab.checkpoint.origin import blank_weights, lineage
from rwkv_lab.checkpoint.output_checks import check_free_space
from rwkv_lab.checkpoint.provenance import RECORD, as_text, provenance
from rwkv_lab.checkpoint.source import BLOCK
from rwkv_lab.checkpoint.stream import WORKERS, OutTensor
from rwkv_lab.checkpoint.write import file_kind
from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.adapter_set import ANY
from rwkv_lab.merge.changed_tensors import ChangedTensor, keeping_zeros
from rwkv_lab.merge.effect import Meter
from rwkv_lab.merge.families import family_of, method_of
from rwkv_lab.merge.family import Changes, Description
from rwkv_lab.merge.input_checks import (
    check_base,
    check_dtypes,
    layout_of_states,
    notes_on_names,
    refuse_same_file,
    refuse_unusable,
)
from rwkv_lab.merge.inputs import MergeInputs
from rwkv_lab.merge.mixing import MIXING
from rwkv_lab.merge.origins import notes_on_origins
from rwkv_lab.merge.output_checks import check_merge_output
from rwkv_lab.merge.parts import refuse_cut_model, refuse_shard
from rwkv_lab.merge.plan import UNCHANGED, MergePlan, PlanRow
from rwkv_lab.merge.spec import MergeOptions, MergeSpec
from rwkv_lab.merge.states import missing_states, notes_on_states
from rwkv_lab.paths import to_path
from rwkv_lab.patterns import is_selected, refuse_unmatched
from rwkv_lab.text import counted


@checked
def plan_merge(
    inputs: MergeInputs, spec: MergeSpec, out: str | os.PathLike[str], options: MergeOptions | None = None
) -> MergePlan:
    """What a merge with this spec will do. Read are headers and, for fingerprints, the first 4 KiB of tensors that
    carry no checksum.

    Args:
        inputs: open, of this spec.
        out: path of the output; .pth or .safetensors decides its format.
        options: how it will be written; what they forbid is refused here.
    Raises:
        ParameterError, LayoutError, OutputError: what cannot be merged, or not there.
    """
    options = options or MergeOptions.read({})
    path = to_path(out, "out").absolute()
    kind = file_kind(path)
    check_merge_output(path, inputs.checkpoints, options.allowed_dir, options.overwrite)
    layout, states = layout_of_inputs(inputs, spec)
    spec = with_method(spec, inputs.tuned)
    family = family_of(spec.method)
    changes = family.changes(inputs, family.check(spec), layout)
    selected = selected_names([c.name for c in changes.tensors], spec.include, spec.exclude)
    applied = [] if changes.without_effect else [c for c in changes.tensors if c.name in selected]
    description = family.describe(inputs, changes, applied)
    kept = inputs.base.info if changes.keeps_base else {}
    zeros = [] if states else missing_states(kept, applied, changes.layout)
    rows, tensors, meters = _output(kept, [*applied, *zeros], spec.output_dtype)
    notes = [*notes_on_names(inputs.checkpoints)]
    notes += notes_on_origins(inputs, options.allow_other_base) if applied and not states else []
    notes += [*description.notes, *([] if states else notes_on_states(applied, zeros, changes.layout))]
    if all(row.action in UNCHANGED for row in rows) and (inputs.tuned or changes.keeps_base):
        notes.append(_nothing(inputs, len(rows), changes.keeps_base))
    # Hashing whole files waits until they are written; all fingerprints of a kind are of one length.
    facts = inputs.facts("records")
    blank = [FileFacts(f.path, f.bytes, f"{options.hash}:{'0' * 64}") for f in facts]
    recipe, bases = changes.spec.recipe(), lineage(inputs.base, blank_weights(inputs.base))
    made = provenance(recipe, blank, description.contains, bases=bases, downloads=inputs.downloads)
    size = file_layout(kind, tensors, {RECORD: as_text(made)}).size
    memory = _memory_needed([inputs.base, *inputs.tuned], changes)
    disk_free, memory_free = check_free_space(path, size, memory, "the merge")
    return MergePlan(
        spec=changes.spec,
        options=options,
        out=path,
        inputs=facts,
        layout=changes.layout,
        rows=tuple(rows),
        skipped=tuple(c.name for c in changes.tensors if c.name not in selected),
        output_bytes=size,
        disk_free=disk_free,
        memory_needed=memory,
        memory_free=memory_free,
        notes=tuple(notes),
        contains=tuple(description.contains),
        files=inputs,
        tensors=tensors,
        meters=meters,
        look=partial(_look, changes, applied, description),
    )


def layout_of_inputs(inputs: MergeInputs, spec: MergeSpec) -> tuple[Layout, bool]:
    """The layout of the base, and whether base and tuned are states; inputs that no method takes are refused.

    Raises:
        ParameterError, LayoutError: says why.
    """
    refuse_unusable(inputs.checkpoints)
    refuse_same_file(inputs.base, inputs.tuned)
    for role, ck in inputs.with_roles:
        refuse_shard(role, ck)
    of_states = layout_of_states(inputs.base, inputs.tuned)
    if of_states is not None and spec.method not in MIXING:
        raise ParameterError(
            f"base and tuned are states, and method={spec.method!r} puts one into a model.\n"
            "Mix them with method='linear' and weights, one per state, the base first."
        )
    layout = of_states or check_base(inputs.base, spec.allow_extra or [])
    for ck in (inputs.base, *inputs.tuned):
        check_dtypes(ck)
    for ck in inputs.tuned if spec.include is None and of_states is None else ():
        refuse_cut_model(ck, layout)
    return layout, of_states is not None


def _nothing(inputs: MergeInputs, count: int, keeps_base: bool) -> str:
    names = ", ".join(ck.path.name for ck in inputs.tuned[:3]) or "other models"
    if not keeps_base:  # a stack of the base's own layers, some of them left out
        return f"Nothing of {names} goes in."
    tensors = counted(count, "tensor is", "tensors are")
    return f"0 of {tensors} to change: nothing of {names} goes in, and the output is the base."


def _look(changes: Changes, applied: Sequence[ChangedTensor], planned: Description) -> tuple[Sequence, Sequence[str]]:
    """What the output contains, and notes that the plan did not have."""
    found = planned if changes.look is None else changes.look(applied)
    return found.contains, [note for note in found.notes if note not in planned.notes]


def with_method(spec: MergeSpec, tuned: Sequence[Checkpoint]) -> MergeSpec:
    """The spec with the method that "auto" stands for; of several files, only adapters tell it.

    Raises:
        ParameterError: several files that are no adapters.
        LayoutError: a file that no method takes.
    """
    if spec.method != "auto":
        return spec
    methods = {method_of(ck) for ck in tuned}
    if methods and all(family_of(m) is family_of(ANY) for m in methods):
        return spec.changed(method=ANY)
    if len(tuned) != 1:
        raise ParameterError(
            f"tuned names {counted(len(tuned), 'file')}; method 'auto' takes one, or adapters. "
            "Name a method that mixes models"
        )
    return spec.changed(method=methods.pop())


def selected_names(names: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> set[str]:
    """Those that include selects (all where it is None) and exclude does not.

    Raises:
        ParameterError: a pattern that matches no name, or patterns that leave nothing.
    """
    for what, patterns in (("include", include), ("exclude", exclude)):
        refuse_unmatched(what, patterns, names, "tensors that would change")
    selected = {n for n in names if is_selected(n, include, exclude)}
    if names and not selected:
        raise ParameterError(
            f"include and exclude keep out all {len(names)} tensors that would change; the output would be the base.\n"
            "Loosen them, or pass alpha=0 if the base is what you want."
        )
    return selected


def _output(
    kept: Mapping[str, TensorInfo], applied: Sequence[ChangedTensor], dtype: torch.dtype | None
) -> tuple[list[PlanRow], list[OutTensor], list[Meter]]:
    """The output's tensors: what is kept of the base in its order, then new ones; and what measures them."""
    changes = {c.name: c for c in applied}
    copies = {n: ChangedTensor(n, "copy", "base", info.shape, info.dtype, copy=info) for n, info in kept.items()}
    rows, tensors, meters = [], [], []
    for change in (copies | changes).values():
        wanted = dtype or change.dtype
        cast = change.copy is not None and wanted != change.dtype
        action = "cast" if cast and change.action == "copy" else change.action
        tensor = OutTensor(change.name, change.shape, wanted, source=change.copy)
        target, copied = action not in (*UNCHANGED, "layer"), change.copy is not None and not cast
        count = tensor.nbytes // wanted.itemsize
        meter = Meter(change.name, count, wanted, kept.get(change.name), copied, target)
        compute = change.copy.blocks if change.copy is not None and cast else None
        if change.compute is not None:
            faster = change.compute_rounded if wanted == change.dtype else None
            compute = meter.watched(keeping_zeros(faster or change.compute))
        measured = target or cast and wanted == torch.float16
        if measured:
            meters.append(meter)
        rows.append(PlanRow(change.name, action, change.source, change.shape, wanted, tensor.nbytes))
        tensors.append(replace(tensor, compute=compute, watch=meter.see if measured else None))
    return rows, tensors, meters


def _memory_needed(inputs: Sequence[Checkpoint], changes: Changes) -> int:
    """Upper bound of the anonymous memory: each thread's blocks, tensors that must be gathered."""
    mixed = any(c.action == "mix" for c in changes.tensors)
    # One view of each file at a time: a mix reads them together.
    gathered = sum(max((t.gathered for t in ck.info.values()), default=0) for ck in inputs)
    return memory_of_blocks(len(inputs) - 1 if mixed else 0, gathered + changes.worker_bytes)


def memory_of_blocks(mixed: int = 0, beside: int = 0) -> int:
    """Bytes of anonymous memory that a merge takes at most; the size of the models is not among what decides them.

    Args:
        mixed: models that are mixed with the base.
        beside: bytes that each thread holds besides, of an adapter or of tensors that must be gathered.
    """
    # Values, product and rounded copy of one block in float64: a dozen blocks, of which the allocator keeps old ones.
    # Blends of models of any size were seen to need 80 MB in all; each further model brings its own blocks and deltas.
    return WORKERS * ((48 + 32 * mixed) * BLOCK + beside)
