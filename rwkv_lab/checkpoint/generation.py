"""What a generation of RWKV is in a file: how it is recognised, and which tensors a model of it has.

Each module of `rwkv_lab.checkpoint.generations` registers one. `rwkv_lab.model.registry` has what models need of it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from rwkv_lab.checkpoint.dimensions import Layout, Shape, without_ones
from rwkv_lab.errors import LayoutError, ParameterError

ATT = "blocks.0.att."  # where a generation is recognised: no rule needs a second layer

# Patterns of names that several generations have. A part of a model, or an adapter, is of one that has all its names.
TIME_FAAAA = r"\.att\.time_faaaa$"
GATE = r"\.att\.gate\."
TIME_MIX = r"\.time_mix_[kvr]$"
TIME_FIRST = r"\.time_first$"
FFN_RECEPTANCE = r"\.ffn\.receptance\."
LN_X = r"\.att\.ln_x\."
TIME_STATE = r"\.time_state$"
SHARED_NAMES = (TIME_FAAAA, GATE, TIME_MIX, TIME_FIRST, FFN_RECEPTANCE, LN_X, TIME_STATE)


class Shapes:
    """Looks shapes up by name, with an error that names what is missing."""

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes = shapes

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def first(self, *names: str) -> str | None:
        """The first of these names that is there."""
        return next((name for name in names if name in self.shapes), None)

    def matrix(self, name: str) -> Shape:
        """Shape of a tensor that must have two dimensions."""
        if name not in self.shapes:
            raise LayoutError(f"not a complete RWKV model: {name} is missing")
        shape = self.shapes[name]
        if len(shape) != 2 or 0 in shape:
            raise LayoutError(f"not an RWKV model: {name} has shape {list(shape)}, a matrix is expected")
        return shape

    def numel(self, name: str) -> int:
        if name not in self.shapes:
            raise LayoutError(f"not a complete RWKV model: {name} is missing")
        total = 1
        for d in self.shapes[name]:
            total *= d
        return total

    def heads(self, name: str, dim_att: int) -> int:
        """The number of heads H from a tensor `[H, N]`, whose H may have been squeezed away where it is 1."""
        if name not in self.shapes:
            raise LayoutError(f"not a complete RWKV model: {name} is missing")
        shape, numel = self.shapes[name], self.numel(name)
        if numel != dim_att:
            raise LayoutError(f"{name} has {numel} values, dim_att is {dim_att}: they must be equal")
        core = without_ones(shape)
        if len(core) == 2:
            return core[0]
        if len(shape) == 2 and shape[1] == 1:
            return shape[0]
        if dim_att > 256:  # no head is that wide: this is [H, N] flattened, and N cannot be read off any more
            raise LayoutError(f"{name} has shape {list(shape)}: its heads were flattened away; [H, N] is expected")
        return 1


def _no_ranks(shapes: Shapes, n_layer: int) -> dict[str, int]:
    return {}


@dataclass(frozen=True)
class Generation:
    """One generation, or several that differ little.

    Attributes:
        versions: as `Layout.version` has them.
        recognised_by: the names that decide, for messages.
        recognise: `(shapes, dim_att)` -> the version and the name that decided it; None where it is not this one. Any
            one name of the generation should do: which are missing is found later. The generation that was registered
            last is tried first.
        n_head: `(shapes, version, dim_att)` -> number of heads; None where it has no heads.
        ranks: `(shapes, n_layer)` -> low-rank dimensions by name. They are read off shapes: two formulas of n_embd are
            in circulation.
        block: the tensors of one layer but for ln1, ln2 and time_state, `{"att.key.weight": shape}`.
        names: patterns of names that not all generations have -> the versions of this one that have them.
        also_named: a tensor's name -> what some files call it instead.
        unused_in_layer_0: tensors of layer 0 that nothing reads and a file need not have; all of them or none.
    """

    versions: tuple[str, ...]
    recognised_by: str
    recognise: Callable[[Shapes, int], tuple[str, str] | None]
    n_head: Callable[[Shapes, str, int], int] | None
    block: Callable[[Layout], dict[str, Shape]]
    names: Mapping[str, Iterable[str]]
    ranks: Callable[[Shapes, int], dict[str, int]] = _no_ranks
    also_named: Mapping[str, str] = field(default_factory=dict)
    unused_in_layer_0: tuple[str, ...] = ()


GENERATIONS: dict[str, Generation] = {}  # by version


def register(generation: Generation) -> None:
    """Make a generation known.

    Raises:
        ParameterError: a version of it is known already.
    """
    for version in generation.versions:
        if version in GENERATIONS:
            raise ParameterError(f"RWKV-{version} is known already.")
        GENERATIONS[version] = generation


def generations() -> list[Generation]:
    """Every generation once, in the order in which they are tried."""
    return list({id(g): g for g in reversed(GENERATIONS.values())}.values())


def matrices(layout: Layout, gate: bool) -> dict[str, Shape]:
    """The matrices of a time mix."""
    C, A = layout.n_embd, layout.dim_att
    names = ("receptance", "key", "value", "gate") if gate else ("receptance", "key", "value")
    return {f"att.{n}.weight": (A, C) for n in names} | {"att.output.weight": (C, A)}


def ffn(layout: Layout, receptance: bool = True) -> dict[str, Shape]:
    """The matrices of a channel mix."""
    C, F = layout.n_embd, layout.dim_ffn
    shapes: dict[str, Shape] = {"ffn.key.weight": (F, C), "ffn.value.weight": (C, F)}
    return shapes | {"ffn.receptance.weight": (C, C)} if receptance else shapes


def vectors(layout: Layout, part: str, names: Iterable[str]) -> dict[str, Shape]:
    """Vectors of C values, in `att` or `ffn`."""
    return {f"{part}.{n}": (1, 1, layout.n_embd) for n in names}


def ln_x(layout: Layout) -> dict[str, Shape]:
    """The norm over heads."""
    return {"att.ln_x.weight": (layout.dim_att,), "att.ln_x.bias": (layout.dim_att,)}
