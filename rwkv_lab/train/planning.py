"""What a training would do: what is trained and about how much memory it takes, from the headers of the base alone; and
what of the data would be trained on, which is read whole for that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Layout, expected_tensors, open_checkpoint
from rwkv_lab.checkpoint.packed import refuse_packed
from rwkv_lab.checkpoint.unchanged import FileState, file_states
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.model.rwkv7 import fresh_layout
from rwkv_lab.names import is_block_matrix
from rwkv_lab.peft.settings import BITS
from rwkv_lab.tokenizer import Tokenizer, load_tokenizer, tokenizer_for
from rwkv_lab.train.data import CORPORA, Corpus, load_corpus
from rwkv_lab.train.examples import Examples
from rwkv_lab.train.kinds.whole import fresh_vocabulary
from rwkv_lab.train.material import Fit, Material, tokenise
from rwkv_lab.train.presets import PRESETS, START_VALUE
from rwkv_lab.train.spec import KINDS, Planned, ResolvedSpec, TrainSpec
from rwkv_lab.train.token_files import TokenCorpus

# Numbers kept for the backward pass, per token and channel of one layer: counted in RWKV-7 with the chunked operator.
_KEPT_PER_CHANNEL = 66


@dataclass(frozen=True)
class TrainNeeds:
    """What would be trained of a model, in numbers of values and of bytes."""

    layout: Layout
    trained: Sequence[Planned]
    frozen: int
    weights_bytes: int  # of the model and its adapters in memory
    gradients_bytes: int
    optimiser_bytes: int
    activations_bytes: int  # about; of one batch

    @property
    def count(self) -> int:
        return sum(values for _, _, values in self.trained)

    @property
    def memory_bytes(self) -> int:
        """About; in all."""
        return self.weights_bytes + self.gradients_bytes + self.optimiser_bytes + self.activations_bytes


@dataclass(frozen=True, repr=False, kw_only=True)
class TrainPlan(TrainNeeds):
    """A training as it would run, its data included. `run_training` trains what stands here."""

    spec: ResolvedSpec
    base_files: tuple[FileState, ...]  # as they were when their headers were read
    preset_note: str = ""  # what a preset set
    corpus: Corpus | Examples | TokenCorpus | None = None  # None of those that come with Python, which are read later
    material: Material | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a preset set, and what is worth knowing about the data, a sentence each."""
        of_data = () if self.material is None else tuple(self.material.notes)
        return (*([self.preset_note] if self.preset_note else []), *of_data)

    @property
    def fit(self) -> Fit | None:
        """What ctx_len does to examples; None where windows are drawn from a text."""
        return None if self.material is None else self.material.fit

    def __repr__(self) -> str:
        return f"TrainPlan({self.spec.kind} of {self.layout}: {self.count:,} trained, {self.frozen:,} frozen)"


def plan_training(kind: str, base: str | Path | None = None, **options: Any) -> TrainPlan:
    """The plan of `train` with these arguments; of the base only headers are read.

    Args:
        options: those of `TrainSpec`, which are keywords of `train`.

    Raises:
        ParameterError: as `train`.
        LayoutError: a base that is no whole model.
    """
    return make_plan(TrainSpec.read({"kind": kind, "base": base, **options}))


@checked
def make_plan(spec: TrainSpec) -> TrainPlan:
    """The plan of a training; of the base only headers are read, of the data all.

    Raises:
        ParameterError: targets that match nothing, a rank larger than a layer, data that cannot be used, a vocabulary
            whose tokenizer has to be given.
        LayoutError: a base that is no whole model.
        CorruptFileError, UnsafeFileError: of the base.
    """
    started = KINDS[spec.kind].started(spec) if spec.start else spec
    resolved = started.resolved()
    layout, shapes, files = _described(resolved)
    if resolved.start:
        with open_checkpoint(resolved.start) as ck:
            files += file_states(ck)
    found = needs(resolved, layout, shapes)
    corpus, material = _read(resolved, layout)
    note = _preset_note(started)
    read = {"corpus": corpus, "material": material, "preset_note": note}
    return TrainPlan(spec=resolved, base_files=files, **read, **vars(found))


def needs(resolved: ResolvedSpec, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> TrainNeeds:
    """What a training takes of a model with tensors of these shapes, which need not be there.

    Raises:
        ParameterError: targets that match nothing, a rank larger than a layer.
    """
    trained = KINDS[resolved.kind].planned(resolved, layout, shapes)
    size = resolved.torch_dtype.itemsize
    whole = {name for name, shape, values in trained if name in shapes and math.prod(shape) == values}
    frozen = {name: math.prod(shape) for name, shape in shapes.items() if name not in whole}
    matrices = [name for name in frozen if resolved.quant != "none" and is_block_matrix(name, shapes[name])]
    packed = sum(frozen[name] for name in matrices)
    new = sum(values for name, _, values in trained if name not in whole)
    kept = sum(math.prod(shapes[name]) for name in whole)
    weights = (sum(frozen.values()) - packed + kept) * size + packed * BITS.get(resolved.quant, 0) / 8
    wide = max(size, 4)  # of what is added to the model
    gradients = kept * size + new * wide
    return TrainNeeds(
        layout=layout,
        trained=trained,
        frozen=sum(frozen.values()),
        weights_bytes=round(weights + new * wide),
        gradients_bytes=gradients,
        optimiser_bytes=2 * gradients,
        activations_bytes=_activations(resolved, layout) * (2 if size == 2 or resolved.autocast else size),
    )


def _preset_note(spec: TrainSpec) -> str:
    """What the preset set, in a sentence; "" without one."""
    if not spec.preset:
        return ""
    size, settings = spec.preset_settings()
    taken = [f"{name} {value:g}" for name, value in settings.items() if getattr(spec, name) is None]
    if not size:
        return f"preset={spec.preset!r} set nothing: the model is smaller than those that presets are for."
    guessed = spec.kind == "pretrain" and spec.lr is None and PRESETS[size].guessed
    said = f"The preset for {size} set {', '.join(taken) or 'nothing: all of it was given'}."
    return f"{said} {START_VALUE}" if guessed else said


def _read(spec: ResolvedSpec, layout: Layout) -> tuple[Corpus | Examples | TokenCorpus | None, Material | None]:
    """The data and their tokens; nothing is read of the corpora that come with Python, of which nothing can be cut."""
    if spec.data in CORPORA:
        for name, given in (("ignore", spec.ignore), ("template", spec.template != "world" and spec.template)):
            if given:
                raise ParameterError(f"{name}={given!r} is for records, and {spec.data} is text: leave it out.")
        if spec.long not in (None, "split"):
            raise ParameterError(f"long={spec.long!r} is for examples, and {spec.data} is text: leave it out.")
        return None, None
    corpus, vocabulary = load_corpus(spec.data, spec.ignore, spec.template), layout.vocab_size
    tokenizer = load_tokenizer(spec.tokenizer, vocabulary) if spec.tokenizer else named_tokenizer(vocabulary)
    return corpus, tokenise(corpus, tokenizer, spec.ctx_len, spec.long)


def named_tokenizer(vocab_size: int) -> Tokenizer:
    """The tokenizer that the size of a vocabulary tells.

    Raises:
        ParameterError: it tells none; says what to pass.
    """
    try:
        return tokenizer_for(vocab_size)
    except ParameterError as e:
        what = str(e).splitlines()[0]
        raise ParameterError(f"{what}\nPass tokenizer='world', 'bytes' or the path of a tokenizer.json.") from None


def _activations(spec: ResolvedSpec, layout: Layout) -> int:
    """Numbers kept for the backward pass."""
    layers = layout.n_layer * _KEPT_PER_CHANNEL
    if spec.gradient_checkpointing:
        layers = layout.n_layer * 2 + _KEPT_PER_CHANNEL
    return spec.batch_size * spec.ctx_len * (layers * layout.n_embd + 3 * layout.vocab_size)


def _described(spec: TrainSpec) -> tuple[Layout, Mapping[str, tuple[int, ...]], tuple[FileState, ...]]:
    """(layout, shapes by name, files) of the base or of a fresh model."""
    if not spec.base:
        layout = fresh_layout(spec.n_embd, spec.n_layer, fresh_vocabulary(spec), spec.head_size)
        return layout, expected_tensors(layout)[0], ()
    with open_checkpoint(spec.base) as ck:
        if ck.kind != "model" or ck.layout is None:
            raise LayoutError(f"{ck.path} is {ck.kind}, no whole model to start from: {ck.reason}")
        refuse_packed(ck.path, ck.info.values(), "Training")
        shapes = {name: tuple(t.shape) for name, t in ck.info.items()}
        return ck.layout, shapes, file_states(ck)
