"""Checks what a training wrote, from the files alone: opened again, measured again, and its inputs with it."""

from __future__ import annotations

from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import file_facts, open_checkpoint
from rwkv_lab.checks import Check
from rwkv_lab.lazy_torch import torch
from rwkv_lab.train.data import load_corpus
from rwkv_lab.train.held_out import measure_held_out
from rwkv_lab.train.models import open_trained
from rwkv_lab.train.spec import KINDS, TrainSpec
from rwkv_lab.train.trainer import TrainResult

# The same text through the same weights, before they were written and after they were read.
_SAME_BITS = 1e-6


@checked
def verify_training(spec: TrainSpec, result: TrainResult) -> list[Check]:
    """Open what was written, measure it again on held-out text, and compare the inputs with what they were.

    Args:
        spec: what was trained by; what is None in it stands for the kind's own value.
        result: what `train` returned.

    Raises:
        RwkvLabError: the output or the base cannot be opened any more.
    """
    with open_checkpoint(result.out) as written:
        bad = sum(int((~written[name].isfinite()).sum()) for name in written.info)
        names, kind = list(written.info), written.kind
    trained = KINDS[result.kind]
    expected = trained.output_kind
    checks = [Check("kind of the output", kind, expected, kind in (expected, "lora")), *trained.output_checks(names)]
    again = measure_again(spec, result.out)
    apart = abs(again - result.bits_after)
    changed = sum(file_facts(before.path).fingerprint != before.fingerprint for before in result.inputs)
    reopened = "bits per byte of the re-opened output: difference from the end of training"
    fewer = "bits per byte of held-out text: fewer than before"
    return [
        *checks,
        Check("values in the output that are NaN or Inf", bad, 0, bad == 0),
        Check(reopened, apart, _SAME_BITS, apart <= _SAME_BITS),
        Check(fewer, again, result.bits_before, again < result.bits_before),
        Check("inputs that changed while training", changed, 0, changed == 0),
    ]


@checked
def measure_again(spec: TrainSpec, out: str | Path) -> float:
    """Bits per byte of held-out text of a trained output, as training measures it at its end.

    Raises:
        RwkvLabError: the output or the base cannot be opened, or there is no such text.
    """
    data, ctx_len = spec.effective("data"), spec.effective("ctx_len")
    model, corpus = open_trained(spec, out), load_corpus(data, spec.ignore, spec.template)
    device, autocast = model.get_device(), spec.autocast_dtype
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        return measure_held_out(model, corpus, ctx_len, spec.long).bits
