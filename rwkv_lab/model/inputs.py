"""Tokens that fit a model, or an error that names the value that does not."""

from typing import Any

import numpy as np
import torch

from rwkv_lab.errors import ParameterError
from rwkv_lab.model.protocol import Model
from rwkv_lab.torch_private import transformed
from rwkv_lab.wkv.pointers import is_dense, layout_of, missing_memory

_FEW = 16  # tokens whose range Python finds faster than torch does
_READ = (torch.int64, torch.int32)  # by embeddings; other integers are widened
_SMALLER = (torch.int16, torch.uint16, torch.uint8, torch.int8, torch.uint32, torch.uint64)


def check_tokens(model: Model, tokens: Any) -> torch.Tensor:
    """Tokens, whatever they were given as, as an integer tensor `[B,T]` on the model's device.

    Of tokens on the meta device, in a model that is there too, and of those that torch.compile, torch.export or
    torch.vmap put in their place, the values are not known and not looked at.

    Raises:
        ParameterError: another shape or dtype, none at all, one outside the vocabulary, or memory that was freed.
    """
    device = model.get_device()
    ids = tokens if type(tokens) is torch.Tensor and tokens.device == device else _on_device(tokens, device)
    if not is_dense(ids):
        raise ParameterError(f"tokens are a {layout_of(ids)} tensor; they must be a dense one of integers [B,T].")
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype not in _READ and ids.dtype not in _SMALLER:
        raise ParameterError(
            f"tokens must be integers of shape [B,T] with B, T >= 1; given {ids.dtype} {list(ids.shape)}."
        )
    if torch.compiler.is_compiling() or ids.is_meta:
        return ids
    if missing := missing_memory(ids):
        raise ParameterError(f"The tensor of tokens {missing}.")
    if ids.dtype not in _READ or ids.is_neg():
        ids = ids.long().resolve_neg()
    try:
        low, high = _range(ids)
    except RuntimeError:
        if not transformed():
            raise
        return ids
    last = model.layout.vocab_size - 1
    if low < 0 or high > last:
        raise ParameterError(f"Token {low if low < 0 else high} is outside the vocabulary: 0 to {last}.")
    return ids


def _on_device(tokens: Any, device: torch.device) -> torch.Tensor:
    if isinstance(tokens, torch.Tensor):
        if tokens.is_meta and device.type != "meta":
            raise ParameterError(f"tokens are on the meta device and have no values; the model is on {device}.")
        return tokens.to(device) if is_dense(tokens) else tokens
    if isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu":  # of any byte order, reversed or read-only
        tokens = np.array(tokens, tokens.dtype.newbyteorder("="), order="C")
    try:
        return torch.as_tensor(tokens, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise ParameterError(f"tokens must be integers of shape [B,T]; pad rows of unequal length ({e}).") from e


def _range(ids: torch.Tensor) -> tuple[int, int]:
    """The smallest and the largest."""
    if ids.numel() <= _FEW and type(ids) is torch.Tensor:
        numbers = [x for row in ids.tolist() for x in row]
        return min(numbers), max(numbers)
    low, high = torch.aminmax(ids)
    return int(low), int(high)
