"""Method "overlay": the tensors of a full or partial fine-tune take the place of the base's."""

import torch

from rwkv_lab.checkpoint import Checkpoint, Layout, TensorInfo, expected_tensors
from rwkv_lab.checkpoint.layout import common_prefix, possible_versions, same_shape
from rwkv_lab.errors import LayoutError
from rwkv_lab.merge.change import Change, overwrite
from rwkv_lab.patterns import matches_any


def changes(
    base: Checkpoint,
    tuned: Checkpoint,
    layout: Layout,
    alpha: float,
    precision: torch.dtype,
    allow_extra: list[str],
) -> list[Change]:
    """One change per tensor of `tuned`.

    Args:
        alpha: 0 to 1, how far to go from the base to `tuned`; 1 copies bit for bit.
        allow_extra: patterns of names that may be in `tuned` and not in the base.
    Raises:
        LayoutError: another generation or other dimensions, no name in common, or names that the base does not have.
    """
    same_dimensions(tuned, layout)
    return full_tensors(base, tuned, layout, dict(tuned.info), alpha, precision, allow_extra)


def same_dimensions(tuned: Checkpoint, layout: Layout) -> None:
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
        if ours != theirs:
            raise LayoutError(
                f"{field} differs: {tuned.path} has {theirs}, the base has {ours}; they are different models"
            )


def full_tensors(
    base: Checkpoint,
    tuned: Checkpoint,
    layout: Layout,
    tensors: dict[str, TensorInfo],
    alpha: float,
    precision: torch.dtype,
    allow_extra: list[str],
) -> list[Change]:
    """Changes for whole tensors that overwrite the base's, after checking that each has its place there."""
    check_full_tensors(base, tuned, layout, tensors, allow_extra)
    return [overwrite(name, base.info.get(name), info, alpha, precision) for name, info in tensors.items()]


def check_full_tensors(
    base: Checkpoint, tuned: Checkpoint, layout: Layout, tensors: dict[str, TensorInfo], allow_extra: list[str]
) -> None:
    """Refuse whole tensors that have no place in the base.

    Raises:
        LayoutError: names that the base does not have, or other shapes.
    """
    known = expected_tensors(layout)[1]  # optional ones, which the base may lack: time_state, layer 0's v0, v1, v2
    extra = [n for n in tensors if n not in base.info and n not in known]
    refuse_prefix(extra, tensors, base)
    refused = [n for n in extra if not matches_any(n, allow_extra)]
    if refused:
        raise LayoutError(
            f"{len(refused)} tensors of {tuned.path} are not in the base: {', '.join(refused[:10])}.\n"
            "If they belong there, name them in allow_extra."
        )
    for name, info in tensors.items():
        there = base.info.get(name)
        wanted = there.shape if there else known.get(name)
        if wanted is not None and not same_shape(info.shape, wanted):
            raise LayoutError(f"{name} has shape {list(info.shape)} in {tuned.path} and {list(wanted)} in the base")


def refuse_prefix(unmatched: list[str], all_names: dict[str, TensorInfo], base: Checkpoint) -> None:
    """Where no name matches and all carry a wrapper's prefix, say so: the classic merge that does nothing."""
    if not unmatched or len(unmatched) < len(all_names):
        return
    prefix = common_prefix(unmatched)
    if not prefix and all(n.startswith("base_model.model.") for n in unmatched):
        prefix = "base_model.model."
    hint = (
        f"Their names begin with {prefix!r}; save them without it." if prefix else f"The base has {next(iter(base))}, …"
    )
    raise LayoutError(f"0 of {len(all_names)} tensors matched the base; first {unmatched[0]}.\n{hint}")
