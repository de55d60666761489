"""RWKV-7 under the names of llama.cpp, in GGUF.

Low-rank pairs lie transposed there, as weights of linear layers; the six token shifts of a layer lie in one tensor.
"""

from collections.abc import Sequence

from rwkv_lab.checkpoint.dimensions import Layout, Shape
from rwkv_lab.checkpoint.foreign_format import (
    FLAT,
    TRANSPOSED,
    Facts,
    ForeignFormat,
    Place,
    Row,
    Transform,
    register_foreign_format,
    stacked,
)
from rwkv_lab.checkpoint.gguf_facts import (
    NOT_READ,
    READ_BY,
    USE,
    group_norm_eps,
    head_size,
    refused,
    vectors_in_float32,
)

SHIFTS = Transform(
    "six vectors [1, 1, C] in one tensor [6, 1, 1, C]",
    lambda ours, at: stacked(ours, (1, 1, ours[0].numel())),
    lambda theirs, at: theirs.reshape(6, 1, 1, -1).unbind(0),
)
HEADS = Transform(
    "[H, N] as [C]",
    lambda ours, at: ours[0].reshape(-1),
    lambda theirs, at: [theirs.reshape(-1, at.head_size)],
)
ROWS = (
    Row("emb.weight", "token_embd.weight"),
    Row("blocks.0.ln0.weight", "token_embd_norm.weight"),
    Row("blocks.0.ln0.bias", "token_embd_norm.bias"),
    Row("ln_out.weight", "output_norm.weight"),
    Row("ln_out.bias", "output_norm.bias"),
    Row("head.weight", "output.weight"),
    Row("blocks.{i}.ln1.weight", "blk.{i}.attn_norm.weight"),
    Row("blocks.{i}.ln1.bias", "blk.{i}.attn_norm.bias"),
    Row("blocks.{i}.ln2.weight", "blk.{i}.attn_norm_2.weight"),
    Row("blocks.{i}.ln2.bias", "blk.{i}.attn_norm_2.bias"),
    Row(tuple(f"blocks.{{i}}.att.x_{z}" for z in "rwkvag"), "blk.{i}.time_mix_lerp_fused.weight", SHIFTS),
    Row("blocks.{i}.att.w0", "blk.{i}.time_mix_w0.weight", FLAT),
    Row("blocks.{i}.att.w1", "blk.{i}.time_mix_w1.weight", TRANSPOSED),
    Row("blocks.{i}.att.w2", "blk.{i}.time_mix_w2.weight", TRANSPOSED),
    Row("blocks.{i}.att.a0", "blk.{i}.time_mix_a0.weight", FLAT),
    Row("blocks.{i}.att.a1", "blk.{i}.time_mix_a1.weight", TRANSPOSED),
    Row("blocks.{i}.att.a2", "blk.{i}.time_mix_a2.weight", TRANSPOSED),
    Row("blocks.{i}.att.v0", "blk.{i}.time_mix_v0.weight", FLAT),
    Row("blocks.{i}.att.v1", "blk.{i}.time_mix_v1.weight", TRANSPOSED),
    Row("blocks.{i}.att.v2", "blk.{i}.time_mix_v2.weight", TRANSPOSED),
    Row("blocks.{i}.att.g1", "blk.{i}.time_mix_g1.weight", TRANSPOSED),
    Row("blocks.{i}.att.g2", "blk.{i}.time_mix_g2.weight", TRANSPOSED),
    Row("blocks.{i}.att.k_k", "blk.{i}.time_mix_k_k.weight", FLAT),
    Row("blocks.{i}.att.k_a", "blk.{i}.time_mix_k_a.weight", FLAT),
    Row("blocks.{i}.att.r_k", "blk.{i}.time_mix_r_k.weight", HEADS),
    Row("blocks.{i}.att.receptance.weight", "blk.{i}.time_mix_receptance.weight"),
    Row("blocks.{i}.att.key.weight", "blk.{i}.time_mix_key.weight"),
    Row("blocks.{i}.att.value.weight", "blk.{i}.time_mix_value.weight"),
    Row("blocks.{i}.att.output.weight", "blk.{i}.time_mix_output.weight"),
    Row("blocks.{i}.att.ln_x.weight", "blk.{i}.time_mix_ln.weight"),
    Row("blocks.{i}.att.ln_x.bias", "blk.{i}.time_mix_ln.bias"),
    Row("blocks.{i}.ffn.x_k", "blk.{i}.channel_mix_lerp_k.weight", FLAT),
    Row("blocks.{i}.ffn.key.weight", "blk.{i}.channel_mix_key.weight"),
    Row("blocks.{i}.ffn.value.weight", "blk.{i}.channel_mix_value.weight"),
)
FULL = ("time_mix_lerp_fused", "time_mix_w1", "time_mix_w2")  # float32 in files of every type
QUANTISED = (  # the large matrices; low-rank pairs stay as they are, as in llama.cpp's own files
    "token_embd.weight",
    "output.weight",
    *(f"blk.{{i}}.time_mix_{name}.weight" for name in ("receptance", "key", "value", "output")),
    *(f"blk.{{i}}.channel_mix_{name}.weight" for name in ("key", "value")),
)
UNUSED = "layer 0 makes what v0, v1 and v2 would mix in: nothing reads them there"


def _unread(layout: Layout) -> dict[str, Shape]:
    """Layer 0's v0, v1 and v2, which llama.cpp asks for, with the rank of its a."""
    C, rank = layout.n_embd, layout.ranks["a"]
    names = {"v0": (C,), "v1": (rank, C), "v2": (C, rank)}
    return {f"blk.0.time_mix_{name}.weight": shape for name, shape in names.items()}


def _notes(layout: Layout) -> list[str]:
    if layout.head_size % 64 == 0:
        return []
    return [
        "llama.cpp (seen in llama-cpp-python 0.3.36) is wrong for RWKV-7 on processors with AVX-512 where a head has "
        f"{layout.head_size} channels: it takes 64 at a time and loses the rest. The file is right."
    ]


def _recognise(names: Sequence[str], facts: Facts) -> bool:
    return any(name.startswith("blk.") and name.endswith(".time_mix_k_k.weight") for name in names)


register_foreign_format(
    ForeignFormat(
        name="gguf-rwkv7",
        described="a GGUF file, RWKV-7",
        target="gguf",
        container="gguf",
        versions=("7.0",),
        rows=ROWS,
        recognise=_recognise,
        dropped={
            **{f"blocks.0.att.{name}": UNUSED for name in ("v0", "v1", "v2")},
            "blocks.{i}.att.time_state": NOT_READ,
        },
        ignored={f"blk.0.time_mix_{name}.weight": UNUSED for name in ("v0", "v1", "v2")},
        unread=_unread,
        stated=lambda facts: Place(head_size=head_size(facts, "rwkv7")),
        group_norm_eps=group_norm_eps,
        refused=refused,
        notes=_notes,
        quantised=QUANTISED,
        read_by=READ_BY,
        use=USE,
        dtype_of=vectors_in_float32(FULL),
    )
)
