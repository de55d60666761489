"""Checkpoints into models and back: which tensor goes where, and what to say when one does not."""

from pathlib import Path

import torch

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import LayoutError, NumericsError

SUPPORTED = ("7.0",)


def read_model(path) -> tuple[object, dict[str, torch.Tensor]]:
    """Layout and tensors of a checkpoint, wrapper prefixes such as `model.` taken off.

    Raises:
        LayoutError: not a whole model, or a generation that cannot be run yet.
    """
    with open_checkpoint(path) as ck:
        if ck.kind != "model":
            raise LayoutError(f"{path} is no whole model ({ck.kind}): {ck.reason}.")
        if ck.layout.version not in SUPPORTED:
            raise LayoutError(
                f"{path} is RWKV-{ck.layout.version}; models of these generations run here: {', '.join(SUPPORTED)}."
            )
        prefix = ck.identity.prefix
        return ck.layout, {name.removeprefix(prefix): ck[name] for name in ck.info}


def fill(module: torch.nn.Module, tensors: dict[str, torch.Tensor], path) -> None:
    """Put tensors into a module's parameters by name, in the dtype and on the device of the module.

    Dimensions of size 1 may differ (`[C]` for `[1,1,C]`); everything else must fit, and nothing may be left over.

    Raises:
        LayoutError: a name that is missing or left over, or a shape that does not fit.
    """
    expected = dict(module.named_parameters())
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    if missing or extra:
        which = f"{missing[0]} is missing" if missing else f"{extra[0]} belongs to no part of the model"
        raise LayoutError(f"{path}: {which} ({len(missing)} missing, {len(extra)} left over).")
    with torch.no_grad():
        for name, parameter in expected.items():
            given = tensors[name]
            if _without_ones(given.shape) != _without_ones(parameter.shape):
                raise LayoutError(
                    f"{path}: {name} has shape {list(given.shape)}; the model needs {list(parameter.shape)}."
                )
            parameter.copy_(given.reshape(parameter.shape))


def read_time_states(path, n_layer: int, shape: tuple[int, int, int]) -> list[torch.Tensor]:
    """The tuned initial states in a state file, or in a whole model that carries them: one `[H,V,K]` per layer.

    Raises:
        LayoutError: no states, states of another number of layers, or of another shape.
        NumericsError: NaN or infinity in a state.
    """
    with open_checkpoint(path) as ck:
        names = [name for name in ck.info if name.endswith("att.time_state")]
        prefix = ck.identity.prefix
        states = {name.removeprefix(prefix): ck[name] for name in names}
    expected = [f"blocks.{layer}.att.time_state" for layer in range(n_layer)]
    if sorted(states) != sorted(expected):
        raise LayoutError(
            f"{path} holds time_state for {len(states)} layers ({', '.join(sorted(states)[:2]) or 'none'} …); "
            f"the model has layers 0 to {n_layer - 1}."
        )
    for name in expected:
        if _without_ones(states[name].shape) != _without_ones(shape):
            raise LayoutError(f"{path}: {name} has shape {list(states[name].shape)}; the model needs {list(shape)}.")
        if not states[name].isfinite().all():
            raise NumericsError(f"{path}: {name} holds NaN or infinity.")
    return [states[name].reshape(shape) for name in expected]


def model_file(folder: str | Path) -> Path:
    """Where `save_pretrained(folder)` writes: the name by which a folder of one file is opened again."""
    return Path(folder) / "model.safetensors"


def _without_ones(shape) -> list[int]:
    return [size for size in shape if size != 1]
