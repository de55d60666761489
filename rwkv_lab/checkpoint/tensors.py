"""The tensors that a model of a given layout has: names, shapes, and which of them a file may leave out."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from rwkv_lab.checkpoint.layout import UNUSED_IN_LAYER_0, Layout, Shape, same_shape


def expected_tensors(layout: Layout) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """(required, optional) tensors of a model, `{name: shape}` in the shapes of BlinkDL's own files."""
    C, V = layout.n_embd, layout.vocab_size
    required: dict[str, Shape] = {"emb.weight": (V, C), "blocks.0.ln0.weight": (C,), "blocks.0.ln0.bias": (C,)}
    optional: dict[str, Shape] = {}
    block = _BLOCKS[layout.version]
    for i in range(layout.n_layer):
        for norm in ("ln1", "ln2"):
            required |= {f"blocks.{i}.{norm}.weight": (C,), f"blocks.{i}.{norm}.bias": (C,)}
        for name, shape in block(layout).items():
            unused = layout.version == "7.0" and f"blocks.{i}.{name}" in UNUSED_IN_LAYER_0
            (optional if unused else required)[f"blocks.{i}.{name}"] = shape
        if layout.n_head:
            optional[f"blocks.{i}.att.time_state"] = (layout.n_head, layout.head_size, layout.head_size)
    required |= {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (V, C)}
    return required, optional


def _matrices(layout: Layout, gate: bool) -> dict[str, Shape]:
    C, A = layout.n_embd, layout.dim_att
    names = ("receptance", "key", "value", "gate") if gate else ("receptance", "key", "value")
    return {f"att.{n}.weight": (A, C) for n in names} | {"att.output.weight": (C, A)}


def _ffn(layout: Layout, receptance: bool = True) -> dict[str, Shape]:
    C, F = layout.n_embd, layout.dim_ffn
    shapes: dict[str, Shape] = {"ffn.key.weight": (F, C), "ffn.value.weight": (C, F)}
    return shapes | {"ffn.receptance.weight": (C, C)} if receptance else shapes


def _vectors(layout: Layout, part: str, names: Iterable[str]) -> dict[str, Shape]:
    return {f"{part}.{n}": (1, 1, layout.n_embd) for n in names}


def _ln_x(layout: Layout) -> dict[str, Shape]:
    return {"att.ln_x.weight": (layout.dim_att,), "att.ln_x.bias": (layout.dim_att,)}


def _block4(m: Layout) -> dict[str, Shape]:
    return {
        "att.time_decay": (m.dim_att,),
        "att.time_first": (m.dim_att,),
        **_vectors(m, "att", ("time_mix_k", "time_mix_v", "time_mix_r")),
        **_matrices(m, gate=False),
        **_vectors(m, "ffn", ("time_mix_k", "time_mix_r")),
        **_ffn(m),
    }


def _block5(m: Layout) -> dict[str, Shape]:
    gated, per_channel = m.version != "5.0", m.version == "5.2"
    decay: Shape = (m.n_head, m.head_size) if per_channel else (m.n_head,)
    return {
        "att.time_decay": decay,
        "att.time_faaaa" if per_channel else "att.time_first": decay,
        **_vectors(m, "att", ("time_mix_k", "time_mix_v", "time_mix_r") + (("time_mix_g",) if gated else ())),
        **_matrices(m, gate=gated),
        **_ln_x(m),
        **_vectors(m, "ffn", ("time_mix_k", "time_mix_r")),
        **_ffn(m),
    }


def _block6(m: Layout) -> dict[str, Shape]:
    C, A, D, DD = m.n_embd, m.dim_att, m.ranks["maa"], m.ranks["decay"]
    return {
        **_vectors(m, "att", [f"time_maa_{z}" for z in "xwkvrg"]),
        "att.time_maa_w1": (C, 5 * D),
        "att.time_maa_w2": (5, D, C),
        "att.time_decay": (1, 1, A),
        "att.time_decay_w1": (C, DD),
        "att.time_decay_w2": (DD, A),
        "att.time_faaaa": (m.n_head, m.head_size),
        **_matrices(m, gate=True),
        **_ln_x(m),
        **_vectors(m, "ffn", ("time_maa_k", "time_maa_r")),
        **_ffn(m),
    }


def _block7(m: Layout) -> dict[str, Shape]:
    C, A = m.n_embd, m.dim_att
    shapes = _vectors(m, "att", [f"x_{z}" for z in "rwkvag"])
    for name, rank in m.ranks.items():
        if name != "g":
            shapes[f"att.{name}0"] = (1, 1, A)
        shapes |= {f"att.{name}1": (C, rank), f"att.{name}2": (rank, A)}
    return {
        **shapes,
        "att.k_k": (1, 1, A),
        "att.k_a": (1, 1, A),
        "att.r_k": (m.n_head, m.head_size),
        **_matrices(m, gate=False),
        **_ln_x(m),
        **_vectors(m, "ffn", ("x_k",)),
        **_ffn(m, receptance=False),
    }


_BLOCKS = {"4.0": _block4, "5.0": _block5, "5.1": _block5, "5.2": _block5, "6.0": _block6, "7.0": _block7}


def tensors_of(layout: Layout, names: Collection[str]) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """As `expected_tensors`, of a model that has these names where a layout leaves a choice."""
    required, optional = expected_tensors(layout)
    if layout.version in ("5.0", "5.1"):  # the `r2` files of these two name the same tensor time_faaaa
        for i in range(layout.n_layer):
            if f"blocks.{i}.att.time_faaaa" in names:
                required[f"blocks.{i}.att.time_faaaa"] = required.pop(f"blocks.{i}.att.time_first")
    return required, optional


@dataclass(frozen=True)
class Misfit:
    """How a file's tensors differ from what its layout has."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    wrong: tuple[tuple[str, Shape, Shape], ...]  # (name, shape found, shape expected)


def compare(layout: Layout, shapes: Mapping[str, Shape]) -> Misfit:
    """What is missing, extra or of another shape in `{name: shape}`, for a whole model of that layout."""
    required, optional = tensors_of(layout, shapes)
    known = required | optional
    missing = [n for n in required if n not in shapes]
    # A file has all three of layer 0's v0, v1, v2, or none.
    unused = [n for n in UNUSED_IN_LAYER_0 if n in optional]
    if any(n in shapes for n in unused):
        missing += [n for n in unused if n not in shapes]
    return Misfit(
        missing=tuple(missing),
        extra=tuple(n for n in shapes if n not in known),
        wrong=tuple((n, shapes[n], known[n]) for n in shapes if n in known and not same_shape(shapes[n], known[n])),
    )
