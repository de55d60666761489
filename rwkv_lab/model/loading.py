"""Checkpoints into models and back: which tensor goes where, and what to say when one does not."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from rwkv_lab.checkpoint import Checkpoint, Layout, TensorInfo, open_checkpoint
from rwkv_lab.checkpoint.tuned_states import state_names
from rwkv_lab.checkpoint.whole_model import whole_model
from rwkv_lab.errors import LayoutError, NumericsError
from rwkv_lab.text import counted


@contextmanager
def open_model(path: str | Path) -> Iterator[tuple[Checkpoint, Layout]]:
    """A whole model and its layout.

    Raises:
        LayoutError: not a whole model.
    """
    with open_checkpoint(path) as ck:
        yield ck, whole_model(ck)


def fill(module: nn.Module, tensors: Mapping[str, TensorInfo], path: str | Path) -> None:
    """Read tensors into a module's parameters by name, in the dtype and on the device of the module.

    They are read and converted in blocks, so that no second copy of a tensor is ever in memory.
    Dimensions of size 1 may differ (`[C]` for `[1,1,C]`); everything else must fit, and nothing may be left over.
    A layer without a `time_state`, where others have one, starts from zeros.

    Raises:
        LayoutError: a name that is missing or left over, or a shape that does not fit.
        NumericsError: a value too large for the module's dtype, as bfloat16 values may be for float16.
    """
    check_tensors(module, tensors, path)
    for name, parameter in module.named_parameters():
        if name not in tensors:
            parameter.detach().zero_()
            continue
        flat = parameter.detach().view(-1)
        at = 0
        for block in tensors[name].blocks():
            target = flat[at : at + len(block)]
            target.copy_(block)
            at += len(block)
            _refuse_overflow(target, block, path, name)


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype, info: TensorInfo) -> torch.Tensor:
    """Values of a file as they are in a dtype; in their own where that loses nothing.

    Raises:
        NumericsError: a value too large for float16.
    """
    if torch.promote_types(tensor.dtype, dtype) == dtype:
        return tensor
    rounded = tensor.to(dtype)
    _refuse_overflow(rounded, tensor, info.file.path, info.name)
    return rounded


def _refuse_overflow(rounded: torch.Tensor, tensor: torch.Tensor, path: str | Path, name: str) -> None:
    if rounded.dtype == torch.float16 and (rounded.isinf().cpu() & tensor.isfinite()).any():
        raise NumericsError(
            f"{path}: {name} holds {float(tensor.abs().max()):.4g}; float16 ends at 65504.\n"
            "Load it with dtype=torch.bfloat16 or torch.float32."
        )


def read_tensor(info: TensorInfo, shape: torch.Size) -> torch.Tensor:
    """A tensor of a file in float32 and in this shape, read in blocks."""
    tensor = torch.empty(shape, dtype=torch.float32, device="cpu")
    at, flat = 0, tensor.view(-1)
    for block in info.blocks():
        flat[at : at + len(block)] = block
        at += len(block)
    return tensor


def check_tensors(module: nn.Module, tensors: Mapping[str, TensorInfo], path: str | Path) -> None:
    """Whether a file's tensors are those of a module, from the header alone; see `fill`.

    Raises:
        LayoutError: a name that is missing or left over, or a shape that does not fit.
    """
    expected = dict(module.named_parameters())
    missing = [name for name in expected if name not in tensors and not name.endswith(".time_state")]
    extra = [name for name in tensors if name not in expected]
    if missing or extra:
        which = f"{missing[0]} is missing" if missing else f"{extra[0]} belongs to no part of the model"
        raise LayoutError(f"{path}: {which} ({len(missing)} missing, {len(extra)} left over).")
    for name, parameter in expected.items():
        if name in tensors and _without_ones(tensors[name].shape) != _without_ones(parameter.shape):
            raise LayoutError(
                f"{path}: {name} has shape {list(tensors[name].shape)}; the model needs {list(parameter.shape)}."
            )


def read_time_states(path: str | Path, n_layer: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """The tuned initial states in a state file, or in a whole model that carries them: one `[H,V,K]` per layer.

    Raises:
        LayoutError: no states, states of another number of layers, or of another shape.
        NumericsError: NaN or infinity in a state.
    """
    with open_checkpoint(path) as ck:
        states = {name: ck[name] for name in state_names(ck)}
    expected = [f"blocks.{layer}.att.time_state" for layer in range(n_layer)]
    if sorted(states) != sorted(expected):
        raise LayoutError(
            f"{path} holds tuned states of {counted(len(states), 'layer')} ({', '.join(sorted(states)[:2])} …); "
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
