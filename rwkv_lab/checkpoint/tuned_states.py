"""Tuned initial states, as files of kind "state" hold them, and whole models that carry them."""

from rwkv_lab.checkpoint.open import Checkpoint
from rwkv_lab.errors import LayoutError


def state_names(ck: Checkpoint) -> list[str]:
    """The names of the tuned initial states in a file, from its header.

    Raises:
        LayoutError: there are none; says what the file is.
    """
    names = [name for name in ck.info if name.endswith("att.time_state")]
    if not names:
        raise LayoutError(
            f"{ck.path} holds no tuned state: it is of kind {ck.kind!r}, and none of its tensors is a time_state.\n"
            "Give a file of kind 'state', or a whole model that carries its state."
        )
    return names
