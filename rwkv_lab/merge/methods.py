"""Which methods there are, what each does in words, and what it takes."""

import inspect
import sys

from rwkv_lab.merge import adapter, overlay, stack, state
from rwkv_lab.merge.mixing import MIXING, signature_of

INTO_BASE = ("state", "overlay")  # one tuned file, whose kind says the method
ADAPTERS = ("lora", "pissa", "miss", "adapters")  # one or several, whose kind says the method
METHODS = (*INTO_BASE, *ADAPTERS, *MIXING, "passthrough")

_HOME = {"state": state, "overlay": overlay, "passthrough": stack} | dict.fromkeys(ADAPTERS, adapter)


def in_words(method: str) -> str:
    """What a method does: the first sentence of its file."""
    home = _HOME.get(method) or sys.modules[MIXING[method].__module__]
    return " ".join(home.__doc__.split("\n\n")[0].split(": ", 1)[1].split()).rstrip(".")


def help_on(method: str) -> list[tuple[str, str, str]]:
    """(parameter, default, help) of a method that mixes models, from its signature."""
    return [
        (p.name, "needed" if p.default is inspect.Parameter.empty else str(p.default), p.takes.help)
        for p in signature_of(MIXING[method]).parameters.values()
    ]
