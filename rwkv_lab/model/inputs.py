"""Tokens that fit a model, or an error that names the value that does not."""

import torch

from rwkv_lab.errors import ParameterError

_FEW = 16  # tokens whose range Python finds faster than torch does


def check_tokens(model, tokens) -> torch.Tensor:
    """Tokens as an integer tensor `[B,T]` on the model's device.

    Raises:
        ParameterError: another shape or dtype, none at all, or one outside the vocabulary.
    """
    device = model.get_device()
    if type(tokens) is not torch.Tensor or tokens.device != device:
        try:
            tokens = torch.as_tensor(tokens, device=device)
        except (TypeError, ValueError) as e:
            raise ParameterError(f"tokens must be integers of shape [B,T]; pad rows of unequal length ({e}).") from e
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype not in (torch.int64, torch.int32):
        raise ParameterError(
            f"tokens must be integers of shape [B,T] with B, T >= 1; given {tokens.dtype} {list(tokens.shape)}."
        )
    if torch.compiler.is_compiling():
        return tokens  # values are not known while torch.compile or torch.export traces
    if tokens.numel() <= _FEW and type(tokens) is torch.Tensor:
        numbers = [x for row in tokens.tolist() for x in row]
        low, high = min(numbers), max(numbers)
    else:
        low, high = (int(x) for x in torch.aminmax(tokens))
    last = model.layout.vocab_size - 1
    if low < 0 or high > last:
        raise ParameterError(f"Token {low if low < 0 else high} is outside the vocabulary: 0 to {last}.")
    return tokens
