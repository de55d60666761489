"""RWKV-6 in the layout of flash-linear-attention (model_type "rwkv6").

Low-rank pairs lie transposed there, and the five mixes in the order r, w, k, v, g; BlinkDL's is w, k, v, r, g.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rwkv_lab.checkpoint.dimensions import Layout
from rwkv_lab.checkpoint.foreign_format import (
    FLAT,
    GROUP_NORM_EPS,
    TRANSPOSED,
    Facts,
    ForeignFormat,
    Place,
    Row,
    Transform,
    recorded_eps,
    register_foreign_format,
    stacked,
)
from rwkv_lab.lazy_torch import torch

_THEIRS = [3, 0, 1, 2, 4]  # where r, w, k, v, g stand in w, k, v, r, g
_OURS = [1, 2, 3, 0, 4]  # where w, k, v, r, g stand in r, w, k, v, g


def _w1(ours: Sequence[torch.Tensor], at: Place) -> torch.Tensor:
    """[C, 5 D] -> [5 D, C]"""
    C = ours[0].shape[0]
    return ours[0].reshape(C, 5, -1)[:, _THEIRS].reshape(C, -1).t()


def _w1_back(theirs: torch.Tensor, at: Place) -> list[torch.Tensor]:
    C = theirs.shape[1]
    return [theirs.t().reshape(C, 5, -1)[:, _OURS].reshape(C, -1)]


def _w2(ours: Sequence[torch.Tensor], at: Place) -> torch.Tensor:
    """[5, D, C] -> [C, 5 D]"""
    return ours[0][_THEIRS].reshape(-1, ours[0].shape[2]).t()


def _w2_back(theirs: torch.Tensor, at: Place) -> list[torch.Tensor]:
    return [theirs.t().reshape(5, -1, theirs.shape[0])[_OURS]]


REORDERED_W1 = Transform("its five parts reordered, then transposed", _w1, _w1_back)
REORDERED_W2 = Transform("its five parts reordered, one beside the other, then transposed", _w2, _w2_back)
STACKED = Transform(
    "five vectors in one tensor [5, C]",
    lambda ours, at: stacked(ours, (ours[0].numel(),)),
    lambda theirs, at: [x.reshape(1, 1, -1) for x in theirs.unbind(0)],
)
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
    Row("blocks.{i}.att.time_maa_x", "model.layers.{i}.attn.x_proj.0.mu", FLAT),
    Row("blocks.{i}.att.time_maa_w1", "model.layers.{i}.attn.x_proj.0.linear.weight", REORDERED_W1),
    Row("blocks.{i}.att.time_maa_w2", "model.layers.{i}.attn.x_proj.2.weight", REORDERED_W2),
    Row(tuple(f"blocks.{{i}}.att.time_maa_{z}" for z in "rwkvg"), "model.layers.{i}.attn.x_bias", STACKED),
    Row("blocks.{i}.att.time_decay", "model.layers.{i}.attn.w_proj.linear.lora.2.bias", FLAT),
    Row("blocks.{i}.att.time_decay_w1", "model.layers.{i}.attn.w_proj.linear.lora.0.weight", TRANSPOSED),
    Row("blocks.{i}.att.time_decay_w2", "model.layers.{i}.attn.w_proj.linear.lora.2.weight", TRANSPOSED),
    Row("blocks.{i}.att.time_faaaa", "model.layers.{i}.attn.bonus"),
    Row("blocks.{i}.att.receptance.weight", "model.layers.{i}.attn.r_proj.linear.weight"),
    Row("blocks.{i}.att.key.weight", "model.layers.{i}.attn.k_proj.linear.weight"),
    Row("blocks.{i}.att.value.weight", "model.layers.{i}.attn.v_proj.linear.weight"),
    Row("blocks.{i}.att.gate.weight", "model.layers.{i}.attn.g_proj.linear.weight"),
    Row("blocks.{i}.att.output.weight", "model.layers.{i}.attn.o_proj.weight"),
    Row("blocks.{i}.att.ln_x.weight", "model.layers.{i}.attn.g_norm.weight"),
    Row("blocks.{i}.att.ln_x.bias", "model.layers.{i}.attn.g_norm.bias"),
    Row("blocks.{i}.ffn.time_maa_k", "model.layers.{i}.ffn.key.mu", FLAT),
    Row("blocks.{i}.ffn.time_maa_r", "model.layers.{i}.ffn.receptance.mu", FLAT),
    Row("blocks.{i}.ffn.key.weight", "model.layers.{i}.ffn.key.linear.weight"),
    Row("blocks.{i}.ffn.receptance.weight", "model.layers.{i}.ffn.receptance.linear.weight"),
    Row("blocks.{i}.ffn.value.weight", "model.layers.{i}.ffn.value.weight"),
)

# A state for `past_key_values`, of one sequence: [H, K, V], where a tuned state is [H, V, K].
STATE_ROWS = (Row("blocks.{i}.att.time_state", "layers.{i}.recurrent_state", TRANSPOSED),)

STATE = "fla starts from zeros, and takes a state as past_key_values: convert to fla, a file state.safetensors"


def _config(layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "model_type": "rwkv6",
        "architectures": ["RWKV6ForCausalLM"],
        "attn_mode": "chunk",
        "vocab_size": layout.vocab_size,
        "hidden_size": layout.n_embd,
        "num_hidden_layers": layout.n_layer,
        "num_heads": layout.n_head,
        "expand_k": layout.dim_att / layout.n_embd,
        "expand_v": layout.dim_att / layout.n_embd,
        "intermediate_size": layout.dim_ffn,
        "hidden_ratio": layout.dim_ffn / layout.n_embd,
        "proj_low_rank_dim": layout.ranks["maa"],
        "gate_low_rank_dim": layout.ranks["decay"],
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        GROUP_NORM_EPS: 64e-5,  # of the norm over heads in BlinkDL's code
        "fuse_norm": False,
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _recognise(names: Sequence[str], facts: Facts) -> bool:
    parts = (".attn.x_proj.", ".attn.x_bias", ".attn.w_proj.", ".attn.bonus")
    return any(name.startswith("model.layers.") and any(part in name for part in parts) for name in names)


def _group_norm_eps(facts: Facts, head_size: int) -> float | None:
    """Their rule, unless the folder records what the weights were trained with."""
    recorded, norm_eps = recorded_eps(facts, head_size), facts.config.get("norm_eps")
    return float(norm_eps) if recorded is None and isinstance(norm_eps, int | float) else recorded


def _notes(layout: Layout) -> list[str]:
    return [
        "The norm over heads: fla takes eps = norm_eps, 1e-05; BlinkDL's code takes 0.00064. Its logits are those of "
        "group_norm_eps=1e-05, unless you set eps of every g_norm after loading."
    ]


_USE = """
from fla.models import RWKV6ForCausalLM
from transformers import AutoTokenizer
model = RWKV6ForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}", trust_remote_code=True)
"""

register_foreign_format(
    ForeignFormat(
        name="fla-rwkv6",
        described="a folder in the layout of flash-linear-attention, RWKV-6",
        target="fla",
        versions=("6.0",),
        rows=ROWS,
        recognise=_recognise,
        dropped={"blocks.{i}.att.time_state": STATE},
        state_rows=STATE_ROWS,
        config=_config,
        read_by="flash-linear-attention",
        use=_USE,
        group_norm_eps=_group_norm_eps,
        notes=_notes,
    )
)
