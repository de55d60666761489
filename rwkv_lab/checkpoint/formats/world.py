"""RWKV-5.2 and RWKV-6 as the RWKV-5 and RWKV-6 World repositories hold them, whose modelling code comes with them.

Named as transformers' RWKV-4; no tensor is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rwkv_lab.checkpoint.dimensions import Layout
from rwkv_lab.checkpoint.foreign_format import HALVED, TRANSPOSED, Facts, ForeignFormat, Row, register_foreign_format
from rwkv_lab.lazy_torch import torch

_BOTH = (
    Row("emb.weight", "rwkv.embeddings.weight"),
    Row("blocks.0.ln0.weight", "rwkv.blocks.0.pre_ln.weight"),
    Row("blocks.0.ln0.bias", "rwkv.blocks.0.pre_ln.bias"),
    Row("ln_out.weight", "rwkv.ln_out.weight"),
    Row("ln_out.bias", "rwkv.ln_out.bias"),
    Row("head.weight", "head.weight"),
    Row("blocks.{i}.ln1.weight", "rwkv.blocks.{i}.ln1.weight"),
    Row("blocks.{i}.ln1.bias", "rwkv.blocks.{i}.ln1.bias"),
    Row("blocks.{i}.ln2.weight", "rwkv.blocks.{i}.ln2.weight"),
    Row("blocks.{i}.ln2.bias", "rwkv.blocks.{i}.ln2.bias"),
    Row("blocks.{i}.att.time_decay", "rwkv.blocks.{i}.attention.time_decay"),
    Row("blocks.{i}.att.time_faaaa", "rwkv.blocks.{i}.attention.time_faaaa"),
    Row("blocks.{i}.att.key.weight", "rwkv.blocks.{i}.attention.key.weight"),
    Row("blocks.{i}.att.value.weight", "rwkv.blocks.{i}.attention.value.weight"),
    Row("blocks.{i}.att.receptance.weight", "rwkv.blocks.{i}.attention.receptance.weight"),
    Row("blocks.{i}.att.gate.weight", "rwkv.blocks.{i}.attention.gate.weight"),
    Row("blocks.{i}.att.output.weight", "rwkv.blocks.{i}.attention.output.weight", HALVED),
    Row("blocks.{i}.att.ln_x.weight", "rwkv.blocks.{i}.attention.ln_x.weight"),
    Row("blocks.{i}.att.ln_x.bias", "rwkv.blocks.{i}.attention.ln_x.bias"),
    Row("blocks.{i}.ffn.key.weight", "rwkv.blocks.{i}.feed_forward.key.weight"),
    Row("blocks.{i}.ffn.receptance.weight", "rwkv.blocks.{i}.feed_forward.receptance.weight"),
    Row("blocks.{i}.ffn.value.weight", "rwkv.blocks.{i}.feed_forward.value.weight", HALVED),
)
RWKV5_ROWS = (
    *_BOTH,
    Row("blocks.{i}.att.time_mix_k", "rwkv.blocks.{i}.attention.time_mix_key"),
    Row("blocks.{i}.att.time_mix_v", "rwkv.blocks.{i}.attention.time_mix_value"),
    Row("blocks.{i}.att.time_mix_r", "rwkv.blocks.{i}.attention.time_mix_receptance"),
    Row("blocks.{i}.att.time_mix_g", "rwkv.blocks.{i}.attention.time_mix_gate"),
    Row("blocks.{i}.ffn.time_mix_k", "rwkv.blocks.{i}.feed_forward.time_mix_key"),
    Row("blocks.{i}.ffn.time_mix_r", "rwkv.blocks.{i}.feed_forward.time_mix_receptance"),
)
RWKV6_ROWS = (
    *_BOTH,
    Row("blocks.{i}.att.time_maa_x", "rwkv.blocks.{i}.attention.time_maa_x"),
    Row("blocks.{i}.att.time_maa_w", "rwkv.blocks.{i}.attention.time_maa_w"),
    Row("blocks.{i}.att.time_maa_k", "rwkv.blocks.{i}.attention.time_maa_k"),
    Row("blocks.{i}.att.time_maa_v", "rwkv.blocks.{i}.attention.time_maa_v"),
    Row("blocks.{i}.att.time_maa_r", "rwkv.blocks.{i}.attention.time_maa_r"),
    Row("blocks.{i}.att.time_maa_g", "rwkv.blocks.{i}.attention.time_maa_g"),
    Row("blocks.{i}.att.time_maa_w1", "rwkv.blocks.{i}.attention.time_maa_w1"),
    Row("blocks.{i}.att.time_maa_w2", "rwkv.blocks.{i}.attention.time_maa_w2"),
    Row("blocks.{i}.att.time_decay_w1", "rwkv.blocks.{i}.attention.time_decay_w1"),
    Row("blocks.{i}.att.time_decay_w2", "rwkv.blocks.{i}.attention.time_decay_w2"),
    Row("blocks.{i}.ffn.time_maa_k", "rwkv.blocks.{i}.feed_forward.time_maa_k"),
    Row("blocks.{i}.ffn.time_maa_r", "rwkv.blocks.{i}.feed_forward.time_maa_r"),
)
# The second of the three tensors of a state, [B, H, K, V, L], is these as its layers.
STATE_ROWS = (Row("blocks.{i}.att.time_state", "layers.{i}.recurrent_state", TRANSPOSED),)
_STATE = "their code starts from zeros, and takes a state beside the tokens: convert to world, a file state.safetensors"


def _config(layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    generation = layout.version[0]
    return {
        "model_type": f"rwkv{generation}",
        "architectures": [f"Rwkv{generation}ForCausalLM"],
        "vocab_size": layout.vocab_size,
        "context_length": 4096,
        "hidden_size": layout.n_embd,
        "num_hidden_layers": layout.n_layer,
        "attention_hidden_size": layout.dim_att,
        "head_size": layout.head_size,
        "intermediate_size": layout.dim_ffn,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rescale_every": 6,  # the class halves weights in memory by itself; those in the file are as trained
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _is_rwkv5(names: Sequence[str], facts: Facts) -> bool:
    parts = (".attention.time_mix_gate", ".attention.time_faaaa", ".attention.gate.", ".attention.ln_x.")
    return not _is_rwkv6(names, facts) and any(n.startswith("rwkv.") and any(p in n for p in parts) for n in names)


def _is_rwkv6(names: Sequence[str], facts: Facts) -> bool:
    return any(n.startswith("rwkv.blocks.") and (".time_maa_" in n or ".time_decay_w" in n) for n in names)


def _notes(layout: Layout) -> list[str]:
    notes = ["The modelling code of the World repositories is not written: copy it from the repository of your model."]
    ranks = (64, 128) if layout.n_embd == 4096 else (32, 64)
    if layout.version == "6.0" and (layout.ranks["maa"], layout.ranks["decay"]) != ranks:
        notes.append(
            f"That code expects low-rank dimensions of {ranks[0]} and {ranks[1]} at {layout.n_embd} channels; this "
            f"model has {layout.ranks['maa']} and {layout.ranks['decay']}."
        )
    return notes


def _use(version: str) -> str:
    return f"""
from modeling_rwkv{version} import Rwkv{version}ForCausalLM  # of such a repository: its .py files beside your script
model = Rwkv{version}ForCausalLM.from_pretrained("{{path}}")
# from rwkv_lab import RWKV_Dual; RWKV_Dual.from_pretrained("{{path}}") needs no other code
"""


register_foreign_format(
    ForeignFormat(
        name="world-rwkv5",
        described="a folder as the RWKV-5 World repositories",
        target="world",
        versions=("5.2",),
        rows=RWKV5_ROWS,
        recognise=_is_rwkv5,
        dropped={"blocks.{i}.att.time_state": _STATE},
        state_rows=STATE_ROWS,
        config=_config,
        notes=_notes,
        read_by="the modelling code of the World repositories",
        use=_use("5"),
    )
)
register_foreign_format(
    ForeignFormat(
        name="world-rwkv6",
        described="a folder as the RWKV-6 World repositories",
        target="world",
        versions=("6.0",),
        rows=RWKV6_ROWS,
        recognise=_is_rwkv6,
        dropped={"blocks.{i}.att.time_state": _STATE},
        state_rows=STATE_ROWS,
        config=_config,
        notes=_notes,
        read_by="the modelling code of the World repositories",
        use=_use("6"),
    )
)
