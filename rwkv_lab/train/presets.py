"""Settings of a training by the size of its model.

Sources, as published with the trainers:

* pretrain: 6e-4 for 0.1B (12 layers of 768), 4e-4 for 0.4B (24 of 1024), 3e-4 for 1.5B (24 of 2048), the notes on
  --lr_init in RWKV-LM's train.py (RWKV-v4neo), which forks for later generations keep; 16 sequences of 512 tokens, its
  demo-training-run.sh (RWKV-v7/train_temp). For larger models they say "smaller", and no number: 1.5e-4 is a value to
  start from, and a plan says so.
* full: 1e-5, from the notes in the same script, and the examples of fine-tuning 1.5B in train.py.
* lora: 1e-4, rank 8 with alpha 16 for 0.4B, RWKV-LM-LoRA; rank 64 with alpha 128 for 7B, RWKV-PEFT.
* pissa: 2e-5, rank 32 for 2.9B, 8 sequences of 512 tokens, 1000 steps, RWKV-PEFT's run_pissa.sh; miss is taken like it.
* state: 1, which falls to 0.01, 512 tokens, RWKV-LM and RWKV-PEFT.

What a source states for one size alone is taken for those beside it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rwkv_lab.checkpoint import expected_tensors, open_checkpoint

BY_SIZE = "auto"


START_VALUE = (
    "Its lr is a value to start from: RWKV-LM states 6e-4, 4e-4 and 3e-4 for pretraining 0.1B, 0.4B and 1.5B, and of "
    "larger models only that they take less."
)


@dataclass(frozen=True)
class Preset:
    """Settings of one size.

    most: values (parameters) of the largest model that is taken for this size.
    """

    most: float
    pretrain_lr: float
    rank: int
    guessed: bool = False  # pretrain_lr has no source


PRESETS = {
    "0.1B": Preset(2.8e8, 6e-4, 8),
    "0.4B": Preset(8e8, 4e-4, 8),
    "1.5B": Preset(2.2e9, 3e-4, 32),
    "2.9B": Preset(4.5e9, 1.5e-4, 32, guessed=True),
    "7B": Preset(1e10, 1.5e-4, 64, guessed=True),
}
_SMALLEST = 5e7  # values; no smaller model is published; the kind's own numbers suit them
_BYTES, _WORLD = 257, 65536  # tokens
_LR = {"full": 1e-5, "lora": 1e-4, "pissa": 2e-5, "miss": 2e-5, "state": 1.0}


def preset_names() -> tuple[str, ...]:
    """What `preset` may be: nothing, by the model's size, or a size."""
    return "", BY_SIZE, *PRESETS


def preset_settings(options: Mapping[str, Any], takes_rank: bool) -> tuple[str, Mapping[str, float]]:
    """(the size, what its preset sets); ("", nothing) without a preset, and where a model is smaller than all.

    Args:
        options: those of `TrainSpec`.
        takes_rank: the kind of training has a rank.
    Raises:
        RwkvLabError: of the base, whose header tells its size.
    """
    name = _by_size(options) if options["preset"] == BY_SIZE else options["preset"]
    if not name:
        return "", {}
    kind, preset = options["kind"], PRESETS[name]
    found = {"ctx_len": 512, "batch_size": 16 if kind == "pretrain" else 8}
    rate = preset.pretrain_lr if kind == "pretrain" else _LR.get(kind, _LR["lora"])
    steps = {} if kind == "pretrain" else {"steps": 1000}
    return name, found | steps | {"lr": rate} | ({"rank": preset.rank} if takes_rank else {})


def _by_size(options: Mapping[str, Any]) -> str:
    if options["base"]:
        with open_checkpoint(options["base"]) as ck:
            values = sum(t.numel for t in ck.info.values())
    else:
        from rwkv_lab.model.rwkv7 import fresh_layout  # brings torch, which refusing wrong options need not wait for

        vocabulary = _BYTES if options["tokenizer"] in ("", "bytes") else _WORLD  # about, of other tokenizers
        layout = fresh_layout(options["n_embd"], options["n_layer"], vocabulary, options["head_size"])
        shapes = expected_tensors(layout)[0]
        values = sum(math.prod(shape) for shape in shapes.values())
    if values < _SMALLEST:
        return ""
    return next((name for name, preset in PRESETS.items() if values <= preset.most), list(PRESETS)[-1])
