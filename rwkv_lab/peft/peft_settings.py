"""Which layers a configuration of Hugging Face's peft says are adapted, against those that have tensors.

peft makes the layers that the configuration names and drops tensors of others; here the tensors count. Where the two
differ a reader should know: the adapter does something else there.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rwkv_lab.checkpoint.prefixes import bare_names
from rwkv_lab.names import split_block
from rwkv_lab.patterns import is_quick

_WORDS = ("all-linear",)  # that stand for many layers


def contradictions(
    config: Mapping[str, Any], layers: Sequence[str], whole: Sequence[str], names_in_file: Mapping[str, str]
) -> Iterator[str]:
    """What `adapter_config.json` states otherwise than the tensors have it, a sentence each.

    Args:
        layers: that have parts of the adapter.
        whole: tensors that take the place of the base's.
        names_in_file: of tensors whose names there are those of a foreign format.
    """
    for name in ("target_modules", "exclude_modules"):
        if isinstance(named := config.get(name), str) and not is_quick(named):
            yield f"{name} is a regular expression that may take too long: it was not compared with the tensors."
            config = {**config, name: None}
    theirs = _layers_in_file(layers, names_in_file)
    left_out = [x for x in layers if not _is_target(config, x, theirs.get(x, x))]
    if left_out:
        yield (
            f"adapter_config.json does not name {len(left_out)} of the {len(layers)} layers that have tensors, first "
            f"{left_out[0]}: peft leaves them out, here they are adapted."
        )
    idle = [n for n in listed(config.get("target_modules")) if not any(_ends(x, n) for x in layers)]
    if idle:
        yield f"target_modules names {', '.join(idle[:3])}, and the adapter has no tensors for such a layer."
    modules, saved = {name: names_in_file.get(name, name) for name in whole}, listed(config.get("modules_to_save"))
    missing = [m for m in saved if not any(_ends(name.rpartition(".")[0], m) for name in modules.values())]
    if missing:
        yield f"modules_to_save names {', '.join(missing[:3])}, and the adapter has no tensor of that."
    unsaved = [name for name in whole if not any(_ends(modules[name].rpartition(".")[0], m) for m in saved)]
    if unsaved:
        yield (
            f"modules_to_save does not name {len(unsaved)} of the {len(whole)} tensors that are there whole, first "
            f"{unsaved[0]}: peft leaves them out, here they take the base's place."
        )


def _layers_in_file(layers: Sequence[str], names_in_file: Mapping[str, str]) -> dict[str, str]:
    """{our layer: what it is called in the file} of a foreign format."""
    found = {}
    for ours, theirs in names_in_file.items():
        layer = next((x for x in layers if ours.startswith(f"{x}.") and theirs.endswith(ours[len(x) :])), None)
        if layer is not None:
            found[layer] = theirs[: len(theirs) - len(ours) + len(layer)]
    return found


def _is_target(config: Mapping[str, Any], layer: str, in_file: str) -> bool:
    """Whether peft makes an adapter for a layer, which the lists of targets have under our name by now."""
    if _named(config.get("exclude_modules"), in_file):
        return False
    named = config.get("target_modules")
    if named is not None and named not in _WORDS and not _named(named, in_file if isinstance(named, str) else layer):
        return False
    only, block = config.get("layers_to_transform"), split_block(layer)
    numbers = [only] if isinstance(only, int) else only
    return not isinstance(numbers, list) or block is None or block[0] in numbers


def _named(named: Any, layer: str) -> bool:
    """Whether a list of names or their ends, or a regular expression, has a layer."""
    if not isinstance(named, str):
        return any(_ends(layer, name) for name in listed(named))
    try:
        return re.fullmatch(named, layer) is not None
    except re.error:
        return False


def listed(named: Any) -> tuple[str, ...]:
    """The names of a list, each once and without prefixes of wrappers; none of what is no list of names."""
    names = [n for n in named if isinstance(n, str)] if isinstance(named, list) else []
    return tuple(dict.fromkeys(bare_names([name], name)[name] for name in names))


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
