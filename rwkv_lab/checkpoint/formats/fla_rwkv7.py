"""RWKV-7 in the layout of flash-linear-attention (model_type "rwkv7"), which rwkv7-hf reads too.

Low-rank pairs lie transposed there, as weights of linear layers; vectors lose their leading ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rwkv_lab.checkpoint.dimensions import Layout
from rwkv_lab.checkpoint.foreign_format import (
    FLAT,
    GROUP_NORM_EPS,
    TRANSPOSED,
    Facts,
    ForeignFormat,
    Row,
    Transform,
    recorded_eps,
    register_foreign_format,
    stacked,
)
from rwkv_lab.lazy_torch import torch

ROWS = (
    Row("emb.weight", "model.embeddings.weight"),
    Row("blocks.0.ln0.weight", "model.layers.0.pre_norm.weight"),
    Row("blocks.0.ln0.bias", "model.layers.0.pre_norm.bias"),
    Row("ln_out.weight", "model.norm.weight"),
    Row("ln_out.bias", "model.norm.bias"),
    Row("head.weight", "lm_head.weight"),
    Row("blocks.{i}.ln1.weight", "model.layers.{i}.attn_norm.weight"),
    Row("blocks.{i}.ln1.bias", "model.layers.{i}.attn_norm.bias"),
    Row("blocks.{i}.ln2.weight", "model.layers.{i}.ffn_norm.weight"),
    Row("blocks.{i}.ln2.bias", "model.layers.{i}.ffn_norm.bias"),
    Row("blocks.{i}.att.x_r", "model.layers.{i}.attn.x_r"),
    Row("blocks.{i}.att.x_w", "model.layers.{i}.attn.x_w"),
    Row("blocks.{i}.att.x_k", "model.layers.{i}.attn.x_k"),
    Row("blocks.{i}.att.x_v", "model.layers.{i}.attn.x_v"),
    Row("blocks.{i}.att.x_a", "model.layers.{i}.attn.x_a"),
    Row("blocks.{i}.att.x_g", "model.layers.{i}.attn.x_g"),
    Row("blocks.{i}.att.w0", "model.layers.{i}.attn.w_lora.lora.2.bias", FLAT),
    Row("blocks.{i}.att.w1", "model.layers.{i}.attn.w_lora.lora.0.weight", TRANSPOSED),
    Row("blocks.{i}.att.w2", "model.layers.{i}.attn.w_lora.lora.2.weight", TRANSPOSED),
    Row("blocks.{i}.att.a0", "model.layers.{i}.attn.a_lora.lora.2.bias", FLAT),
    Row("blocks.{i}.att.a1", "model.layers.{i}.attn.a_lora.lora.0.weight", TRANSPOSED),
    Row("blocks.{i}.att.a2", "model.layers.{i}.attn.a_lora.lora.2.weight", TRANSPOSED),
    Row("blocks.{i}.att.v0", "model.layers.{i}.attn.v_lora.lora.2.bias", FLAT),
    Row("blocks.{i}.att.v1", "model.layers.{i}.attn.v_lora.lora.0.weight", TRANSPOSED),
    Row("blocks.{i}.att.v2", "model.layers.{i}.attn.v_lora.lora.2.weight", TRANSPOSED),
    Row("blocks.{i}.att.g1", "model.layers.{i}.attn.g_lora.lora.0.weight", TRANSPOSED),
    Row("blocks.{i}.att.g2", "model.layers.{i}.attn.g_lora.lora.2.weight", TRANSPOSED),
    Row("blocks.{i}.att.k_k", "model.layers.{i}.attn.k_k", FLAT),
    Row("blocks.{i}.att.k_a", "model.layers.{i}.attn.k_a", FLAT),
    Row("blocks.{i}.att.r_k", "model.layers.{i}.attn.r_k"),
    Row("blocks.{i}.att.receptance.weight", "model.layers.{i}.attn.r_proj.weight"),
    Row("blocks.{i}.att.key.weight", "model.layers.{i}.attn.k_proj.weight"),
    Row("blocks.{i}.att.value.weight", "model.layers.{i}.attn.v_proj.weight"),
    Row("blocks.{i}.att.output.weight", "model.layers.{i}.attn.o_proj.weight"),
    Row("blocks.{i}.att.ln_x.weight", "model.layers.{i}.attn.g_norm.weight"),
    Row("blocks.{i}.att.ln_x.bias", "model.layers.{i}.attn.g_norm.bias"),
    Row("blocks.{i}.ffn.x_k", "model.layers.{i}.ffn.x_k", FLAT),
    Row("blocks.{i}.ffn.key.weight", "model.layers.{i}.ffn.key.weight"),
    Row("blocks.{i}.ffn.value.weight", "model.layers.{i}.ffn.value.weight"),
)
# Before 2025 the six token shifts lay in one tensor.
OLDER = (
    Row(
        tuple(f"blocks.{{i}}.att.x_{z}" for z in "rwkvag"),
        "model.layers.{i}.attn.x_x",
        Transform(
            "six vectors in one tensor [6, …]",
            lambda ours, at: stacked(ours, (ours[0].numel(),)),
            lambda theirs, at: [x.reshape(1, 1, -1) for x in theirs.unbind(0)],
        ),
    ),
)
# A state for `past_key_values`, of one sequence: [H, K, V], where a tuned state is [H, V, K].
STATE_ROWS = (Row("blocks.{i}.att.time_state", "layers.{i}.recurrent_state", TRANSPOSED),)
STATE = "its readers start from zeros, and take a state as past_key_values: convert to fla, a file state.safetensors"
UNUSED = "layer 0 makes what v0, v1 and v2 would mix in: nothing reads them there"
_MARK = re.compile(r"model\.layers\.\d+\.attn\.(([wavg]_lora\.lora\.[02]\.(weight|bias))|k_k|k_a|r_k|x_x|x_[rwkvag])")


def _config(layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    ranks = layout.ranks
    return {
        "model_type": "rwkv7",
        "architectures": ["RWKV7ForCausalLM"],
        "vocab_size": layout.vocab_size,
        "hidden_size": layout.n_embd,
        "num_hidden_layers": layout.n_layer,
        "num_heads": layout.n_head,
        "num_attention_heads": layout.n_head,
        "head_dim": layout.head_size,
        "attention_hidden_size": layout.dim_att,
        "value_dim": [layout.dim_att] * layout.n_layer,
        "intermediate_size": layout.dim_ffn,
        "hidden_ratio": layout.dim_ffn / layout.n_embd,
        "decay_low_rank_dim": ranks["w"],
        "a_low_rank_dim": ranks["a"],
        "v_low_rank_dim": ranks.get("v", 32),  # one layer has no v; the class still asks for a number
        "gate_low_rank_dim": ranks["g"],
        "norm_eps": 1e-5,
        GROUP_NORM_EPS: 64e-5,  # of the norm over heads in BlinkDL's code, at any head size
        "norm_bias": True,
        "hidden_act": "sqrelu",
        "fuse_norm": False,  # the fused norm adds 1e-6 under the root, the checkpoint's formula does not
        "attn_mode": "chunk",
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _group_norm_eps(facts: Facts, head_size: int) -> float | None:
    """Their rule, unless the folder records what the weights were trained with."""
    recorded, norm_eps = recorded_eps(facts, head_size), facts.config.get("norm_eps")
    return head_size * float(norm_eps) if recorded is None and isinstance(norm_eps, int | float) else recorded


def _notes(layout: Layout) -> list[str]:
    notes = []
    if layout.dim_att != layout.n_embd or layout.n_layer == 1:
        size = "one layer" if layout.n_layer == 1 else f"{layout.dim_att} attention channels beside {layout.n_embd}"
        notes.append(f"flash-linear-attention itself (seen in 0.6.0) fails on a model of {size}; rwkv7-hf takes it.")
    if layout.head_size == 64:
        return notes
    eps = layout.head_size * 1e-5
    return notes + [
        f"The norm over heads: its readers take eps = head_dim x norm_eps, {eps:.3g} at {layout.head_size} channels, "
        f"BlinkDL's code 0.00064 at any. Their logits are those of group_norm_eps={eps:.3g}, unless you set "
        "layer.attn.g_norm.eps = 0.00064 for every layer of model.model.layers after loading."
    ]


def _recognise(names: Sequence[str], facts: Facts) -> bool:
    return any(_MARK.match(name) for name in names)


_USE = """
from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM  # or from fla.models, on a GPU
from transformers import AutoTokenizer
model = RWKV7ForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}", trust_remote_code=True)
"""

register_foreign_format(
    ForeignFormat(
        name="fla-rwkv7",
        described="a folder in the layout of flash-linear-attention, RWKV-7",
        target="fla",
        versions=("7.0",),
        rows=ROWS,
        recognise=_recognise,
        dropped={
            **{f"blocks.0.att.{name}": UNUSED for name in ("v0", "v1", "v2")},
            "blocks.{i}.att.time_state": STATE,
        },
        group_norm_eps=_group_norm_eps,
        notes=_notes,
        older=OLDER,
        state_rows=STATE_ROWS,
        config=_config,
        read_by="rwkv7-hf, flash-linear-attention",
        use=_USE,
    )
)
