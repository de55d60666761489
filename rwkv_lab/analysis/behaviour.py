"""What a merged model does, beside its base, and beside its inputs loaded one by one."""

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from rwkv_lab.analysis.texts import fixed_tokens, held_out_text
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import LayoutError
from rwkv_lab.machine import memory_free
from rwkv_lab.merge import MergeResult
from rwkv_lab.model import RWKV_Dual, bits_per_byte
from rwkv_lab.progress import human_bytes
from rwkv_lab.samples import Sample
from rwkv_lab.train import CORPORA

HELD_OUT = 4096  # bytes of each text that are scored
CTX_LEN = 256  # bytes of each window
_SAMPLE = 100  # tokens
_PROMPTS = ("The ", "def ")
_RUNS = "the merged model runs: logits that are NaN or Inf"
_SAME = "the merged model answers as its inputs do when they are loaded one by one"


@dataclass(frozen=True)
class Behaviour:
    """What was measured. Empty, with the reason among the checks, where the models cannot be run here."""

    bits: dict[str, dict[str, float]] = field(default_factory=dict)  # text -> model -> bits per byte, held out
    samples: list[Sample] = field(default_factory=list)
    checks: list[Check | NotApplicable] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """In a sentence, on which texts the merged model is better than its base, and on which worse; or ""."""
        parts = []
        for text, of in self.bits.items():
            base, merged = of["base"], of["merged"]
            share = f"{abs(merged / base - 1):.1%} {'better' if merged < base else 'worse'}"
            parts.append(f"{text} {base:.3f} to {merged:.3f}, {share if merged != base else 'the same'}")
        return f"Bits per byte of held-out text, base to merged: {'; '.join(parts)}." if parts else ""


@dataclass(frozen=True)
class _Outputs:
    logits: torch.Tensor  # [64, V] float32, after each of 64 fixed tokens
    bits: dict[str, float]  # text -> bits per byte; empty unless tokens are bytes
    samples: list[str]  # one per prompt; empty unless tokens are bytes


def compare_behaviour(result: MergeResult, texts: Mapping[str, bytes] | None = None) -> Behaviour:
    """Run the base, the merged file, and where there is one, an unmerged counterpart of it, one after the other.

    The counterpart of a merged state is the base with the state file loaded beside it; of a whole fine-tune, that
    file itself. Both must give the same logits and bits per byte as the merged file, to the last bit.

    A merged model that does not load is a check that failed; a base that does not load says nothing of the merge.

    Args:
        result: of a merge that wrote its output. Inputs and output are opened again.
        texts: name -> what is scored, where tokens are bytes; None for the beginnings of what all corpora hold out.
    """
    needed, free = 4 * sum(math.prod(r.shape) for r in result.plan.rows), memory_free()  # a model in float32
    if needed > free:
        return _not_measured(f"it needs {human_bytes(needed)} of memory, {human_bytes(free)} are free")
    beyond = _why_not_run(result)
    if beyond:
        return _not_measured(beyond)
    bytewise = result.plan.layout.vocab_size in (256, 257)
    if not bytewise:
        texts = {}
    elif texts is None:
        texts = {name: held_out_text(name)[:HELD_OUT] for name in CORPORA}
    try:
        base = _outputs(RWKV_Dual.from_pretrained(result.base), texts)
    except LayoutError as e:
        return _not_measured(f"the base does not run here: {e}")
    try:
        merged = _outputs(RWKV_Dual.from_pretrained(result.out), texts)
    except LayoutError as e:
        return Behaviour(checks=[Check(_RUNS, str(e), 0, False), NotApplicable(_SAME, "the merged model does not run")])
    bad = int((~merged.logits.isfinite()).sum())
    if bad and result.recipe["allow_nonfinite"]:
        return _not_measured("values that are NaN or Inf were allowed into it")
    checks: list[Check | NotApplicable] = [Check(_RUNS, bad, 0, bad == 0)]
    models = {"base": base, "merged": merged}
    name, why_not = _counterpart(result)
    if name:
        models[name] = _load_counterpart(result, texts)
        checks += _compare(merged, models[name], name)
    else:
        checks.append(NotApplicable(_SAME, why_not))
    return Behaviour(
        bits={text: {model: a.bits[text] for model, a in models.items() if a.bits} for text in base.bits},
        samples=[
            Sample(p, {"base": b, "merged": m}) for p, b, m in zip(_PROMPTS, base.samples, merged.samples, strict=False)
        ],
        checks=checks,
    )


def _why_not_run(result: MergeResult) -> str:
    """What the caller allowed and no model can make sense of; "" if there is nothing of the kind."""
    with open_checkpoint(result.out) as merged:
        extra = merged.identity.misfit.extra if merged.identity.misfit else ()
    if extra:
        return f"it has {len(extra)} tensors that RWKV-{result.plan.layout.version} does not know, such as {extra[0]}"
    return "values that are NaN or Inf were allowed into it" if result.checks[0].value else ""


def _not_measured(reason: str) -> Behaviour:
    return Behaviour(checks=[NotApplicable(_RUNS, reason), NotApplicable(_SAME, reason)])


def _counterpart(result: MergeResult) -> tuple[str, str]:
    """(what to compare the merged file with, "") or ("", why there is nothing)."""
    recipe = result.recipe
    if recipe["dtype"]:
        return "", f"dtype {recipe['dtype']} rounds every tensor"
    if recipe["method"] not in ("state", "overlay") or recipe["alpha"] != 1:
        return "", "the merged values stand in no file that could be loaded instead; their numbers are checked above"
    if result.plan.skipped:
        return "", f"include and exclude keep {len(result.plan.skipped)} tensors of the tuned file out"
    if recipe["method"] == "state":
        return "base + state file", ""
    with open_checkpoint(result.tuned[0]) as tuned:
        if tuned.kind == "model" and set(tuned.info) == {row.name for row in result.plan.rows}:
            return "tuned", ""
    return "", "the tuned file is a part of a model and does not run by itself"


def _load_counterpart(result: MergeResult, texts: Mapping[str, bytes]) -> _Outputs:
    if result.recipe["method"] != "state":
        return _outputs(RWKV_Dual.from_pretrained(result.tuned[0]), texts)
    model = RWKV_Dual.from_pretrained(result.base)
    model.load_state_file(result.tuned[0])
    return _outputs(model, texts)


def _compare(merged: _Outputs, other: _Outputs, name: str) -> list[Check]:
    difference = float((merged.logits - other.logits).abs().max())
    checks = [
        Check(f"logits of 64 fixed tokens, merged against {name}: largest difference", difference, 0, difference == 0)
    ]
    for text, bits in merged.bits.items():
        apart = abs(bits - other.bits[text])
        checks.append(
            Check(f"bits per byte of held-out {text}, merged against {name}: difference", apart, 0, apart == 0)
        )
    return checks


@torch.no_grad()
def _outputs(model: RWKV_Dual, texts: Mapping[str, bytes]) -> _Outputs:
    logits = model.parallel(fixed_tokens(model.layout.vocab_size))[0][0].float()
    bits, samples = {}, []
    if texts and bool(logits.isfinite().all()):
        bits = {text: bits_per_byte(model, held_out, CTX_LEN) for text, held_out in texts.items()}
        samples = [model.generate_with_streaming(p, _SAMPLE, temperature=0.7, top_p=0.9, seed=0) for p in _PROMPTS]
    del model
    gc.collect()  # the next model may need that memory
    return _Outputs(logits, bits, samples)


def describe_texts() -> str:
    """Which texts the bits per byte are of, for a figure or a report."""
    return f"first {HELD_OUT:,} bytes held out of each text, windows of {CTX_LEN} bytes, float32"
