"""Training of all weights: of a fresh model or one that is there ("pretrain"), and of one that is there ("full")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rwkv_lab import model as models
from rwkv_lab.checkpoint import Layout, write_checkpoint
from rwkv_lab.checkpoint.layout import UNUSED_IN_LAYER_0
from rwkv_lab.lazy_torch import torch
from rwkv_lab.tokenizer import WorldTokenizer, load_tokenizer
from rwkv_lab.train.spec import Defaults, Kind, Planned, TrainSpec, register

_BYTES = 257  # and the end of a text
_WORLD = 65536  # as all World models have it, a few more than there are tokens


def fresh_vocabulary(spec: TrainSpec) -> int:
    """The size of a fresh model's vocabulary: that of the tokenizer.

    Raises:
        RwkvLabError: of the tokenizer.
    """
    if spec.tokenizer in ("", "bytes"):
        return _BYTES
    tokenizer = load_tokenizer(spec.tokenizer)
    return _WORLD if isinstance(tokenizer, WorldTokenizer) else tokenizer.vocab_size


class WholeModel(Kind):
    """Everything is trained, and the output is the whole model."""

    output_kind = "model"

    def __init__(self, name: str, defaults: Defaults, needs_base: bool):
        self.name, self.defaults, self.needs_base = name, defaults, needs_base

    def make_model(self, spec: TrainSpec) -> models.RWKV_Dual:
        if spec.base:
            model = models.RWKV_Dual.from_pretrained(spec.base, dtype=spec.torch_dtype, device=spec.device)
        else:
            model = models.RWKV_Dual(
                spec.n_embd, spec.n_layer, vocab_size=fresh_vocabulary(spec), head_size=spec.head_size
            )
            model = model.to(torch.device(spec.device), spec.torch_dtype)
        self.mark_trained(model)
        return model

    def planned(self, spec: TrainSpec, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> list[Planned]:
        return [(name, shape, math.prod(shape)) for name, shape in shapes.items() if name not in UNUSED_IN_LAYER_0]

    def mark_trained(self, model: models.RWKV_Dual) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in UNUSED_IN_LAYER_0)

    def save(self, model: models.RWKV_Dual, out: Path, note: Mapping[str, str], overwrite: bool) -> None:
        write_checkpoint(out, model.state_dict(), metadata=note, overwrite=overwrite)

    def open(self, spec: TrainSpec, out: Path) -> models.RWKV_Dual:
        return models.RWKV_Dual.from_pretrained(out, dtype=spec.torch_dtype, device=spec.device)


register(
    WholeModel(
        "pretrain",
        Defaults("english", steps=800, batch_size=4, ctx_len=256, lr=3e-3, final_lr=0.02, weight_decay=0.1),
        needs_base=False,
    )
)
register(
    WholeModel(
        "full",
        Defaults("python", steps=200, batch_size=8, ctx_len=128, lr=1e-3, final_lr=0.02, weight_decay=0.1),
        needs_base=True,
    )
)
