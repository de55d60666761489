"""What a set of tensors is: a model, a tuned state, an adapter, a part of a model."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rwkv_lab.checkpoint.layout import (
    CONVERTED,
    Layout,
    Shape,
    detect_layout,
    possible_versions,
    unsupported_variant,
)
from rwkv_lab.checkpoint.prefixes import bare_names, removed_prefixes
from rwkv_lab.checkpoint.tensors import Misfit, compare
from rwkv_lab.checkpoint.unmerged import split_unmerged
from rwkv_lab.checkpoint.unusable import nested_hint, unusable
from rwkv_lab.errors import LayoutError
from rwkv_lab.names import split_block
from rwkv_lab.text import counted

ADAPTER_NOTE = "rwkv_lab.adapter"  # what rwkv_lab writes into the metadata of an adapter: JSON with its "method"
# Adapters by a name that only they have. The order matters: PiSSA's init file also carries "lora".
_ADAPTER_MARKS = [
    ("pissa-init", r"\.init_lora_[AB]$"),
    ("lora", r"\.lora_([AB]|down|up)(\.[^.]+){0,2}$"),
    ("miss", r"\.(miss_block|disha|bone|bone_block)(\.default)?$"),
]


@dataclass(frozen=True)
class Identity:
    # "model", "unmerged", "partial", "state", "lora", "pissa", "pissa-init", "miss", …, "unsupported", "converted",
    # "unusable" or "unknown"
    kind: str
    layout: Layout | None  # for whole models, and partial ones that still show their dimensions
    reason: str  # why there is no layout, or what keeps it from being a whole model; "" for a whole model
    evidence: tuple[str, ...]  # names and shapes that decided
    prefix: str  # of wrappers, taken off the names; "" if none, several are joined by " and "
    misfit: Misfit | None  # how a "model" or "partial" differs from a whole model of its layout


def identify(
    shapes: Mapping[str, Shape],
    others: Mapping[str, object],
    adapter_config: dict | None,
    metadata: Mapping[str, str] | None = None,
) -> Identity:
    """What `{name: shape}` is.

    Args:
        others: entries of the file that are no tensors.
        adapter_config: of an adapter folder.
        metadata: of the file.
    """
    short = bare_names(shapes, "the file")
    prefix = " and ".join(removed_prefixes(short))
    bare = {short[n]: s for n, s in shapes.items()}

    def plain(kind: str, reason: str, *evidence: str) -> Identity:
        return Identity(kind, None, reason, evidence, prefix, None)

    found = unusable(bare, others)
    if found is not None:
        return plain("unusable", found.reason, found.evidence)
    if adapter_config is not None:
        peft_type = str(adapter_config.get("peft_type", "")).lower()
        kind = peft_type or "unknown"
        if kind == "lora" and str(adapter_config.get("init_lora_weights")).startswith("pissa"):
            kind = "pissa"
        return plain(kind, "an adapter, not a whole model", f"adapter_config.json: peft_type {peft_type}")
    if not shapes:
        return plain("unknown", f"there is no tensor at its top level{nested_hint(others)}")
    unmerged = _unmerged(bare, prefix)
    if unmerged is not None:
        return unmerged
    for kind, pattern in _ADAPTER_MARKS:
        name = next((n for n in shapes if re.search(pattern, n)), None)
        if name and kind == "pissa-init" and any(re.search(r"\.lora_[AB]$", n) for n in shapes):
            kind = "pissa"  # what it starts from and what became of it in one file, as rwkv_lab writes them
        if name:
            return plain(kind, "an adapter, not a whole model", f"{name} {list(shapes[name])}")
    method = _stated_method(metadata or {})
    if method:
        return plain(method, "an adapter, not a whole model", f"its note {ADAPTER_NOTE}: method {method}")
    states = [n for n in shapes if n.endswith(".time_state")]
    if len(states) == len(shapes):
        return plain("state", "a tuned state, not a whole model", f"{states[0]} {list(shapes[states[0]])}")
    variant = unsupported_variant([*bare, *map(str, others)])
    if variant:
        kind = "converted" if variant[0] == CONVERTED else "unsupported"
        return plain(kind, f"not supported: {variant[0]}", variant[1])
    try:
        layout = detect_layout(bare)
    except LayoutError as e:
        if any(split_block(n) or n in ("emb.weight", "head.weight") for n in bare):
            versions, marks = possible_versions(list(bare))
            could_be = "RWKV-" + " or ".join(sorted(versions)) if versions else "no single generation"
            return plain("partial", f"{e}; its names could be of {could_be}", *marks)
        return plain("unknown", str(e))
    misfit = compare(layout, bare)
    if misfit.missing or misfit.wrong:
        lacks = misfit.missing or tuple(n for n, _, _ in misfit.wrong)
        reason = f"{counted(len(lacks), 'tensor is', 'tensors are')} missing or of another shape, first {lacks[0]}"
        return Identity("partial", layout, reason, layout.evidence, prefix, misfit)
    return Identity("model", layout, "", layout.evidence, prefix, misfit)


def _unmerged(shapes: Mapping[str, Shape], prefix: str) -> Identity | None:
    """Of a whole model with an adapter beside its weights."""
    parts = split_unmerged(shapes)
    if parts is None:
        return None
    frozen = {name: shapes[here] for name, here in parts.frozen.items()}
    try:
        layout = detect_layout(frozen)
    except LayoutError:
        return None
    misfit = compare(layout, frozen)
    if misfit.missing or misfit.wrong:
        return None
    called = ", ".join(repr(name) for name in parts.adapters if name)
    several = f"adapters {called}" if len(parts.adapters) > 1 else f"an adapter{f' {called}' if called else ''}"
    evidence = next(here for names in parts.adapters.values() for here in names.values())
    reason = f"{several} beside the frozen weights, not merged into them"
    return Identity("unmerged", layout, reason, (*layout.evidence, evidence), prefix, misfit)


def _stated_method(metadata: Mapping[str, str]) -> str:
    """The method of an adapter that rwkv_lab wrote, "" of other files."""
    try:
        method = json.loads(metadata[ADAPTER_NOTE])["method"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return ""
    return method if isinstance(method, str) and method.isidentifier() else ""
