"""RWKV-5, 6 and 7 as a folder with modelling code of its own, which transformers loads by `trust_remote_code=True`.

Tensors keep BlinkDL's names and shapes; the code is `rwkv_lab/convert/written/modeling_rwkv*.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from rwkv_lab.checkpoint.dimensions import Layout
from rwkv_lab.checkpoint.foreign_format import GROUP_NORM_EPS, Facts, ForeignFormat, Row, register_foreign_format
from rwkv_lab.lazy_torch import torch

_AROUND = (
    "emb.weight",
    "blocks.0.ln0.weight",
    "blocks.0.ln0.bias",
    "ln_out.weight",
    "ln_out.bias",
    "head.weight",
)
_IN_ALL = (
    "ln1.weight",
    "ln1.bias",
    "ln2.weight",
    "ln2.bias",
    "att.receptance.weight",
    "att.key.weight",
    "att.value.weight",
    "att.output.weight",
    "att.ln_x.weight",
    "att.ln_x.bias",
    "att.time_state",
    "ffn.key.weight",
    "ffn.value.weight",
)
_OF_5 = (
    "att.time_decay",
    "att.time_first",
    "att.time_faaaa",
    "att.time_mix_k",
    "att.time_mix_v",
    "att.time_mix_r",
    "att.time_mix_g",
    "att.gate.weight",
    "ffn.time_mix_k",
    "ffn.time_mix_r",
    "ffn.receptance.weight",
)
_OF_6 = (
    "att.time_maa_x",
    "att.time_maa_w",
    "att.time_maa_k",
    "att.time_maa_v",
    "att.time_maa_r",
    "att.time_maa_g",
    "att.time_maa_w1",
    "att.time_maa_w2",
    "att.time_decay",
    "att.time_decay_w1",
    "att.time_decay_w2",
    "att.time_faaaa",
    "att.gate.weight",
    "ffn.time_maa_k",
    "ffn.time_maa_r",
    "ffn.receptance.weight",
)
_OF_7 = (
    *(f"att.x_{z}" for z in "rwkvag"),
    *(f"att.{z}{i}" for z in "wav" for i in "012"),
    *("att.g1", "att.g2", "att.k_k", "att.k_a", "att.r_k", "ffn.x_k"),
)
_UNUSED = "layer 0 makes what v0, v1 and v2 would mix in: nothing reads them there"


def _rows(names: Collection[str]) -> tuple[Row, ...]:
    return tuple(Row(n, n) for n in (*_AROUND, *(f"blocks.{{i}}.{name}" for name in (*_IN_ALL, *names))))


def _config(layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    major = layout.version[0]
    code = f"modeling_rwkv{major}"
    return {
        "model_type": f"rwkv{major}_plain",
        "architectures": [f"Rwkv{major}PlainForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{code}.Rwkv{major}PlainConfig",
            "AutoModelForCausalLM": f"{code}.Rwkv{major}PlainForCausalLM",
        },
        "version": layout.version,
        "vocab_size": layout.vocab_size,
        "hidden_size": layout.n_embd,
        "num_hidden_layers": layout.n_layer,
        "attention_hidden_size": layout.dim_att,
        "num_attention_heads": layout.n_head,
        "head_size": layout.head_size,
        "intermediate_size": layout.dim_ffn,
        "ranks": {"v": 1} | dict(layout.ranks) if major == "7" else dict(layout.ranks),  # one layer has no v
        GROUP_NORM_EPS: 64e-5,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _details(names: Collection[str]) -> dict[str, Any]:
    bonus = "time_first" if any(n.endswith(".time_first") for n in names) else "time_faaaa"
    return {"bonus_name": bonus, "tuned_state": any(n.endswith(".time_state") for n in names)}


def _recognise(major: str) -> Callable[[Sequence[str], Facts], bool]:
    """By the configuration: the names are BlinkDL's."""
    return lambda names, facts: facts.config.get("model_type") == f"rwkv{major}_plain"


_USE = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{path}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{path}", trust_remote_code=True)
"""

for _major, _versions, _names in (("5", ("5.0", "5.1", "5.2"), _OF_5), ("6", ("6.0",), _OF_6), ("7", ("7.0",), _OF_7)):
    register_foreign_format(
        ForeignFormat(
            name=f"transformers-rwkv{_major}",
            described=f"a folder for transformers with code of its own, RWKV-{_major}",
            target="transformers",
            versions=_versions,
            rows=_rows(_names),
            recognise=_recognise(_major),
            dropped={f"blocks.0.att.v{i}": _UNUSED for i in "012"} if _major == "7" else {},
            config=_config,
            details=_details,
            code=("modeling_rwkv_base.py", f"modeling_rwkv{_major}.py"),
            read_by="transformers",
            use=_USE,
        )
    )
