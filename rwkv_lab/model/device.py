"""A failing device: its error in words, and the same call again on another device."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from rwkv_lab.arguments import shown_value
from rwkv_lab.errors import DeviceError, ParameterError
from rwkv_lab.lazy_torch import torch

F = TypeVar("F", bound=Callable)

# Torch raises RuntimeError, or AssertionError where it was built without CUDA, for much else too: the text decides.
_FAILURE = re.compile(r"\b(CUDA|CUBLAS|CUDNN|cuDNN|cuBLAS|HIP|NVIDIA|XPU|MPS|device-side assert)")
_POSSIBLE = (RuntimeError, AssertionError, MemoryError)
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


def parse_device(device: str | torch.device | int) -> torch.device:
    """A torch.device from its name.

    Raises:
        ParameterError: no such name.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as e:
        raise ParameterError(
            f'There is no device {shown_value(device)}; there are "cpu", "cuda", "cuda:1" and the like.'
        ) from e


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Turn a failure of the device into a DeviceError that names settings which help; others pass."""
    try:
        yield
    except _POSSIBLE as e:
        if error := _device_error(e, device):
            raise error from e
        raise


def _device_error(e: BaseException, device: torch.device) -> DeviceError | None:
    """A failure of the device in words; None for another error."""
    text = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
    if isinstance(e, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(text):
        return DeviceError(
            f"{device} ran out of memory ({text}).\nTry dtype=torch.bfloat16, fewer sequences or a smaller "
            'ctx_len at once, model.gradient_checkpointing = True in training,\nor device="cpu" / fallback="cpu".'
        )
    if _FAILURE.search(text):
        return DeviceError(
            f"{device} failed: {text}\n"
            'Load the model with device="cpu", or with fallback="cpu" to continue there when this happens;\n'
            "CUDA_LAUNCH_BLOCKING=1 in the environment shows which operation it was."
        )
    return None


def falls_back(method: F) -> F:
    """Wrap a method `(self, tokens, state=None, …)` of a model: when its device fails, run it again on `fallback`."""

    @functools.wraps(method)
    def run(self: Any, tokens: Any, state: Any = None, *args: Any, **kwargs: Any) -> Any:
        try:  # not `with device_errors`: this runs for every token
            return method(self, tokens, state, *args, **kwargs)
        except (*_POSSIBLE, DeviceError) as e:
            error = e if isinstance(e, DeviceError) else _device_error(e, self.get_device())
            can_fall_back = self.fallback not in (None, self.get_device())
            if error is None or error is e and not can_fall_back:
                raise
            if not can_fall_back:
                raise error from e
            warn_of_fallback(error, self.fallback)
            with device_errors(self.get_device()):  # a device that is lost altogether does not give its weights back
                self.to(self.fallback)
                state = None if state is None else state.to(self.fallback)
            return method(self, tokens, state, *args, **kwargs)

    return cast(F, run)


def warn_of_fallback(error: DeviceError, fallback: torch.device) -> None:
    """Warn that a device failed, and which one is used from now on."""
    first = str(error).splitlines()[0]
    warnings.warn(f"{first} Going on with device={str(fallback)!r}.", RuntimeWarning, stacklevel=3)
