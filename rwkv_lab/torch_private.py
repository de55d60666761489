"""Private parts of torch that this project uses: all of them, in one place.

None of them is promised to be in the next release. Where one is missing, `missing()` names it, everything that needs it
is computed by PyTorch's modules or refused in words, and a test fails and names it too.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

F = TypeVar("F", bound=Callable)

# What is used -> what for. A module's dotted name, then attributes of it. All were seen to work in torch 2.13.0.
PARTS = {
    "torch.autograd.forward_ad:_current_level": "forward-mode derivatives are being taken",
    "torch.utils._python_dispatch:_get_current_dispatch_mode": "operators are intercepted, as by FlopCounterMode",
    "torch._C:_len_torch_function_stack": "torch functions are intercepted",
    "torch._C:_get_function_stack_at": "which modes intercept them",
    "torch.utils._device:DeviceContext": "the mode behind `with torch.device(...)`, which intercepts nothing else",
    "torch._C:_functorch.peek_interpreter_stack": "vmap, grad or jvp of torch.func is at work",
    "torch._C:_functorch.get_interpreter_stack": "which of them",
    "torch.nn.modules.module:_global_forward_hooks": "hooks of all modules",
    "torch.nn.modules.module:_global_forward_pre_hooks": "hooks of all modules",
    "torch._utils:_rebuild_tensor_v2": "what a .pth refers to",
}
# Dictionaries that every nn.Module has.
MODULE_PARTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


@functools.cache
def missing() -> tuple[str, ...]:
    """The names in PARTS, and the attributes of modules, that this torch does not have."""
    module = nn.Module()
    lost = [name for name in PARTS if _part(name) is None]
    return (*lost, *(f"nn.Module.{name}" for name in MODULE_PARTS if not isinstance(vars(module).get(name), dict)))


@functools.cache
def _part(name: str) -> Any:
    """What a name in PARTS stands for; None where torch does not have it."""
    where, _, what = name.partition(":")
    try:
        return functools.reduce(getattr, what.split("."), importlib.import_module(where))
    except (ImportError, AttributeError):
        return None


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of this module alone: the very dictionary that torch keeps them in."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The buffers of this module alone, as `parameters_of`."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that stand directly in this one, as `parameters_of`."""
    return module._modules


def hooks_of(module: nn.Module) -> tuple[dict, dict]:
    """The hooks that run after `forward` and before it, as `parameters_of`."""
    return vars(module).get("_forward_hooks", {}), vars(module).get("_forward_pre_hooks", {})


def takes_tangents() -> bool:
    """Whether forward-mode derivatives (`torch.func.jvp`, `torch.autograd.forward_ad`) are being taken."""
    # A number that changes, so it is read from its module each time.
    return getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


def intercepted() -> bool:
    """Whether anything stands between torch's functions and their computation: modes of `__torch_dispatch__` and
    `__torch_function__`, transforms of torch.func. Devices as contexts (`with torch.device(...)`) do not count."""
    if missing():
        return True
    return (
        _dispatch_mode() is not None
        or _functorch_level() is not None
        or any(type(_mode(i)) is not _DeviceContext for i in range(_modes()))
    )


def transformed(but: str = "") -> bool:
    """Whether a transform of torch.func is at work, other than the one called `but`: "Vmap", "Grad", "Jvp"."""
    if torch.compiler.is_compiling() or _functorch_stack is None:
        return False
    return any(one.key().name != but for one in _functorch_stack() or ())


def kept_as_now(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """What tells of the same tensors, given one by one, whether each has the class, dtype, device, shape, strides,
    `requires_grad` and kind of view that it has now; of others it says False, and may where modes of torch differ.
    None where this torch has no such thing, or takes other arguments: then each is to be compared on its own."""
    try:
        sizes, strides = [[*x.shape] for x in tensors], [[*x.stride()] for x in tensors]
        return _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    except TypeError:
        return None


def constant_while_tracing(function: F) -> F:
    """Mark a function as `torch.compiler.assume_constant_result` does, without importing the compiler: that doubles the
    time that importing torch takes."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def hooks_of_all_modules() -> bool:
    """Whether a forward hook is registered that runs for every module there is."""
    return bool(_global_hooks or _global_pre_hooks)


_dispatch_mode = _part("torch.utils._python_dispatch:_get_current_dispatch_mode")
_functorch_level = _part("torch._C:_functorch.peek_interpreter_stack")
_functorch_stack = _part("torch._C:_functorch.get_interpreter_stack")
_modes, _mode = _part("torch._C:_len_torch_function_stack"), _part("torch._C:_get_function_stack_at")
_DeviceContext = _part("torch.utils._device:DeviceContext")
_global_hooks = _part("torch.nn.modules.module:_global_forward_hooks")
_global_pre_hooks = _part("torch.nn.modules.module:_global_forward_pre_hooks")
_TensorGuards = _part("torch._C:_dynamo.guards.TensorGuards")  # not in PARTS: nothing but time depends on it
rebuild_tensor = _part("torch._utils:_rebuild_tensor_v2")
