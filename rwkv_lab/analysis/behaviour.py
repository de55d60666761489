"""What a merged model does, beside its base, and beside its inputs loaded one by one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rwkv_lab.analysis.texts import STANDARD, AnyCorpus, Reading, fixed_tokens
from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.machine import memory_free
from rwkv_lab.merge import MergeResult
from rwkv_lab.merge.families import family_of
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.progress import human_bytes
from rwkv_lab.samples import Sample
from rwkv_lab.text import counted
from rwkv_lab.train import (
    Examples,
    Measurement,
    Question,
    measure_held_out,
    questions,
)
from rwkv_lab.train.held_out import change_in_words

_SAMPLE = 100  # tokens
_RUNS = "the merged model runs: logits that are NaN or Inf"
_WITH_STATE = "base + state file"
_SAME = "the merged model answers as its inputs do when they are loaded one by one"


@dataclass(frozen=True)
class Behaviour:
    """What was measured. Empty where the models cannot be run or nothing can be read; `unread` states why."""

    bits: dict[str, dict[str, float]] = field(default_factory=dict)  # text -> model -> bits per byte, held out
    measured: dict[str, Measurement] = field(default_factory=dict)  # text -> that of the base
    unread: str = ""  # why there are neither bits nor samples, in a sentence
    samples: list[Sample] = field(default_factory=list)
    checks: list[Check | NotApplicable] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """In a sentence, on which texts the merged model is better than its base, and on which worse; or ""."""
        parts = []
        for text, of in self.bits.items():
            base, merged = of["base"], of["merged"]
            parts.append(f"{text} {base:.3f} to {merged:.3f}, {change_in_words(base, merged)}")
        return f"Bits per byte of held-out text, base to merged: {'; '.join(parts)}." if parts else ""

    @property
    def described(self) -> str:
        """Which bytes and windows the bits per byte are of, for a figure or a report."""
        return "; ".join(f"{text}: {measured.described}" for text, measured in self.measured.items())


@dataclass(frozen=True)
class _Outputs:
    logits: torch.Tensor  # [64, V] float32, after each of 64 fixed tokens
    measured: dict[str, Measurement]  # by text; empty where nothing can be read
    samples: list[tuple[Question, str]]
    unread: str = ""


@checked
def compare_behaviour(result: MergeResult, reading: Reading = STANDARD) -> Behaviour:
    """Run the base, the merged file, and what it was made of where that runs by itself, one after the other.

    The counterpart of a merged state is the base with the state file loaded beside it; of a whole fine-tune, that
    file itself. Both must give the same logits and bits per byte as the merged file, to the last bit. Models that were
    mixed are measured beside the result.

    A merged model that does not load is a check that failed; a base that does not load says nothing of the merge.

    Args:
        result: of a merge that wrote its output. Inputs and output are opened again.
        reading: what they read and continue.

    Raises:
        ParameterError, CorruptFileError: of the data; see `load_corpus`.
    """
    needed, free = 4 * sum(math.prod(r.shape) for r in result.plan.rows), memory_free()  # a model in float32
    if needed > free:
        return _not_measured(f"it needs {human_bytes(needed)} of memory, {human_bytes(free)} are free")
    beyond = _why_not_run(result)
    if beyond:
        return _not_measured(beyond)
    corpora = reading.corpora()
    run = lambda path: _outputs(RWKV_Dual.from_pretrained(path), reading, corpora)  # noqa: E731
    try:
        base = run(result.base)
    except LayoutError as e:
        return _not_measured(f"the base does not run here: {e}")
    try:
        merged = run(result.out)
    except LayoutError as e:
        return Behaviour(
            unread="The merged model does not run.",
            checks=[Check(_RUNS, str(e), 0, False), NotApplicable(_SAME, "the merged model does not run")],
        )
    bad = int((~merged.logits.isfinite()).sum())
    if bad and result.recipe["allow_nonfinite"]:
        return _not_measured("values that are NaN or Inf were allowed into it")
    checks: list[Check | NotApplicable] = [Check(_RUNS, bad, 0, bad == 0)]
    models = {"base": base, "merged": merged}
    name, why_not = _counterpart(result)
    if name:
        tuned = RWKV_Dual.from_pretrained(result.base if name == _WITH_STATE else result.tuned[0])
        if name == _WITH_STATE:
            tuned.load_state_file(result.tuned[0])
        models[name] = _outputs(tuned, reading, corpora)
        checks += _compare(merged, models[name], name)
    else:
        checks.append(NotApplicable(_SAME, why_not))
        models |= {name: run(path) for name, path in _mixed(result).items()}
    return Behaviour(
        bits={text: {n: m.measured[text].bits for n, m in models.items() if m.measured} for text in base.measured},
        measured=base.measured,
        unread=base.unread or merged.unread or ("" if corpora else "No text was read: data names none."),
        samples=_side_by_side(models),
        checks=checks,
    )


def _mixed(result: MergeResult) -> dict[str, Path]:
    """The models that were mixed, by the name of their file; none of other methods, whose tuned files do not run."""
    if family_of(result.plan.method).kinds:  # what goes into the base is no model, or is in `_counterpart`
        return {}
    names = [path.stem for path in result.tuned]
    numbered = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
    return dict(zip(numbered, result.tuned, strict=True))


def _side_by_side(models: Mapping[str, _Outputs]) -> list[Sample]:
    """What each model wrote after each prompt, after what stands there in the data, where it is a response."""
    found = []
    for i, (question, _) in enumerate(models["base"].samples):
        texts = {name: outputs.samples[i][1] for name, outputs in models.items() if outputs.samples}
        texts = {name: text for name, text in texts.items() if name != _WITH_STATE}  # the same as merged
        found.append(Sample(question.prompt, ({"in the data": question.expected} if question.expected else {}) | texts))
    return found


def _why_not_run(result: MergeResult) -> str:
    """What the caller allowed and no model can make sense of; "" if there is nothing of the kind."""
    with open_checkpoint(result.out) as merged:
        extra = merged.identity.misfit.extra if merged.identity.misfit else ()
    if extra:
        unknown = counted(len(extra), "tensor")
        return f"it has {unknown} that RWKV-{result.plan.layout.version} does not know, such as {extra[0]}"
    return "values that are NaN or Inf were allowed into it" if result.checks[0].value else ""


def _not_measured(reason: str) -> Behaviour:
    why = f"Not run: {reason}."
    return Behaviour(unread=why, checks=[NotApplicable(_RUNS, reason), NotApplicable(_SAME, reason)])


def _counterpart(result: MergeResult) -> tuple[str, str]:
    """(what to compare the merged file with, "") or ("", why there is nothing)."""
    recipe = result.recipe
    if recipe["dtype"]:
        return "", f"dtype {recipe['dtype']} rounds every tensor"
    if recipe["method"] not in ("state", "overlay") or recipe["alpha"] != 1:
        return "", "the merged values stand in no file that could be loaded instead; their numbers are checked above"
    if result.plan.skipped:
        return "", f"include and exclude keep {counted(len(result.plan.skipped), 'tensor')} of the tuned file out"
    if any(row.action == "zeros" for row in result.plan.rows):
        return "", "the tuned file has no states for some layers and is not loaded by itself"
    if recipe["method"] == "state":
        return _WITH_STATE, ""
    with open_checkpoint(result.tuned[0]) as tuned:
        if tuned.kind == "model" and set(tuned.info) == {row.name for row in result.plan.rows}:
            return "tuned", ""
    return "", "the tuned file is a part of a model and does not run by itself"


def _compare(merged: _Outputs, other: _Outputs, name: str) -> list[Check]:
    difference = float((merged.logits - other.logits).abs().max())
    checks = [
        Check(f"logits of 64 fixed tokens, merged against {name}: largest difference", difference, 0, difference == 0)
    ]
    for text, measured in merged.measured.items():
        apart = abs(measured.bits - other.measured[text].bits)
        checks.append(
            Check(f"bits per byte of held-out {text}, merged against {name}: difference", apart, 0, apart == 0)
        )
    return checks


@torch.no_grad()
def _outputs(model: RWKV_Dual, reading: Reading, corpora: Mapping[str, AnyCorpus]) -> _Outputs:
    """What a model predicts and writes; it is given up afterwards."""
    logits = model.parallel(fixed_tokens(model.layout.vocab_size))[0][0].float()
    measured: dict[str, Measurement] = {}
    samples: list[tuple[Question, str]] = []
    unread = "" if bool(logits.isfinite().all()) else "Its logits are NaN or Inf."
    if not unread:
        try:
            reading.name_tokenizer(model)
            measured = {n: measure_held_out(model, c, reading.window, most=reading.most) for n, c in corpora.items()}
            samples = [pair for corpus in corpora.values() for pair in _answers(model, corpus)]
        except ParameterError as e:
            measured, samples, unread = {}, [], reading.why_unread(model, e)
    return _Outputs(logits, measured, samples, unread)


def _answers(model: RWKV_Dual, corpus: AnyCorpus) -> list[tuple[Question, str]]:
    """What the model writes after prompts that go with a corpus; answers end where those of its examples do."""
    stop = corpus.stop if isinstance(corpus, Examples) else ()
    write = lambda prompt: model.generate_with_streaming(prompt, _SAMPLE, 0.7, 0.9, seed=0, stop=stop)  # noqa: E731
    return [(question, write(question.prompt)) for question in questions(corpus, model)]
