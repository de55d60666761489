"""Whether a model is as this package makes it, and nobody looks inside: then compiled code may take a module's place.

Adapters, hooks, watchers, exchanged `forward` methods and options of torch's layers that no RWKV has change what a
module computes, and compiled code would not know.
"""

import torch
from torch import nn
from torch.nn.modules import module as of_all_modules
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rwkv_lab.wkv.choice import takes_tangents

_OURS = {f"rwkv_lab.model.{x}" for x in ("dual", "block", "rwkv4", "rwkv5", "rwkv6", "rwkv7")}
_TORCHS = {nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.ModuleList}


def nobody_interferes() -> bool:
    """Whether torch would do no more here than compute values: no tracing, autocast, forward-mode derivatives, counting
    of operators, or hooks of all modules."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or takes_tangents()
        or _get_current_dispatch_mode() is not None
        or of_all_modules._global_forward_hooks
        or of_all_modules._global_forward_pre_hooks
    )


def exchanged(model: nn.Module) -> str | None:
    """A module in it that stands where RWKV has another, such as "head, a LoraLinear"; None if there is none."""
    for name, module in model.named_modules():
        if name and not _is_of_rwkv(module):
            return f"{name}, a {type(module).__name__}"
    return None


def is_plain(module: nn.Module) -> bool:
    """Whether this module, without those in it, computes what its class in this package or in torch says, unseen."""
    if not _is_of_rwkv(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks or getattr(module, "watchers", ()):
        return False
    return "forward" not in vars(module)


def _is_of_rwkv(module: nn.Module) -> bool:
    if type(module) not in _TORCHS and type(module).__module__ not in _OURS:
        return False
    if type(module) is nn.Linear:
        return module.bias is None
    if type(module) is nn.Embedding:
        return module.max_norm is None
    return True
