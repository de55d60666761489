"""RWKV-4 as `RwkvForCausalLM` of transformers reads it (model_type "rwkv"). No tensor is changed, only named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rwkv_lab.checkpoint.dimensions import Layout
from rwkv_lab.checkpoint.foreign_format import HALVED, Facts, ForeignFormat, Row, register_foreign_format
from rwkv_lab.lazy_torch import torch

ROWS = (
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
    Row("blocks.{i}.att.time_first", "rwkv.blocks.{i}.attention.time_first"),
    Row("blocks.{i}.att.time_mix_k", "rwkv.blocks.{i}.attention.time_mix_key"),
    Row("blocks.{i}.att.time_mix_v", "rwkv.blocks.{i}.attention.time_mix_value"),
    Row("blocks.{i}.att.time_mix_r", "rwkv.blocks.{i}.attention.time_mix_receptance"),
    Row("blocks.{i}.att.key.weight", "rwkv.blocks.{i}.attention.key.weight"),
    Row("blocks.{i}.att.value.weight", "rwkv.blocks.{i}.attention.value.weight"),
    Row("blocks.{i}.att.receptance.weight", "rwkv.blocks.{i}.attention.receptance.weight"),
    Row("blocks.{i}.att.output.weight", "rwkv.blocks.{i}.attention.output.weight", HALVED),
    Row("blocks.{i}.ffn.time_mix_k", "rwkv.blocks.{i}.feed_forward.time_mix_key"),
    Row("blocks.{i}.ffn.time_mix_r", "rwkv.blocks.{i}.feed_forward.time_mix_receptance"),
    Row("blocks.{i}.ffn.key.weight", "rwkv.blocks.{i}.feed_forward.key.weight"),
    Row("blocks.{i}.ffn.receptance.weight", "rwkv.blocks.{i}.feed_forward.receptance.weight"),
    Row("blocks.{i}.ffn.value.weight", "rwkv.blocks.{i}.feed_forward.value.weight", HALVED),
)


def _recognise(names: Sequence[str], facts: Facts) -> bool:
    parts = (".attention.time_decay", ".attention.time_first", ".attention.time_mix_key", ".attention.key.weight")
    has_heads = any(".attention.ln_x." in n or ".attention.time_faaaa" in n or ".time_maa_" in n for n in names)
    return not has_heads and any(n.startswith("rwkv.blocks.") and n.endswith(parts) for n in names)


def _config(layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "model_type": "rwkv",
        "architectures": ["RwkvForCausalLM"],
        "vocab_size": layout.vocab_size,
        "context_length": 1024,  # bounds one call of their CUDA kernel, not the model
        "hidden_size": layout.n_embd,
        "num_hidden_layers": layout.n_layer,
        "attention_hidden_size": layout.dim_att,
        "intermediate_size": layout.dim_ffn,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
        # In evaluation the class halves weights in memory after so many layers, for float16's range. It costs accuracy,
        # and what is saved afterwards stays halved.
        "rescale_every": 6 if dtype == torch.float16 else 0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _refused(layout: Layout) -> str:
    if layout.dim_att != layout.n_embd:
        return f"its state has n_embd channels everywhere, and dim_att is {layout.dim_att}, n_embd {layout.n_embd}"
    return ""


def _notes(layout: Layout) -> list[str]:
    return [
        "RwkvForCausalLM (seen in transformers 5.24) mixes up several texts that are continued token by token: it "
        "gives logits [B, B, V] there. Generate one text at a time."
    ]


_USE = """
from transformers import AutoTokenizer, RwkvForCausalLM
model = RwkvForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}", trust_remote_code=True)
"""

register_foreign_format(
    ForeignFormat(
        name="transformers-rwkv4",
        described="a folder of transformers' RwkvForCausalLM",
        target="transformers",
        versions=("4.0",),
        rows=ROWS,
        recognise=_recognise,
        config=_config,
        refused=_refused,
        notes=_notes,
        read_by="transformers",
        use=_USE,
    )
)
