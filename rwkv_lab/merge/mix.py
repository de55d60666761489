"""Base and fine-tunes of it into one model, by a method of `mixing`: which tensors, with which values, in blocks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from rwkv_lab.checkpoint import Checkpoint, Layout
from rwkv_lab.checkpoint.layout import UNUSED_IN_LAYER_0
from rwkv_lab.errors import LayoutError
from rwkv_lab.merge.change import Change, in_step
from rwkv_lab.merge.draws import draws
from rwkv_lab.merge.mixing import MIXING, Signature, signature_of
from rwkv_lab.merge.mixing.signature import checked
from rwkv_lab.merge.overlay import check_full_tensors, same_dimensions
from rwkv_lab.merge.settings import check_setting, value_for

PIECE = 1 << 17  # elements worked on at a time: a dozen of them in float32 fit the caches, and the allocator keeps them


def changes(
    method: str,
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    layout: Layout,
    values: Mapping[str, object],
    precision: torch.dtype,
    allow_extra: list[str],
) -> list[Change]:
    """One change per tensor that any of `tuned` has.

    A tensor that one of `tuned` lacks counts as the base's there; one that the base lacks (a `time_state`) counts as
    zeros. Layer 0's v0, v1 and v2, which RWKV-7 does not use, come from the base or not at all.

    Args:
        values: settings by the names of all of the method's parameters.
    Raises:
        LayoutError: another generation, other dimensions, an adapter or a state in the place of a model.
        ParameterError: a parameter that the method does not take, or a value it cannot use for some tensor.
    """
    signature = signature_of(MIXING[method])
    signature.check_count(method, len(tuned))
    for ck in tuned:
        if ck.kind not in ("model", "partial"):
            why = f": {ck.reason}" if ck.reason else ""
            raise LayoutError(f"{ck.path} is of kind {ck.kind!r}{why}.\nMethod {method!r} mixes whole models.")
        same_dimensions(ck, layout)
        check_full_tensors(base, ck, layout, dict(ck.info), allow_extra)
    there = dict.fromkeys(n for ck in tuned for n in ck.info if n in base.info or n not in UNUSED_IN_LAYER_0)
    names = [n for n in base.info if n in there] + [n for n in there if n not in base.info]
    for what, setting in values.items():
        check_setting(what, setting, names)
    out = []
    for name in names:
        resolved = _resolve(signature, values, name, layout.n_layer, len(tuned))
        _try(MIXING[method], signature, resolved, len(tuned))
        if name in base.info or resolved.get("alpha") != 0:
            out.append(_mixed(method, signature, name, base, tuned, resolved, precision))
    return out


def _resolve(signature: Signature, values: Mapping, name: str, n_layer: int, tuned: int) -> dict[str, object]:
    """The method's parameters for one tensor."""
    out = {}
    for p in signature.parameters.values():
        given = values[p.name]
        where = f" for {name}" if isinstance(given, (Mapping, list)) else ""
        out[p.name] = checked(p, value_for(given, name, n_layer), tuned, where)
    return out


def _try(method: Callable, signature: Signature, values: dict[str, object], tuned: int) -> None:
    """Run a method on nothing: what it refuses, it refuses before anything is read."""
    nothing = torch.empty(0)
    found = _looked(signature, lambda: iter([(nothing, [nothing] * tuned)]), values)
    if signature.draws:
        found["draws"] = lambda seed, model: torch.empty(0, dtype=torch.float64)
    method(nothing, [nothing] * tuned, **values, **found)


def _mixed(
    method: str,
    signature: Signature,
    name: str,
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    values: dict[str, object],
    precision: torch.dtype,
) -> Change:
    first, others = base.info.get(name), [ck.info.get(name) for ck in tuned]
    like = first or next(t for t in others if t is not None)
    if values.get("alpha") == 0:  # the base, bit for bit
        return Change(name, "copy", "base", like.shape, like.dtype, copy=first)

    def blocks() -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        for together in in_step([t for t in (first, *others) if t is not None]):
            for pieces in zip(*(t.split(PIECE) for t in together), strict=True):
                wide = [p.to(precision) for p in pieces]
                b = wide.pop(0) if first else torch.zeros_like(wide[0])
                yield b, [wide.pop(0) if t is not None else b for t in others]

    def compute() -> Iterator[torch.Tensor]:
        found, start = _looked(signature, blocks, values), 0
        for b, pieces in blocks():
            if signature.draws:
                found["draws"] = partial(draws, name=name, start=start, count=len(b))
            yield MIXING[method](b, pieces, **values, **found)
            start += len(b)

    return Change(name, "mix", "base + tuned", like.shape, like.dtype, compute=compute)


def _looked(signature: Signature, blocks: Callable, values: dict[str, object]) -> dict[str, object]:
    """What the method wants to know of the whole tensor."""
    return {name: look(blocks, **_asked(look, values)) for name, look in signature.looks.items()}


def _asked(look: Callable, values: dict[str, object]) -> dict[str, object]:
    return {name: values[name] for name in look.__annotations__ if name in values}
