"""Prefixes that other programs put before the names of a model's tensors: taken off here and nowhere else.

`module.` is DistributedDataParallel's, `_orig_mod.` torch.compile's, `_forward_module.` DeepSpeed's and Lightning's,
`base_model.model.` peft's, `model.` anybody's; they stand inside each other in any order. Some stand before a part of
the model only, in the middle of a name.
"""

from collections import Counter
from collections.abc import Iterable

from rwkv_lab.errors import LayoutError

_INSIDE = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # anywhere in a name
_BEFORE = ("module", "model", "base_model", *_INSIDE)
_HUGGING_FACE = ("layers", "embeddings", "embed_tokens")  # `model.layers.…` is a name of theirs, and no wrapped one


def bare_names(names: Iterable[str], where: str) -> dict[str, str]:
    """{name: the name without the prefixes of wrappers}, in the order given.

    Args:
        where: the file, for the message.
    Raises:
        LayoutError: two names that are the same without them.
    """
    names = list(names)
    theirs = any(f"model.{part}." in f"{name}." for part in _HUGGING_FACE for name in names)
    before = tuple(part for part in _BEFORE if not (theirs and part == "model"))
    bare, owner = {}, {}
    for name in names:
        short = _bare(name, before)
        if short in owner:
            raise LayoutError(
                f"{where}: {owner[short]} and {name} are the same tensor, {short}, once the prefixes of wrappers are "
                "taken off.\nIt holds two models; save one of them by itself."
            )
        owner[short] = name
        bare[name] = short
    return bare


def note_on_prefixes(removed: Iterable[str]) -> str:
    """What is odd about prefixes that were taken off, in words; "" where nothing is.

    Args:
        removed: as `removed_prefixes` has them.
    """
    twice = next((p for p in removed if p.split(".").count("base_model") > 1), None)
    if twice is None:
        return ""
    return f"The prefix of peft stands twice before its names, {twice}: saved from a model that peft had wrapped twice."


def removed_prefixes(bare: dict[str, str]) -> dict[str, int]:
    """{what was taken off: from how many names}, of what `bare_names` gave; the most frequent first."""
    counts = Counter(_removed(name, short) for name, short in bare.items() if name != short)
    return dict(counts.most_common())


def _bare(name: str, before: tuple[str, ...]) -> str:
    parts = name.split(".")
    if not all(parts):  # no name of a module: "model." is whole as it is
        return name
    while len(parts) > 1 and parts[0] in before:
        first = parts.pop(0)
        if first == "base_model" and parts[0] == "model" and len(parts) > 1:
            parts.pop(0)  # the two are one prefix, also before names that begin with `model.` themselves
    return ".".join([*(part for part in parts[:-1] if part not in _INSIDE), parts[-1]])


def _removed(name: str, short: str) -> str:
    if name.endswith(f".{short}"):
        return name.removesuffix(short)
    return "".join(f"{part}." for part in name.split(".") if part in _BEFORE)
