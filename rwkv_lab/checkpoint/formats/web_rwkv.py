"""RWKV-5.2, RWKV-6 and RWKV-7 as web-rwkv and ai00 read them: one safetensors file in float16 (`.st`).

Names are BlinkDL's but for `time_faaaa`, called `time_first`, and `time_maa`, called `time_mix`. Low-rank pairs and
tuned states lie with their last two dimensions transposed. Of RWKV-7 no name differs, so shapes tell.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence

from rwkv_lab.checkpoint.dimensions import Layout
from rwkv_lab.checkpoint.foreign_format import TRANSPOSED, Facts, ForeignFormat, Row, register_foreign_format

_AROUND = tuple(
    Row(name, name)
    for name in (
        "emb.weight",
        "blocks.0.ln0.weight",
        "blocks.0.ln0.bias",
        "ln_out.weight",
        "ln_out.bias",
        "head.weight",
        *(f"blocks.{{i}}.{part}" for part in ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias")),
        *(f"blocks.{{i}}.att.{part}.weight" for part in ("receptance", "key", "value", "output", "ln_x")),
        "blocks.{i}.att.ln_x.bias",
        "blocks.{i}.ffn.key.weight",
        "blocks.{i}.ffn.value.weight",
    )
)
STATE_ROWS = (Row("blocks.{i}.att.time_state", "blocks.{i}.att.time_state", TRANSPOSED),)
_OF_5_AND_6 = (
    *_AROUND,
    Row("blocks.{i}.att.gate.weight", "blocks.{i}.att.gate.weight"),
    Row("blocks.{i}.ffn.receptance.weight", "blocks.{i}.ffn.receptance.weight"),
    Row("blocks.{i}.att.time_decay", "blocks.{i}.att.time_decay"),
    Row("blocks.{i}.att.time_faaaa", "blocks.{i}.att.time_first"),
)
RWKV5_ROWS = (
    *_OF_5_AND_6,
    *(Row(f"blocks.{{i}}.att.time_mix_{z}", f"blocks.{{i}}.att.time_mix_{z}") for z in "kvrg"),
    *(Row(f"blocks.{{i}}.ffn.time_mix_{z}", f"blocks.{{i}}.ffn.time_mix_{z}") for z in "kr"),
    *STATE_ROWS,
)
RWKV6_ROWS = (
    *_OF_5_AND_6,
    *(Row(f"blocks.{{i}}.att.time_maa_{z}", f"blocks.{{i}}.att.time_mix_{z}") for z in "xwkvrg"),
    *(Row(f"blocks.{{i}}.ffn.time_maa_{z}", f"blocks.{{i}}.ffn.time_mix_{z}") for z in "kr"),
    *(Row(f"blocks.{{i}}.att.time_maa_w{n}", f"blocks.{{i}}.att.time_mix_w{n}", TRANSPOSED) for n in "12"),
    *(Row(f"blocks.{{i}}.att.time_decay_w{n}", f"blocks.{{i}}.att.time_decay_w{n}", TRANSPOSED) for n in "12"),
    *STATE_ROWS,
)
RWKV7_ROWS = (
    *_AROUND,
    *(Row(f"blocks.{{i}}.att.x_{z}", f"blocks.{{i}}.att.x_{z}") for z in "rwkvag"),
    *(Row(f"blocks.{{i}}.att.{z}0", f"blocks.{{i}}.att.{z}0") for z in "wav"),
    *(Row(f"blocks.{{i}}.att.{z}{n}", f"blocks.{{i}}.att.{z}{n}", TRANSPOSED) for z in "wavg" for n in "12"),
    *(Row(f"blocks.{{i}}.att.{z}", f"blocks.{{i}}.att.{z}") for z in ("k_k", "k_a", "r_k")),
    Row("blocks.{i}.ffn.x_k", "blocks.{i}.ffn.x_k"),
    *STATE_ROWS,
)
_ONLY_6 = re.compile(r"blocks\.\d+\.att\.time_mix_(x|w|w1|w2)$")
_PAIR_OF_7 = re.compile(r"(blocks\.\d+\.att\.)[wavg]([12])$")


def _is_rwkv5(names: Iterable[str], facts: Facts) -> bool:
    """BlinkDL's own RWKV-5.0 and 5.1 have a `time_first` with one value per head, RWKV-4 has no norm over heads."""
    numel = {name.rpartition(".")[2]: math.prod(shape) for name, shape in facts.shapes.items() if ".att." in name}
    channels = next((math.prod(s) for n, s in facts.shapes.items() if n.endswith(".att.ln_x.weight")), None)
    if channels is None or "time_faaaa" in numel:
        return False
    return numel.get("time_first") == numel.get("time_decay") == channels


def _is_rwkv6(names: Iterable[str], facts: Facts) -> bool:
    return any(_ONLY_6.match(name) for name in names)


def _is_rwkv7(names: Iterable[str], facts: Facts) -> bool:
    """By the first matrix of a low-rank pair that is not square."""
    for name, shape in facts.shapes.items():
        pair = _PAIR_OF_7.match(name)
        channels = facts.shapes.get(pair[1] + "k_k") if pair else None
        if pair and channels and len(shape) == 2 and shape[0] != shape[1]:
            return shape[1 if pair[2] == "1" else 0] == math.prod(channels)
    return False


def _refused(layout: Layout) -> str:
    if layout.dim_att != layout.n_embd:
        return f"web-rwkv takes heads of n_embd / n_head channels; n_embd is {layout.n_embd}, dim_att {layout.dim_att}"
    if layout.version == "7.0" and layout.n_layer == 1:
        return "web-rwkv reads the rank of v off layer 1, and this model has one layer"
    return ""


def _notes(layout: Layout) -> Sequence[str]:
    return ["web-rwkv and ai00 read float16 only: values are rounded to it, and counted."]


_USE = """
import web_rwkv_py  # of cryscan/web-rwkv-py; version 0.2 reads RWKV-5 and 6
model = web_rwkv_py.Model("{path}")
logits, state = model.run([0], state=None)
# ai00 reads RWKV-7 too: it takes the file's name in its Config.toml
"""
_FORMATS: tuple[tuple[str, str, tuple[Row, ...], Callable[[Iterable[str], Facts], bool]], ...] = (
    ("5", "5.2", RWKV5_ROWS, _is_rwkv5),
    ("6", "6.0", RWKV6_ROWS, _is_rwkv6),
    ("7", "7.0", RWKV7_ROWS, _is_rwkv7),
)
for _major, _version, _rows, _recognise in _FORMATS:
    register_foreign_format(
        ForeignFormat(
            name=f"web-rwkv{_major}",
            described=f"a file for web-rwkv and ai00, RWKV-{_major}",
            target="web-rwkv",
            container="safetensors",
            versions=(_version,),
            rows=_rows,
            state_rows=STATE_ROWS,
            recognise=_recognise,
            refused=_refused,
            notes=_notes,
            dtype="float16",
            read_by="web-rwkv and ai00",
            use=_USE,
        )
    )
