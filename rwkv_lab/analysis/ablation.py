"""What held-out text costs with a tuning, without it, and with parts of it ablated."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from rwkv_lab.analysis.texts import STANDARD, AnyCorpus, Reading
from rwkv_lab.analysis.tuned_model import checked_model, set_tensors, why_not_run
from rwkv_lab.analysis.tuning import Tuning, tensor_part
from rwkv_lab.arguments import checked
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKV_Dual, bits_per_byte
from rwkv_lab.names import split_block
from rwkv_lab.train import Measurement, measure_held_out

CTX_LEN = 256  # tokens of each window
_WHAT = "which layers' tuning matters"


@dataclass(frozen=True)
class Ablation:
    """Bits per byte of a text. `layers` and `parts`: with that layer's, or that kind of tensor's, tuning set back to
    the base's and all else tuned. Where nothing could be measured, the last of the checks gives the reason.
    """

    tuned: float = math.nan  # with all of the tuning
    base: float = math.nan  # with none of it
    layers: dict[str, float] = field(default_factory=dict)  # "layer 3" or "outside the layers" -> bits per byte
    parts: dict[str, float] = field(default_factory=dict)  # "att.key" -> bits per byte; empty where there is one only
    checks: list[Check | NotApplicable] = field(default_factory=list)
    with_tuning: Measurement | None = None  # of all that is held out of the data that was given
    without: Measurement | None = None  # the same with the base

    @property
    def measured(self) -> bool:
        return not math.isnan(self.tuned)


@checked
@torch.no_grad()
def measure_ablation(
    tuning: Tuning,
    names: Sequence[str],
    text: bytes,
    ctx_len: int = CTX_LEN,
    reading: Reading = STANDARD,
    corpus: AnyCorpus | None = None,
) -> Ablation:
    """Bits per byte with everything, with nothing, and without each layer's and each kind of tensor's tuning.

    Args:
        names: the changed tensors to ablate, of `tuning.names()`; the others stay tuned.
        text: nothing that was trained on, such as `rwkv_lab.analysis.texts.held_out_excerpts`.
        ctx_len: tokens of each window, which starts from a fresh state.
        reading: whose tokenizer is used, and how `corpus` is measured.
        corpus: what is measured too, whole, with all of the tuning and with none of it.
    """
    if reason := why_not_run(tuning):
        return Ablation(checks=[NotApplicable(_WHAT, reason)])
    model, same = checked_model(tuning)
    checks: list[Check | NotApplicable] = [same]
    measure = lambda: corpus and measure_held_out(model, corpus, reading.window, most=reading.most)  # noqa: E731
    try:
        reading.name_tokenizer(model)
        tuned, whole = bits_per_byte(model, text, ctx_len), measure()
    except ParameterError as e:  # the vocabulary does not tell its tokenizer
        return Ablation(checks=[*checks, NotApplicable(_WHAT, reading.why_unread(model, e))])
    layers, parts = (_without(model, tuning, groups, text, ctx_len) for groups in (_by_layer(names), _by_part(names)))
    again = bits_per_byte(model, text, ctx_len)
    name = "bits per byte with all parts put back: difference from before the ablation"
    checks.append(Check(name, again - tuned, 0, again == tuned))
    set_tensors(model, tuning.names(), tuning.before)
    return Ablation(tuned, bits_per_byte(model, text, ctx_len), layers, parts, checks, whole, measure())


def _without(
    model: RWKV_Dual, tuning: Tuning, groups: Mapping[str, Sequence[str]], text: bytes, ctx_len: int
) -> dict[str, float]:
    found = {}
    for label, group in groups.items():
        set_tensors(model, group, tuning.before)
        found[label] = bits_per_byte(model, text, ctx_len)
        set_tensors(model, group, tuning.after)
    return found


def _by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=_layer):
        layer = _layer(name)
        groups.setdefault("outside the layers" if layer == math.inf else f"layer {layer}", []).append(name)
    return groups


def _by_part(names: Iterable[str]) -> dict[str, list[str]]:
    """Nothing where there is one kind only: to ablate it is to ablate everything."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(tensor_part(name), []).append(name)
    return groups if len(groups) > 1 else {}


def _layer(name: str) -> float:
    inside = split_block(name)
    return inside[0] if inside else math.inf
