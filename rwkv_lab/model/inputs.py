"""Tokens that fit a model, or an error that names the value that does not."""

from typing import Any

import torch

from rwkv_lab.errors import ParameterError
from rwkv_lab.model.protocol import Model
from rwkv_lab.wkv.pointers import missing_memory

_FEW = 16  # tokens whose range Python finds faster than torch does


def check_tokens(model: Model, tokens: Any) -> torch.Tensor:
    """Tokens, whatever they were given as, as an integer tensor `[B,T]` on the model's device.

    Raises:
        ParameterError: another shape or dtype, none at all, one outside the vocabulary, or memory that was freed.
    """
    device = model.get_device()
    if type(tokens) is torch.Tensor and tokens.device == device:
        ids = tokens
    else:
        try:
            ids = torch.as_tensor(tokens, device=device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as e:
            raise ParameterError(f"tokens must be integers of shape [B,T]; pad rows of unequal length ({e}).") from e
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype not in (torch.int64, torch.int32):
        raise ParameterError(
            f"tokens must be integers of shape [B,T] with B, T >= 1; given {ids.dtype} {list(ids.shape)}."
        )
    if torch.compiler.is_compiling():
        return ids  # values are not known while torch.compile or torch.export traces
    if missing := missing_memory(ids):
        raise ParameterError(f"The tensor of tokens {missing}.")
    if ids.numel() <= _FEW and type(ids) is torch.Tensor:
        numbers = [x for row in ids.tolist() for x in row]
        low, high = min(numbers), max(numbers)
    else:
        low, high = (int(x) for x in torch.aminmax(ids))
    last = model.layout.vocab_size - 1
    if low < 0 or high > last:
        raise ParameterError(f"Token {low if low < 0 else high} is outside the vocabulary: 0 to {last}.")
    return ids
