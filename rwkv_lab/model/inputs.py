"""What a model is called with: tokens and a state that fit it, or an error that names the value that does not."""

import torch

from rwkv_lab.errors import ParameterError
from rwkv_lab.model.state import RWKVState


def check_tokens(model, tokens) -> torch.Tensor:
    """Tokens as an integer tensor `[B,T]` on the model's device.

    Raises:
        ParameterError: another shape or dtype, none at all, or one outside the vocabulary.
    """
    try:
        tokens = torch.as_tensor(tokens, device=model.get_device())
    except (TypeError, ValueError) as e:
        raise ParameterError(f"tokens must be integers of shape [B,T]; pad rows of unequal length ({e}).") from e
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype not in (torch.int64, torch.int32):
        raise ParameterError(
            f"tokens must be integers of shape [B,T] with B, T >= 1; given {tokens.dtype} {list(tokens.shape)}."
        )
    low, high = (int(x) for x in torch.aminmax(tokens))
    last = model.layout.vocab_size - 1
    if low < 0 or high > last:
        raise ParameterError(f"Token {low if low < 0 else high} is outside the vocabulary: 0 to {last}.")
    return tokens


def check_state(model, state: RWKVState, B: int) -> None:
    """Make sure that the state is one of B sequences of this model.

    Raises:
        ParameterError: another generation, batch, size, dtype or device.
    """
    layout, weight = model.layout, model.emb.weight
    if state.version not in ("", layout.version):
        raise ParameterError(f"The state is of RWKV-{state.version}, the model is RWKV-{layout.version}.")
    if len(state.wkv) != B:
        raise ParameterError(f"The state is of {len(state.wkv)} sequences, the tokens are of {B} sequences.")
    shift = (layout.n_layer, layout.n_embd)
    for name, shape, dtype in (
        ("wkv", model.wkv_shape, model.state_dtype),
        ("att_shift", shift, weight.dtype),
        ("ffn_shift", shift, weight.dtype),
    ):
        x = getattr(state, name)
        if tuple(x.shape) != (B, *shape) or x.dtype != dtype or x.device != weight.device:
            raise ParameterError(
                f"The state's {name} is {x.dtype} {list(x.shape)} on {x.device};\n"
                f"this model needs {dtype} {[B, *shape]} on {weight.device}: a state of another model, or one to move."
            )
