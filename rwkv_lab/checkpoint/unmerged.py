"""A model and its adapter in one file, side by side and not merged: what `state_dict()` of a peft model gives, and what
RWKV-PEFT's trainers save whole.

peft names the frozen matrix of an adapted layer `X.base_layer.weight`, the adapter's parts `X.lora_A.default.weight`,
by the adapter's name, of which there may be several; a layer that is trained whole is `X.original_module.weight` and
`X.modules_to_save.default.weight`. RWKV-PEFT has `X.weight` and `X.lora_A`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rwkv_lab.errors import ParameterError
from rwkv_lab.text import counted

_PARTS = "lora_A|lora_B|lora_magnitude_vector|lora_embedding_A|lora_embedding_B|miss_block|bone_block"
# peft: X.<part>.<adapter>, with .weight where the part is a module.
_OF_PEFT = re.compile(rf"(?P<layer>.+)\.(?P<part>{_PARTS})\.(?P<adapter>[^.]+)(?P<end>\.weight)?")
_OF_TRAINERS = re.compile(r".+\.((init_)?lora_[AB]|disha|bone|miss_block|alpha)(\.weight)?")
_WHOLE = re.compile(r"(?P<layer>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<end>weight|bias)")
_FROZEN = re.compile(r"(?P<layer>.+)\.(?:base_layer|original_module)\.(?P<end>weight|bias)")


@dataclass(frozen=True)
class Unmerged:
    """Both parts of such a file."""

    frozen: dict[str, str]  # names in a model -> those in the file
    adapters: dict[str, dict[str, str]]  # by the adapter's name, "" where it has none: names in its own file -> here

    def adapter(self, name: str | None, where: str) -> dict[str, str]:
        """The parts of one adapter; None for the only one.

        Raises:
            ParameterError: several, and none was named, or there is none of that name.
        """
        there = ", ".join(map(repr, self.adapters))
        if name is None and len(self.adapters) > 1:
            first = next(iter(self.adapters))
            raise ParameterError(
                f"{where} holds {counted(len(self.adapters), 'adapter')} ({there}), and not which is meant.\n"
                f"Pass parameters={{'adapter': {first!r}}}; for several, the file once for each and a list of names."
            )
        name = next(iter(self.adapters)) if name is None else name
        if name not in self.adapters:
            raise ParameterError(f"{where} holds no adapter {name!r}; there are: {there}.")
        return self.adapters[name]


def split_unmerged(names: Iterable[str]) -> Unmerged | None:
    """What names of a file stand for; None unless every adapted layer has its frozen weight there too, once."""
    frozen: dict[str, str] = {}
    adapters: dict[str, dict[str, str]] = {}
    for name in names:
        if _OF_TRAINERS.fullmatch(name):
            adapters.setdefault("", {})[name] = name
        elif found := _OF_PEFT.fullmatch(name):
            adapters.setdefault(found["adapter"], {})[f"{found['layer']}.{found['part']}{found['end'] or ''}"] = name
        elif found := _WHOLE.fullmatch(name):
            adapters.setdefault(found["adapter"], {})[f"{found['layer']}.{found['end']}"] = name
        else:
            found = _FROZEN.fullmatch(name)
            bare = f"{found['layer']}.{found['end']}" if found else name
            if bare in frozen:
                return None
            frozen[bare] = name
    layers = {_layer(part) for parts in adapters.values() for part in parts}
    return Unmerged(frozen, adapters) if layers and all(f"{x}.weight" in frozen for x in layers) else None


def _layer(part: str) -> str:
    """The layer that a part of an adapter, or a whole tensor in it, belongs to."""
    return re.sub(rf"\.({_PARTS}|init_lora_[AB]|disha|bone|alpha|weight|bias)(\.weight)?$", "", part)
