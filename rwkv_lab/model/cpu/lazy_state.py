"""The state that a compiled step leaves: its tensors are made on first access.

Most states are never looked at, but go straight into the next step, to which addresses are enough; a torch operator
takes 30 microseconds when a token's weights have just gone through the caches.
"""

import torch

from rwkv_lab.model.cpu.buffer_pool import Memory
from rwkv_lab.model.state import RWKVState


class LazyState(RWKVState):
    """An RWKVState whose tensors lie in `memory` until they are asked for; then it is one like any other."""

    __class__ = property(lambda self: RWKVState)  # for all who ask but `type`

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in ("wkv", "att_shift", "ffn_shift"):
            raise AttributeError(name)
        inside = self.__dict__
        memory = inside.get("memory")
        if memory is not None:  # else another thread has just made them
            wkv, att, ffn = memory.tensors()
            # Key-major is how the kernel has it: [B,L,H,K,V] in memory.
            inside.setdefault("wkv", wkv.transpose(-1, -2) if wkv.ndim == 5 else wkv)
            inside.setdefault("att_shift", att)
            inside.setdefault("ffn_shift", ffn)
            inside.pop("memory", None)
        return inside[name]


def lazy_state(memory: Memory, made_for: tuple) -> LazyState:
    """A state whose parts are those of `memory`: wkv `[B,L,H,K,V]` (RWKV-4: `[B,L,3,A]`), att_shift, ffn_shift.

    made_for: what decides whether it fits a call (see `memory_of`): layout, batch size, dtype, model.
    """
    state, layout = object.__new__(LazyState), made_for[0]
    state.__dict__.update(
        memory=memory,
        made_for=made_for,
        version=layout.version,
        vocab_size=layout.vocab_size,
        made_by=made_for[-1],
    )
    return state


def memory_of(state: RWKVState, made_for: tuple) -> Memory | None:
    """Where the state's parts lie, if it was made for that and its tensors, which might have been changed, were not
    asked for; else None."""
    if type(state) is not LazyState or state.__dict__["made_for"] != made_for:
        return None
    return state.__dict__.get("memory")


def is_lazy(state: RWKVState) -> bool:
    """Whether the tensors are still to be made."""
    return type(state) is LazyState and "memory" in state.__dict__
