"""Files that hold a part of a model: one shard of several is refused, any other part is counted."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from rwkv_lab.checkpoint import Checkpoint, Layout, expected_tensors
from rwkv_lab.errors import LayoutError
from rwkv_lab.names import split_block
from rwkv_lab.text import counted

# model-00001-of-00003.safetensors, model_part_1_of_3.pth
_OF = re.compile(r"(?:\d{3,}|(?:part|shard|split|chunk)[-_. ]?\d+)[-_. ]?of[-_. ]?(\d+)", re.IGNORECASE)
_LEAST = 8  # tensors in one piece of a model's file that may be a shard of it
_MAX_INDEX = 100_000_000  # bytes


def refuse_shard(role: str, ck: Checkpoint) -> None:
    """Refuse one file of a model that is split over several, by its name or the index beside it.

    Args:
        role: "base" or "tuned", for the message.
    Raises:
        LayoutError: names the file and what to pass instead.
    """
    if ck.path.is_dir() or ck.kind == "model":
        return
    path, numbers = ck.path, _OF.search(ck.path.stem)
    index = _index_of(path)
    if index is not None:
        raise LayoutError(
            f"{role}: {path} is one of the shards that {index.name} beside it lists; it holds {len(ck)} tensors of the "
            f"model.\nPass the folder: {path.parent}"
        )
    if numbers and int(numbers[1]) > 1:
        raise LayoutError(
            f"{role}: {path} is one shard of {int(numbers[1])} by its name; it holds {len(ck)} tensors of the model.\n"
            f"Pass the folder with all shards and their index (model.safetensors.index.json): {path.parent}"
        )


def refuse_cut_model(ck: Checkpoint, layout: Layout) -> None:
    """Refuse a tuned file that holds whole layers of a model and ends, or begins, in the middle of it.

    Args:
        layout: of the whole model.
    Raises:
        LayoutError: says what it holds.
    """
    if ck.kind != "partial":
        return
    has = {name.removeprefix(ck.identity.prefix) for name in ck}
    needed: dict[int, list[str]] = {}
    for name in expected_tensors(layout)[0]:
        inside = split_block(name)
        if inside and ".ln0." not in name:
            needed.setdefault(inside[0], []).append(name)
    there = {i: sum(name in has for name in names) / len(names) for i, names in needed.items()}
    whole, cut = [i for i, share in there.items() if share == 1], [i for i, share in there.items() if 0 < share < 1]
    lowest, highest = not whole or min(whole) == 0, not whole or max(whole) == layout.n_layer - 1
    top, bottom = "head.weight" in has, "emb.weight" in has
    cut_in_a_layer = bool(cut) and len(cut) <= 2 and all({i - 1, i + 1} & set(whole) for i in cut)
    ends = bottom and not top and not highest  # from the embedding up to some layer
    begins = top and not bottom and not lowest  # from some layer up to the head
    if whole and (cut_in_a_layer or ends or begins) or _is_one_piece(ck, layout):
        raise LayoutError(
            f"tuned: {ck.path} holds {describe_part(ck, layout)}, which is how one shard of a model looks.\n"
            "Pass the folder with all of them and their index; if this is all that was tuned, say so: include=['*']."
        )


def _is_one_piece(ck: Checkpoint, layout: Layout) -> bool:
    """Whether a file holds tensors that follow each other in a whole model, over the border of a layer and not to the
    end of one."""
    model = list(expected_tensors(layout)[0])
    for order in (model, sorted(model)):
        places = [i for i, name in enumerate(order) if name in ck]
        if len(places) < max(_LEAST, len(ck)) or places[-1] - places[0] != len(places) - 1:
            continue
        owners = [_owner(name) for name in order]
        first, last = places[0], places[-1]
        cut_before = first > 0 and owners[first - 1] == owners[first]
        cut_behind = last + 1 < len(order) and owners[last + 1] == owners[last]
        if owners[first] != owners[last] and (cut_before or cut_behind):
            return True
    return False


def _owner(name: str) -> object:
    """The layer of a tensor, or its own name."""
    inside = split_block(name)
    return inside[0] if inside else name


def note_on_part(base: Checkpoint, tuned: Checkpoint, layout: Layout) -> str:
    """That a fine-tune covers a part of the base, in a sentence with numbers; "" where it covers all of it."""
    here = [name for name in base if name in tuned]
    if len(here) == len(base):
        return ""
    return (
        f"{tuned.path.name} covers {len(here)} of {len(base)} tensors of the base ({_parts(here, layout)}); the others "
        "stay the base's."
    )


def describe_part(ck: Checkpoint, layout: Layout) -> str:
    """What of a model a file holds."""
    names = [name.removeprefix(ck.identity.prefix) for name in ck]
    return f"{counted(len(ck), 'tensor')} ({_parts(names, layout)})"


def _parts(names: Sequence[str], layout: Layout) -> str:
    """Layers as runs, and what lies outside of them."""
    layers = sorted({inside[0] for name in names if (inside := split_block(name))})
    runs: list[list[int]] = []
    for i in layers:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    text = ", ".join(f"{a} to {b}" if a != b else f"{a}" for a, b in runs[:4]) + (", …" if len(runs) > 4 else "")
    outside = [name for name in names if not split_block(name)]
    shown = [f"blocks {text} of {layout.n_layer}"] if layers else []
    shown += outside[:3] + ([f"{len(outside) - 3} more"] if len(outside) > 3 else [])
    return ", ".join(shown) or "none"


def _index_of(path: Path) -> Path | None:
    """The index beside a file that lists it among others; None where there is none that can be read."""
    for index in sorted(path.parent.glob("*.index.json")):
        try:
            if index.stat().st_size > _MAX_INDEX:
                continue
            files = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if path.name in files and len(files) > 1:
            return index
    return None
