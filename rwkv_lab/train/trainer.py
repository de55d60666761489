"""Trains a model, an adapter or initial states, and measures on text it was not trained on what that changed."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rwkv_lab import model as models
from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import FileFacts, file_facts
from rwkv_lab.checkpoint.unchanged import refuse_changed
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.paths import to_path
from rwkv_lab.peft import count_parameters
from rwkv_lab.text import counted
from rwkv_lab.train.batches import batches_of
from rwkv_lab.train.data import Corpus, load_corpus
from rwkv_lab.train.examples import Examples
from rwkv_lab.train.finished import (
    CONTINUED,
    NOTE,
    TRAINING_ID,
    finished_training,
    notes_on_checkpoint,
    steps_to_continue,
    training_id,
)
from rwkv_lab.train.fitting import Fitting
from rwkv_lab.train.log import write_log
from rwkv_lab.train.material import Fit, Material, tokenise
from rwkv_lab.train.models import make_model, trained_parameters
from rwkv_lab.train.output import check_destinations, origin_note
from rwkv_lab.train.planning import TrainPlan, make_plan
from rwkv_lab.train.processes import Processes, put
from rwkv_lab.train.resume import resume_path
from rwkv_lab.train.samples import Continuation, Question, questions, samples
from rwkv_lab.train.settings import recorded_settings
from rwkv_lab.train.spec import KINDS, ResolvedSpec, TrainOptions, TrainSpec
from rwkv_lab.train.starting import notes_on_start
from rwkv_lab.train.token_files import TokenCorpus

log = logging.getLogger(__name__)

_CONTINUES = (
    "{out} was finished after {done} steps and is continued to {steps}: AdamW's moments begin anew, and the learning "
    "rate rises again over {warmup} steps to where the schedule of {steps} steps has it. One training of {steps} steps "
    "ends elsewhere."
)
_ONE_PROCESS = (
    "parallel='fsdp' does nothing in one process: the whole model is in its memory. Start several by torchrun "
    "--nproc-per-node 2 -m rwkv_lab.train …"
)


@dataclass
class TrainResult:
    """What a training run did. Bits per byte are means over held-out text, a fresh state every `ctx_len` tokens."""

    kind: str
    out: Path
    losses: list[float]  # bits per token of each step's batch; a token of the demo model is a byte
    bits_before: float
    bits_after: float
    held_out_bytes: int
    split: str  # how training text and held-out text were told apart
    samples: list[Continuation]  # none where several processes trained
    trained: int  # parameters that were trained
    frozen: int
    inputs: list[FileFacts]
    outputs: list[FileFacts]  # of the first process; the others wrote nothing
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (step, bits per byte), every `eval_every` steps
    stopped_early: bool = False
    resumed_at: int = 0  # steps that an earlier run had done
    continued: int = 0  # of these, steps of a finished training, whose losses are not among `losses`
    seconds: dict[str, float] = field(default_factory=dict)  # "data", "before", "training", "after", "total"
    tokens_per_second: float = 0.0
    notes: list[str] = field(default_factory=list)  # on the data: what was cut, ignored or skipped, a sentence each
    fit: Fit | None = None  # what ctx_len did to examples; None where windows were drawn from a text


def train(
    kind: str,
    out: str | Path,
    data: str | Path | None = None,
    base: str | Path | None = None,
    *,
    start: str | Path | None = None,
    preset: str = "",
    tokenizer: str | Path | None = None,
    template: str | Path = "world",
    ignore: Sequence[str] = (),
    long: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    ctx_len: int | None = None,
    lr: float | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    train_parts: Sequence[str] = (),
    quant: str = "none",
    dtype: str = "float32",
    autocast: str = "",
    device: str = "cpu",
    seed: int = 0,
    accumulate: int | None = None,
    warmup: int | None = None,
    gradient_checkpointing: bool = False,
    eval_every: int = 0,
    patience: int = 0,
    checkpoint_every: int = 0,
    resume: bool = False,
    log_folder: str | Path | None = None,
    parallel: str = "ddp",
    n_embd: int = 128,
    n_layer: int = 3,
    head_size: int = 32,
    overwrite: bool = False,
    allow_other_base: bool = False,
    samples: bool = True,
    on_step: Callable[[int, list[float]], object] | None = None,
) -> TrainResult:
    """Train on sequences drawn from a corpus, and write the result.

    The same arguments give the same file, bit for bit, on the same machine with the same number of threads; also if the
    run was interrupted and resumed. Where torch.distributed is set up, all processes train together (`Processes`).

    Args:
        kind: "pretrain" trains everything, from `base` or from a fresh byte-level model of n_embd, n_layer, head_size;
            "full" trains everything of `base`, "state" only `blocks.i.att.time_state` `[H,V,K]`, the state that every
            sequence starts from; "lora", "pissa" and "miss" train adapters (`rwkv_lab.peft`).
        out: `.pth` or `.safetensors`: the whole model, the states alone or the adapter; for adapters also a folder.
        data: "english", "python" or the path of a file or folder; see `rwkv_lab.train.data` for how each is split.
        start: an adapter or a tuned state of `base` to train further. Its file states rank, alpha, targets and how the
            base was stored; what is given besides must agree.
        tokenizer: "world", "bytes" or the path of a vocabulary or a tokenizer.json, where the size of the vocabulary
            does not tell. A fresh model has its vocabulary.
        template: how conversations are written: "world", or the path of a JSON file; see `rwkv_lab.train.records`.
        ignore: fields of records that are not trained on, or patterns of them; others with content are refused.
        long: what becomes of examples of more than `ctx_len` tokens: "split" into pieces, "cut" off (None), "drop", or
            "error". Of texts nothing is cut.
        steps: updates, each of `accumulate` batches of `batch_size` sequences of `ctx_len` tokens. `batch_size` is that
            of all processes together.
        lr: the highest learning rate, after `warmup` steps; states want a large one (1), models a small one.
        preset: sets what is None of steps, batch_size, ctx_len, lr and rank by the size of the model: "auto" by that of
            `base` or of the fresh model, or "0.1B", "0.4B", "1.5B", "2.9B", "7B"; see `rwkv_lab.train.presets`.
        rank: of adapters.
            data, steps, batch_size, ctx_len, lr, rank: those of `KINDS[kind].defaults` where None.
        alpha: of a LoRA, which is scaled by alpha / rank; None for twice the rank.
        targets: layers to adapt, such as "att.key", or patterns; None for all matrices of the blocks.
        train_parts: what an adapter's training trains besides: "emb", "head", "ln", "time", "time_state", patterns.
        quant: of `rwkv_lab.peft.settings.QUANTS`: how the frozen matrices are stored.
        dtype: "float32", "float64" or "bfloat16", of the model; states, and adapters of a bfloat16 model, are float32.
        autocast: "bfloat16", or on CUDA "float16": compute in it, keep the parameters in float32.
        gradient_checkpointing: keep less for the backward pass and compute it again.
        eval_every: steps between two measurements on held-out text, 0 for none.
        patience: measurements without a new best after which training stops, 0 for never. The output is the best then.
        checkpoint_every: steps between two checkpoints at `resume_path(out)`, 0 for none.
        resume: continue from that checkpoint if it is there; else, where `out` is finished and `steps` are more than it
            has, from `out` (`rwkv_lab.train.finished`).
        log_folder: where `log.csv` and `log.json` go; None for nowhere.
        parallel: "ddp" or "fsdp", for several processes.
        allow_other_base: adapters and states that rwkv_lab trained name their base by its values; train a `start` on
            another one all the same.
        samples: let the model write something before and after.
        on_step: called after every step with the number of steps done and the losses so far.

    Raises: as `make_plan` and `run_training`.
    """
    given = locals()
    spec = TrainSpec.read({name: given[name] for name in TrainSpec.model_fields})
    options = TrainOptions.read({name: given[name] for name in TrainOptions.model_fields})
    return run_training(make_plan(spec), out, options)


@checked
def run_training(plan: TrainPlan, out: str | Path, options: TrainOptions) -> TrainResult:
    """Train as planned, and write the result to `out`.

    Raises:
        ParameterError: a base that has changed since the plan was made, a batch that does not divide among the
            processes, too little text, a broken line of JSONL, an adapter that a folder cannot hold.
        OutputError: `out` exists (unless `overwrite`), is the base or the text under whatever name, is a folder that
            holds other things, or cannot be written. Nothing was trained then.
        NumericsError: the base predicts NaN, PiSSA or NF4 meet one in it, or the loss became NaN or infinite: `out` was
            not written then, and the last good checkpoint stays.
        LayoutError, CorruptFileError, UnsafeFileError, DeviceError: of the base.
    """
    clock = _Clock()
    training = _prepare(plan, to_path(out, "out"), options)
    fitting, course = training.fitting, training.fitting.course
    clock.lap("data")
    bits_before = _measure_before(training) if course.bits_before is None else course.bits_before
    clock.lap("before")
    stopped_early = fitting.fit()
    clock.lap("training")
    bits_after, samples = fitting.measure(), training.samples()
    clock.lap("after")

    count = count_parameters(training.model)
    result = TrainResult(
        kind=plan.spec.kind,
        out=training.out,
        losses=course.losses,
        bits_before=bits_before,
        bits_after=bits_after,
        held_out_bytes=training.material.held_out_bytes,
        split=training.corpus.split,
        samples=[
            Continuation(q.prompt, before, after, q.expected)
            for q, (_, before), (_, after) in zip(training.questions(), course.samples_before, samples, strict=False)
        ],
        trained=count.trained,
        frozen=count.frozen,
        inputs=training.inputs,
        outputs=[],
        held_out=course.held_out,
        stopped_early=stopped_early,
        resumed_at=fitting.resumed_at,
        seconds=clock.laps,
        notes=training.notes(),
        continued=course.before,
        fit=training.material.fit,
    )
    tokens = (course.step - fitting.resumed_at) * plan.spec.batch_size * plan.spec.accumulate * plan.spec.ctx_len
    result.tokens_per_second = tokens / clock.laps["training"]
    _write(training, result)
    return result


@dataclass(frozen=True)
class _Training:
    """A training that is ready for its first step."""

    spec: ResolvedSpec
    out: Path
    options: TrainOptions
    processes: Processes
    inputs: list[FileFacts]
    corpus: Corpus | Examples | TokenCorpus
    material: Material
    model: models.RWKV_Dual
    settings: dict[str, object]
    origin: dict[str, str]  # for the output's metadata
    fitting: Fitting
    found: list[str]  # on start and checkpoint, a sentence each

    def notes(self) -> list[str]:
        """What is worth knowing about the data and about what was continued, a sentence each."""
        done, spec = self.fitting.course.before, self.spec
        words = _CONTINUES.format(out=self.out.name, done=done, steps=spec.steps, warmup=spec.warmup_steps)
        return [*self.found, *self.material.notes, *([words] if done else [])]

    def samples(self) -> list[tuple[str, str]]:
        """(prompt, continuation) pairs, as the model is now; none of several processes."""
        if not (self.options.samples and self.processes.size == 1):
            return []
        return samples(self.corpus, self.model, self.spec.seed)

    def questions(self) -> list[Question]:
        """What `samples` answers."""
        return questions(self.corpus, self.model)


def _prepare(plan: TrainPlan, out: Path, options: TrainOptions) -> _Training:
    """Read data and base, make the model, load the checkpoint to resume from; refuse what can be refused by then."""
    spec, processes = plan.spec, Processes.here(options.parallel)
    if spec.batch_size % processes.size:
        raise ParameterError(
            f"batch_size={spec.batch_size} does not divide among {counted(processes.size, 'process', 'processes')}; "
            "choose a multiple."
        )
    finished = finished_training(out, options)
    check_destinations(spec, out, options.changed(overwrite=True) if finished else options)
    refuse_changed(plan.base_files)
    found = notes_on_start(spec, options.allow_other_base) + notes_on_checkpoint(out, options)
    if options.parallel == "fsdp" and processes.size == 1:
        found.append(_ONE_PROCESS)
    if spec.eval_every > spec.steps:
        found.append(f"eval_every={spec.eval_every}: nothing is measured on the way, in {counted(spec.steps, 'step')}.")
    for note in found:
        log.warning("%s", note)
    if plan.preset_note:
        log.info("%s", plan.preset_note)
        found.insert(0, plan.preset_note)
    corpus = load_corpus(spec.data) if plan.corpus is None else plan.corpus
    inputs = [file_facts(path) for path in (spec.base, spec.start) if path]
    settings = recorded_settings(spec, corpus, inputs)
    done = steps_to_continue(finished, out, spec.steps, settings, options.overwrite)
    model = make_model(spec, out if done and not resume_path(out).exists() else "")
    KINDS[spec.kind].check_savable(model, out)
    material = plan.material or tokenise(corpus, model.tokenizer, spec.ctx_len, spec.long)
    for note in material.notes:
        log.warning("%s", note) if material.fit and note == str(material.fit) and material.fit.lost else log.info(note)
    batches = batches_of(material, spec.seed)
    model.gradient_checkpointing = spec.gradient_checkpointing
    settings |= KINDS[spec.kind].recorded(model) | ({CONTINUED: done} if done else {})
    run, trained = processes.wrap(model), trained_parameters(model)
    if "start" in KINDS[spec.kind].takes:
        earlier = Path(spec.start) if spec.start else out if done and out.exists() else None
        settings[TRAINING_ID] = training_id(settings, earlier)
    if done:
        options = options.changed(overwrite=True)
        log.info("%s", _CONTINUES.format(out=out.name, done=done, steps=spec.steps, warmup=spec.warmup_steps))
    fitting = Fitting(run, trained, batches, spec, options, resume_path(out), settings, processes, done)
    origin = origin_note(spec, settings)
    return _Training(spec, out, options, processes, inputs, corpus, material, model, settings, origin, fitting, found)


def _measure_before(training: _Training) -> float:
    """Bits per byte of held-out text before the first step; samples are taken too. Both stay in the course.

    Raises:
        NumericsError: they are not finite.
    """
    bits = training.fitting.measure()
    if not math.isfinite(bits):
        raise NumericsError(
            f"{training.spec.base or 'The fresh model'} predicts held-out {training.corpus.name} with {bits} bits "
            "per byte before any step.\nInspect the base for NaN and Inf, or try dtype='float32' without autocast."
        )
    training.fitting.course.bits_before = bits
    training.fitting.course.samples_before = training.samples()
    return bits


def _write(training: _Training, result: TrainResult) -> None:
    """Write output and log by the first process, and remove the resume file. Every process has to call it."""
    spec, out, processes, model = training.spec, training.out, training.processes, training.model
    course = training.fitting.course
    if processes.sharded:
        values = processes.whole(training.fitting.trained.items())
        model = _whole_again(spec, values) if processes.first else model
    if processes.first:
        done = {} if course.step == spec.steps else {"steps_done": course.step}
        note = {NOTE: json.dumps(training.settings | done | {"torch": torch.__version__})}
        KINDS[spec.kind].save(model, out, note | training.origin, training.options.overwrite)
        result.outputs = [file_facts(out)]
        if training.options.log_folder:
            keep = ("bits_before", "bits_after", "held_out_bytes", "trained", "frozen", "stopped_early", "resumed_at")
            summary = {"settings": training.settings} | {name: getattr(result, name) for name in keep}
            summary |= {"notes": result.notes} if result.notes else {}
            write_log(Path(training.options.log_folder), course.log, summary)
        resume_path(out).unlink(missing_ok=True)
        bits = f"{result.bits_before:.3f} -> {result.bits_after:.3f}"
        log.info("%s: %s bits per byte of held-out %s", spec.kind, bits, training.corpus.name)
    processes.wait()


def _whole_again(spec: TrainSpec, values: dict[str, torch.Tensor]) -> models.RWKV_Dual:
    """The model that was spread over processes, in one."""
    model = make_model(spec)
    for name, parameter in trained_parameters(model).items():
        put(parameter, values[name])
    return model


class _Clock:
    """Seconds of each stage, in order."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self.laps["total"] = now - self._start
        self._last = now
