"""What a merge refuses of its inputs, from their headers."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

from rwkv_lab.checkpoint import Checkpoint, Layout, TensorInfo, expected_tensors
from rwkv_lab.checkpoint.layout import possible_versions, same_shape
from rwkv_lab.checkpoint.packed import refuse_packed
from rwkv_lab.dtypes import FLOAT_NAMES
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.names import split_block
from rwkv_lab.patterns import matches_any
from rwkv_lab.text import counted

log = logging.getLogger(__name__)


def check_base(base: Checkpoint, allow_extra: Sequence[str]) -> Layout:
    """The base must be a whole model, without a name that its generation does not know."""
    _refuse_other_dtypes(base)
    identity, misfit = base.identity, base.identity.misfit
    if identity.layout is None or misfit is None:
        hints = {
            "state": "\nGive the model as base, the state as tuned.",
            "partial": "\nIf it is one shard of several, pass the folder with all of them.",
        }
        raise LayoutError(
            f"the base {base.path} is not a whole RWKV model (kind {base.kind!r}): {base.reason}"
            f"{hints.get(base.kind, '')}"
        )
    if misfit.missing:
        more = f" and {len(misfit.missing) - 10} more" if len(misfit.missing) > 10 else ""
        raise LayoutError(
            f"the base {base.path} ({identity.layout}) lacks {counted(len(misfit.missing), 'tensor')}: "
            f"{', '.join(misfit.missing[:10])}{more}.\nIf it is one shard of several, pass the folder with all of them."
        )
    if misfit.wrong:
        name, found, expected = misfit.wrong[0]
        raise LayoutError(f"{name} in {base.path} has shape {list(found)}; its model needs {list(expected)}")
    extra = [n for n in misfit.extra if not matches_any(n, allow_extra)]
    if extra:
        raise LayoutError(
            f"the base {base.path} has {counted(len(extra), 'tensor')} that RWKV-{identity.layout.version} "
            "does not know: "
            f"{', '.join(extra[:10])}.\nIf they belong there, name them in allow_extra."
        )
    return identity.layout


def layout_of_states(base: Checkpoint, tuned: Sequence[Checkpoint]) -> Layout | None:
    """What state files show of the model that they belong to, where base and tuned are such files; else None.

    Raises:
        LayoutError: states of different layers or shapes.
    """
    if base.kind != "state" or not tuned or any(ck.kind != "state" for ck in tuned):
        return None
    shapes = {name: info.shape for name, info in base.info.items()}
    for ck in tuned:
        if _highest(base) != _highest(ck):
            raise LayoutError(
                f"{base.path} has states up to layer {_highest(base)}, {ck.path} up to layer {_highest(ck)}; they are "
                "states of other models.\nStates for some layers are mixed into a model: give that as base."
            )
        for name, info in ck.info.items():
            if shapes.setdefault(name, info.shape) != info.shape:
                raise LayoutError(
                    f"{name} is {list(info.shape)} in {ck.path}, {list(shapes[name])} in another of the files; they "
                    "are states of other models."
                )
    head_sizes = sorted({(shape[0], shape[-1]) for shape in shapes.values() if len(shape) == 3})
    if len(head_sizes) != 1:
        raise LayoutError(f"{base.path} holds states that are not all of one shape [heads, size, size].")
    (heads, size) = head_sizes[0]
    layers = 1 + _highest(base)
    return Layout("5.0 to 7.0", layers, heads * size, heads * size, 0, 0, heads, size)


def _highest(ck: Checkpoint) -> int:
    """The highest layer that a state file has a state for."""
    return max((inside[0] for name in ck.info if (inside := split_block(name))), default=-1)


def refuse_unusable(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse what no method can take: packed weights, empty ones, an optimiser's state.

    Raises:
        LayoutError: what it is, and what to do.
    """
    for ck in checkpoints:
        if ck.kind == "unusable" or not ck.info:
            raise LayoutError(f"{ck.path}: {ck.reason}.")
        refuse_packed(ck.path, ck.info.values(), "A merge")


def refuse_same_file(base: Checkpoint, tuned: Sequence[Checkpoint]) -> None:
    """Refuse one file given twice, under whatever names.

    Raises:
        ParameterError: says which.
    """
    called = ["base", *("tuned" if len(tuned) == 1 else f"tuned {i + 1}" for i in range(len(tuned)))]
    cks = [base, *tuned]
    for j, later in enumerate(cks):
        for i in range(j):
            if cks[i].part != later.part:
                continue  # of a file that holds a model and adapters, different parts
            if any(os.path.samestat(os.fstat(a.fd), os.fstat(b.fd)) for a in cks[i].files for b in later.files):
                hint = "; the output would be the base" if len(cks) == 2 else "; each model counts once"
                raise ParameterError(f"{called[i]} and {called[j]} are the same file {later.path}{hint}")


def check_dtypes(ck: Checkpoint) -> None:
    """Refuse tensors that are no floats of 16 bits or more.

    Raises:
        LayoutError: names the first.
    """
    _refuse_other_dtypes(ck)
    doubles = sum(t.dtype_name == "float64" for t in ck.info.values())
    if doubles:
        log.warning("%s holds %d float64 tensors; RWKV models have none", ck.path, doubles)


def _refuse_other_dtypes(ck: Checkpoint) -> None:
    odd = [
        (name, t.dtype_name)
        for name, t in ck.info.items()
        if t.dtype_name not in FLOAT_NAMES
        and not (name.endswith(".alpha") and t.numel == 1)  # which may be a whole number
    ]
    if odd:
        name, dtype = odd[0]
        packed = not dtype.startswith("complex") and ".lora_" not in name
        advice = f".\n{len(odd)} of its {counted(len(ck), 'tensor looks', 'tensors look')} packed in few bits: "
        advice += "give the original in 16 or 32 bits"
        raise LayoutError(
            f"{name} in {ck.path} is torch.{dtype}; weights must be bfloat16, float16, float32 or float64"
            f"{advice * packed}."
        )


def refuse_other_dimensions(tuned: Checkpoint, layout: Layout) -> None:
    """Refuse a whole model of other dimensions, and names of another generation; say both numbers.

    Raises:
        LayoutError: with the evidence.
    """
    other = tuned.layout
    if other is None:
        versions, evidence = possible_versions(list(tuned.info))
        if layout.version not in versions:
            has = "RWKV-" + " or ".join(sorted(versions)) if versions else "mixed generations"
            raise LayoutError(
                f"{tuned.path} is of {has} ({', '.join(evidence[:3])}), the base is RWKV-{layout.version} "
                f"({layout.evidence[0]})"
            )
        return
    if other.version != layout.version:
        raise LayoutError(
            f"{tuned.path} is RWKV-{other.version} ({other.evidence[0]}), the base is RWKV-{layout.version} "
            f"({layout.evidence[0]})"
        )
    for field in ("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "n_head", "head_size"):
        ours, theirs = getattr(layout, field), getattr(other, field)
        if field == "n_layer" and theirs < ours and not {"emb.weight", "head.weight"} <= set(tuned):
            continue  # the lower layers of a model
        if ours != theirs:
            raise LayoutError(
                f"{field} differs: {tuned.path} has {theirs}, the base has {ours}; they are different models"
            )


def check_full_tensors(
    base: Checkpoint, tuned: Checkpoint, layout: Layout, tensors: Mapping[str, TensorInfo], allow_extra: Sequence[str]
) -> None:
    """Refuse whole tensors that have no place in the base.

    Raises:
        LayoutError: names that the base does not have, or other shapes.
    """
    known = expected_tensors(layout)[1]  # optional ones, which the base may lack: time_state, layer 0's v0, v1, v2
    extra = [n for n in tensors if n not in base.info and n not in known]
    refuse_no_match(extra, tensors, base)
    refused = [n for n in extra if not matches_any(n, allow_extra)]
    if refused:
        raise LayoutError(
            f"{counted(len(refused), 'tensor')} of {tuned.path} {'is' if len(refused) == 1 else 'are'} not "
            f"in the base: {', '.join(refused[:10])}.\n"
            "If they belong there, name them in allow_extra."
        )
    for name, info in tensors.items():
        there = base.info.get(name)
        wanted = there.shape if there else known.get(name)
        if wanted is not None and not same_shape(info.shape, wanted):
            raise LayoutError(f"{name} has shape {list(info.shape)} in {tuned.path} and {list(wanted)} in the base")


def refuse_no_match(unmatched: list[str], all_names: Mapping[str, TensorInfo], base: Checkpoint) -> None:
    """Where no name at all matches, say so: the classic merge that does nothing.

    Raises:
        LayoutError: with a name of each.
    """
    if unmatched and len(unmatched) == len(all_names):
        raise LayoutError(
            f"0 of {counted(len(all_names), 'tensor')} matched the base; first {unmatched[0]}.\n"
            f"The base has {next(iter(base))}, …"
        )


def notes_on_names(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Which prefixes of wrappers were taken off the names; of an adapter folder they are what peft always writes. Also
    which tensors are quantised."""
    quantised = tuple(
        f"{ck.path.name}: {n} of its tensors are {kind}, dequantised to float32."
        for ck in checkpoints
        for kind, n in ck.quantised.items()
    )
    taken_off = (
        f"{ck.path.name}: the prefix {prefix} was taken off {count} of its {counted(len(ck.stored), 'name')}."
        for ck in checkpoints
        if ck.adapter_config is None
        for prefix, count in ck.prefixes.items()
    )
    return tuple(dict.fromkeys((*quantised, *taken_off)))  # of a model and its adapter in one file, once
