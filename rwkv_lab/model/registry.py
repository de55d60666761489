"""The generations of RWKV that models are made of. Each file `rwkv*.py` in this folder registers its own.

`rwkv_lab.checkpoint.generation` has what a file is recognised by, and which tensors it has.
"""

import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from rwkv_lab.checkpoint import Layout
from rwkv_lab.errors import LayoutError, ParameterError


@dataclass(frozen=True, eq=False)
class CompiledForm:
    """How the compiled paths of `model/cpu` take the layers of a generation.

    number: `Model.generation` in kernels/cpu/step.cpp, which takes one token through the model.
    slots: per layer, what goes into which place of the step's table: enumerator in the source -> parameter, or module
        whose parameters go there, in the order of the enum. A norm takes two places, weight and bias. What a layer does
        not have stays empty.
    transposed: parameters that are stored as [in,out], a Linear's weight being [out,in].
    unused_in_first_layer: what the first layer does not read.
    time_mix: of the prefill: `(prefill, block, x, shape, shift, wkv, v_first)` -> the new shift, the new WKV state,
        v_first. Adds the time mix of all tokens to x in place.
    channel_mix: the same, `(prefill, block, x, shape, shift)` -> the new shift.
    """

    number: int
    slots: Mapping[str, str]
    time_mix: Callable
    channel_mix: Callable
    transposed: frozenset[str] = frozenset()
    unused_in_first_layer: frozenset[str] = frozenset()


def _matrix_per_head(layout: Layout) -> tuple[int, ...]:
    return layout.n_head, layout.head_size, layout.head_size


def _zeros(layout: Layout, device: torch.device) -> torch.Tensor:
    return torch.zeros(layout.n_layer, *_matrix_per_head(layout), dtype=torch.float32, device=device)


@dataclass(frozen=True, eq=False)
class Generation:
    """What a model has to know of a generation besides its layers.

    versions: as `Layout.version` has them.
    make_block: `(layout, layer, group_norm_eps, names)` -> `blocks.<layer>` without values; `names` are those of the
        file's tensors, which decide where a generation has tensors that only some files hold.
    wkv_shape: of the WKV state of one sequence in one layer; `[H,V,K]` unless stated.
    first_wkv: `(layout, device)` -> the WKV state before the first token, float32 `[L,...]`; zeros unless stated.
    has_time_state: initial states can be tuned, `blocks.i.att.time_state` `[H,V,K]`.
    has_v_first: layer 0 hands its values to the others.
    halves_float16: the residual stream is halved on its way in float16; see `Block`.
    compiled: None where everything runs through PyTorch.
    """

    versions: tuple[str, ...]
    make_block: Callable[[Layout, int, float, Collection[str]], nn.Module]
    wkv_shape: Callable[[Layout], tuple[int, ...]] = _matrix_per_head
    first_wkv: Callable[[Layout, torch.device], torch.Tensor] = _zeros
    has_time_state: bool = True
    has_v_first: bool = False
    halves_float16: bool = False
    compiled: CompiledForm | None = None


def compiled_form(layout: Layout) -> CompiledForm:
    """Of the generation of a model with this layout.

    Raises:
        LayoutError: it has none.
    """
    form = generation_of(layout).compiled
    if form is None:
        raise LayoutError(f"RWKV-{layout.version} has no compiled form.")
    return form


_generations: dict[str, Generation] = {}


def register(generation: Generation) -> None:
    """Make models of these versions known.

    Raises:
        ParameterError: a version of it is known already.
    """
    for version in generation.versions:
        if version in _generations:
            raise ParameterError(f"RWKV-{version} is known already.")
        _generations[version] = generation


def generations() -> list[Generation]:
    """All generations, in the order in which they were registered."""
    _find()
    return list(dict.fromkeys(_generations.values()))


def generation_of(layout: Layout) -> Generation:
    """The generation of a model with this layout.

    Raises:
        LayoutError: no file of this package makes models of it.
    """
    if layout.version not in _generations:
        _find()
    if layout.version not in _generations:
        raise LayoutError(
            f"There are no layers for RWKV-{layout.version}; there are for {', '.join(sorted(_generations))}."
        )
    return _generations[layout.version]


def _find() -> None:
    """Import every generation's file, which registers it."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("rwkv"):
            import_module(f"{package}.{module.name}")
