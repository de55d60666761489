"""The state before the first token: zeros, or tuned states (`blocks.i.att.time_state`) of the model or of a file."""

from pathlib import Path

import torch
from torch import nn

from rwkv_lab.errors import ParameterError
from rwkv_lab.model.loading import read_time_states
from rwkv_lab.model.protocol import Model
from rwkv_lab.model.registry import generation_of
from rwkv_lab.model.state import RWKVState, maker


def initial_state(model: Model, tuned: str | Path | None) -> RWKVState:
    """Of one sequence; `tuned` is a state file whose states are taken. Gradients reach the model's time_state.

    Raises:
        ParameterError: `tuned`, in a generation without time_state.
        LayoutError, NumericsError: see `read_time_states`.
    """
    layout, weight = model.layout, model.emb.weight
    if tuned is not None:
        wkv = torch.stack(_tuned_states(model, tuned)).to(weight.device, model.state_dtype)  # [L,H,V,K]
    elif model.has_time_state:
        wkv = torch.stack([block.att.time_state for block in model.blocks])
    else:
        wkv = generation_of(layout).first_wkv(layout, weight.device).to(model.state_dtype)
    shift = weight.new_zeros(1, layout.n_layer, layout.n_embd)
    return RWKVState(wkv[None], shift, shift, layout.version, layout.vocab_size, maker(model))


def add_time_state(model: Model) -> None:
    """Give every layer zeros `[H,V,K]` as its time_state, unless it has one.

    Raises:
        ParameterError: a generation without time_state.
    """
    if model.has_time_state:
        return
    _refuse_without_time_state(model)
    shape = generation_of(model.layout).wkv_shape(model.layout)
    for block in model.blocks:
        zeros = torch.zeros(shape, dtype=model.state_dtype, device=model.get_device())
        block.att.time_state = nn.Parameter(zeros)


def take_time_state(model: Model, path: str | Path) -> None:
    """Copy the tuned states of a file, or of a whole model that has them, into the model's time_state.

    Raises:
        ParameterError: a generation without time_state.
        LayoutError, NumericsError: see `read_time_states`.
    """
    states = _tuned_states(model, path)
    add_time_state(model)
    with torch.no_grad():
        for block, time_state in zip(model.blocks, states, strict=True):
            block.att.time_state.copy_(time_state)


def _tuned_states(model: Model, path: str | Path) -> list[torch.Tensor]:
    _refuse_without_time_state(model)
    return read_time_states(path, model.layout.n_layer, generation_of(model.layout).wkv_shape(model.layout))


def _refuse_without_time_state(model: Model) -> None:
    if not generation_of(model.layout).has_time_state:
        raise ParameterError(f"RWKV-{model.layout.version} has no time_state; states can be tuned from RWKV-5 on.")
