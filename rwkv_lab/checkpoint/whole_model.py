"""Whole models, as everything that computes with one needs them."""

from rwkv_lab.checkpoint.layout import Layout
from rwkv_lab.checkpoint.open import Checkpoint
from rwkv_lab.errors import LayoutError


def whole_model(ck: Checkpoint) -> Layout:
    """The layout of a whole model.

    Raises:
        LayoutError: it is none; says what it is.
    """
    if ck.kind == "unmerged":
        raise LayoutError(
            f"{ck.path} holds {ck.reason}.\nMerge it first: rwkv_lab.merge(base, tuned, out) with this file as both."
        )
    if ck.kind == "unusable":
        raise LayoutError(f"{ck.path}: {ck.reason}.")
    if ck.kind != "model" or ck.layout is None:
        raise LayoutError(f"{ck.path} is no whole model ({ck.kind}): {ck.reason}.")
    return ck.layout
