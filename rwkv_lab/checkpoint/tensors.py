"""The tensors that a model of a given layout has: names, shapes, and which of them a file may leave out."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint.generation import GENERATIONS
from rwkv_lab.checkpoint.layout import Layout, Shape, same_shape


@checked
def expected_tensors(layout: Layout) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """(required, optional) tensors of a model, `{name: shape}` in the shapes of BlinkDL's own files."""
    C, V = layout.n_embd, layout.vocab_size
    required: dict[str, Shape] = {"emb.weight": (V, C), "blocks.0.ln0.weight": (C,), "blocks.0.ln0.bias": (C,)}
    optional: dict[str, Shape] = {}
    generation = GENERATIONS[layout.version]
    for i in range(layout.n_layer):
        for norm in ("ln1", "ln2"):
            required |= {f"blocks.{i}.{norm}.weight": (C,), f"blocks.{i}.{norm}.bias": (C,)}
        for name, shape in generation.block(layout).items():
            unused = i == 0 and name in generation.unused_in_layer_0
            (optional if unused else required)[f"blocks.{i}.{name}"] = shape
        if layout.n_head:
            optional[f"blocks.{i}.att.time_state"] = (layout.n_head, layout.head_size, layout.head_size)
    required |= {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (V, C)}
    return required, optional


@checked
def tensors_of(layout: Layout, names: Collection[str]) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """As `expected_tensors`, of a model that has these names where files name a tensor in two ways."""
    required, optional = expected_tensors(layout)
    for name, other in GENERATIONS[layout.version].also_named.items():
        for i in range(layout.n_layer):
            if f"blocks.{i}.{name}" in required and f"blocks.{i}.{other}" in names:
                required[f"blocks.{i}.{other}"] = required.pop(f"blocks.{i}.{name}")
    return required, optional


@dataclass(frozen=True)
class Misfit:
    """How a file's tensors differ from what its layout has."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    wrong: tuple[tuple[str, Shape, Shape], ...]  # (name, shape found, shape expected)


@checked
def compare(layout: Layout, shapes: Mapping[str, Shape]) -> Misfit:
    """What is missing, extra or of another shape in `{name: shape}`, for a whole model of that layout."""
    required, optional = tensors_of(layout, shapes)
    known = required | optional
    missing = [n for n in required if n not in shapes]
    unused = [f"blocks.0.{name}" for name in GENERATIONS[layout.version].unused_in_layer_0]
    if any(n in shapes for n in unused):  # a file has all of them, or none
        missing += [n for n in unused if n in optional and n not in shapes]
    return Misfit(
        missing=tuple(missing),
        extra=tuple(n for n in shapes if n not in known),
        wrong=tuple((n, shapes[n], known[n]) for n in shapes if n in known and not same_shape(shapes[n], known[n])),
    )
