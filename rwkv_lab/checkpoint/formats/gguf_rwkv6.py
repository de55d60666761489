"""RWKV-6 under the names of llama.cpp, in GGUF.

Low-rank pairs lie transposed there, as weights of linear layers; five token shifts of a layer lie in one tensor. Files
made from the World repositories have `att.output` and `ffn.value` halved after every six layers, and say so.
"""

from collections.abc import Sequence

from rwkv_lab.checkpoint.foreign_format import (
    FLAT,
    HALVED,
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
    refused,
    vectors_in_float32,
    whole_number,
)

SHIFTS = Transform(
    "five vectors [1, 1, C] in one tensor [5, 1, 1, C]",
    lambda ours, at: stacked(ours, (1, 1, ours[0].numel())),
    lambda theirs, at: theirs.reshape(5, 1, 1, -1).unbind(0),
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
    Row("blocks.{i}.att.time_maa_x", "blk.{i}.time_mix_lerp_x.weight", FLAT),
    Row(tuple(f"blocks.{{i}}.att.time_maa_{z}" for z in "wkvrg"), "blk.{i}.time_mix_lerp_fused.weight", SHIFTS),
    Row("blocks.{i}.att.time_maa_w1", "blk.{i}.time_mix_w1.weight", TRANSPOSED),
    Row("blocks.{i}.att.time_maa_w2", "blk.{i}.time_mix_w2.weight", TRANSPOSED),
    Row("blocks.{i}.att.time_decay", "blk.{i}.time_mix_decay.weight", FLAT),
    Row("blocks.{i}.att.time_decay_w1", "blk.{i}.time_mix_decay_w1.weight", TRANSPOSED),
    Row("blocks.{i}.att.time_decay_w2", "blk.{i}.time_mix_decay_w2.weight", TRANSPOSED),
    Row("blocks.{i}.att.time_faaaa", "blk.{i}.time_mix_first.weight"),
    Row("blocks.{i}.att.receptance.weight", "blk.{i}.time_mix_receptance.weight"),
    Row("blocks.{i}.att.key.weight", "blk.{i}.time_mix_key.weight"),
    Row("blocks.{i}.att.value.weight", "blk.{i}.time_mix_value.weight"),
    Row("blocks.{i}.att.gate.weight", "blk.{i}.time_mix_gate.weight"),
    Row("blocks.{i}.att.output.weight", "blk.{i}.time_mix_output.weight", HALVED),
    Row("blocks.{i}.att.ln_x.weight", "blk.{i}.time_mix_ln.weight"),
    Row("blocks.{i}.att.ln_x.bias", "blk.{i}.time_mix_ln.bias"),
    Row("blocks.{i}.ffn.time_maa_k", "blk.{i}.channel_mix_lerp_k.weight", FLAT),
    Row("blocks.{i}.ffn.time_maa_r", "blk.{i}.channel_mix_lerp_r.weight", FLAT),
    Row("blocks.{i}.ffn.key.weight", "blk.{i}.channel_mix_key.weight"),
    Row("blocks.{i}.ffn.receptance.weight", "blk.{i}.channel_mix_receptance.weight"),
    Row("blocks.{i}.ffn.value.weight", "blk.{i}.channel_mix_value.weight", HALVED),
)
# Before 2025 each token shift was a tensor of its own.
OLDER = tuple(Row(f"blocks.{{i}}.att.time_maa_{z}", f"blk.{{i}}.time_mix_lerp_{z}.weight", FLAT) for z in "wkvrg")
QUANTISED = (  # the large matrices; low-rank pairs stay as they are, as in llama.cpp's own files
    "token_embd.weight",
    "output.weight",
    *(f"blk.{{i}}.time_mix_{name}.weight" for name in ("receptance", "key", "value", "gate", "output")),
    *(f"blk.{{i}}.channel_mix_{name}.weight" for name in ("key", "receptance", "value")),
)
FULL = (  # float32 in files of every type
    "time_mix_lerp_fused",
    "time_mix_first",
    "time_mix_w1",
    "time_mix_w2",
    "time_mix_decay_w1",
    "time_mix_decay_w2",
)


def _recognise(names: Sequence[str], facts: Facts) -> bool:
    return any(name.startswith("blk.") and name.endswith(".time_mix_decay_w1.weight") for name in names)


register_foreign_format(
    ForeignFormat(
        name="gguf-rwkv6",
        described="a GGUF file, RWKV-6",
        target="gguf",
        container="gguf",
        versions=("6.0",),
        rows=ROWS,
        recognise=_recognise,
        dropped={"blocks.{i}.att.time_state": NOT_READ},
        older=OLDER,
        stated=lambda facts: Place(rescale_every=whole_number(facts, "rwkv6.rescale_every_n_layers", 0)),
        group_norm_eps=group_norm_eps,
        refused=refused,
        quantised=QUANTISED,
        read_by=READ_BY,
        use=USE,
        dtype_of=vectors_in_float32(FULL),
    )
)
