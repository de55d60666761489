"""Trains a model, an adapter or initial states, and measures on text it was not trained on what that changed."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from rwkv_lab.checkpoint import FileFacts, file_facts
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.peft import adapter_of, count_parameters
from rwkv_lab.peft.files import check_savable
from rwkv_lab.train.batches import in_batches
from rwkv_lab.train.data import Corpus, load_corpus
from rwkv_lab.train.examples import Examples
from rwkv_lab.train.fitting import Fitting, Watch
from rwkv_lab.train.given import check_types
from rwkv_lab.train.log import write_log
from rwkv_lab.train.output import check_output
from rwkv_lab.train.processes import Processes, put
from rwkv_lab.train.recipe import ADAPTER_KINDS, Recipe, Tuning, choose_recipe
from rwkv_lab.train.resume import resume_path
from rwkv_lab.train.tuned import make_model, pissa_start, save_tuned, trained_parameters

log = logging.getLogger(__name__)

_PROMPTS = {"english": ("The ", "If the value of "), "python": ("def ", "import ")}
_SAMPLE_LENGTH = 120  # tokens


@dataclass(frozen=True)
class Sample:
    """What the model wrote after a prompt, with the same seed, before and after training."""

    prompt: str
    before: str
    after: str


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
    samples: list[Sample]  # none where several processes trained, or where the data are examples
    trained: int  # parameters that were trained
    frozen: int
    inputs: list[FileFacts]
    outputs: list[FileFacts]  # of the first process; the others wrote nothing
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (step, bits per byte), every `eval_every` steps
    stopped_early: bool = False
    resumed_at: int = 0  # steps that an earlier run had done
    seconds: dict[str, float] = field(default_factory=dict)  # "data", "before", "training", "after", "total"
    tokens_per_second: float = 0.0


def train(
    kind: str,
    out: str | Path,
    data: str | None = None,
    base: str | Path | None = None,
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
        data: "english", "python" or the path of a file or folder; `rwkv_lab.train.data` says how each is split.
        steps: updates, each of `accumulate` batches of `batch_size` sequences of `ctx_len` tokens. `batch_size` is that
            of all processes together.
        lr: the highest learning rate, after `warmup` steps; states want a large one (1), models a small one.
        rank: of adapters.
            data, steps, batch_size, ctx_len, lr, rank, accumulate, warmup: those of `RECIPES[kind]` where None.
        alpha: of a LoRA, which is scaled by alpha / rank; None for twice the rank.
        targets: layers to adapt, such as "att.key", or patterns; None for all matrices of the blocks.
        train_parts: what an adapter's training trains besides: "emb", "head", "ln", "time", "time_state", patterns.
        quant: "none", "int8" or "nf4": how the frozen matrices are stored.
        dtype: "float32", "float64" or "bfloat16", of the model; states, and adapters of a bfloat16 model, are float32.
        autocast: "bfloat16", or on CUDA "float16": compute in it, keep the parameters in float32.
        gradient_checkpointing: keep less for the backward pass and compute it again.
        eval_every: steps between two measurements on held-out text, 0 for none.
        patience: measurements without a new best after which training stops, 0 for never. The output is the best then.
        checkpoint_every: steps between two checkpoints at `resume_path(out)`, 0 for none.
        resume: go on from that checkpoint if it is there.
        log_folder: where `log.csv` and `log.json` go; None for nowhere.
        parallel: "ddp" or "fsdp", for several processes.
        samples: let the model write something before and after.
        on_step: called after every step with the number of steps done and the losses so far.

    Raises:
        ParameterError: values out of range or that do not go together, too little text, a broken line of JSONL, an
            adapter that a folder cannot hold.
        OutputError: `out` exists (unless `overwrite`), is the base or the text under whatever name, is a folder that
            holds other things, or cannot be written. Nothing was trained then.
        NumericsError: the base predicts NaN, PiSSA or NF4 meet one in it, or the loss became NaN or infinite: `out` was
            not written then, and the last good checkpoint stays.
        LayoutError, CorruptFileError, UnsafeFileError, DeviceError: of the base.
    """
    check_types(train, locals())
    out, clock = Path(out), _Clock()
    given = dict(data=data, steps=steps, batch_size=batch_size, ctx_len=ctx_len, lr=lr, rank=rank)
    recipe = choose_recipe(kind, **given, accumulate=accumulate, warmup=warmup)
    tuning = Tuning(kind, dtype, autocast, device, quant, recipe.rank, alpha, targets, tuple(train_parts), seed)
    tuning.check(base)
    processes = Processes.here(parallel)
    _check_watching(recipe, eval_every, patience, checkpoint_every, processes)
    check_output(kind, out, base, recipe.data, overwrite, log_folder)

    corpus = load_corpus(recipe.data)
    inputs = [file_facts(base)] if base else []
    sizes = {} if base else dict(n_embd=n_embd, n_layer=n_layer, head_size=head_size)
    model = make_model(tuning, base, sizes)
    if kind in ADAPTER_KINDS:
        check_savable(adapter_of(model), out)
    material = in_batches(corpus, model.tokenizer, recipe.ctx_len, seed)
    count = count_parameters(model)
    model.gradient_checkpointing = gradient_checkpointing
    settings = _settings(tuning, recipe, sizes, corpus, inputs, eval_every, patience)
    if kind == "pissa":
        settings["start"] = pissa_start(model)
    watch = Watch(eval_every, patience, checkpoint_every, resume, resume_path(out), settings, on_step)
    run = processes.wrap(model)
    fitting = Fitting(run, trained_parameters(model), material, recipe, tuning, watch, processes)
    clock.lap("data")

    writes_samples = samples and processes.size == 1 and isinstance(corpus, Corpus)
    course = fitting.course
    if course.bits_before is None:  # else an earlier run has measured it
        course.bits_before = fitting.measure()
        if not math.isfinite(course.bits_before):
            raise NumericsError(
                f"{base or 'The fresh model'} predicts held-out {corpus.name} with {course.bits_before} bits per byte "
                "before any step.\nInspect the base for NaN and Inf, or try dtype='float32' without autocast."
            )
        course.samples_before = _samples(model, corpus, seed) if writes_samples else []
    clock.lap("before")
    stopped_early = fitting.fit()
    clock.lap("training")
    bits_before, bits_after = course.bits_before, fitting.measure()
    after = _samples(model, corpus, seed) if writes_samples else []
    clock.lap("after")

    result = TrainResult(
        kind=kind,
        out=out,
        losses=course.losses,
        bits_before=bits_before,
        bits_after=bits_after,
        held_out_bytes=material.held_out_bytes,
        split=corpus.split,
        samples=[Sample(p, b, a) for (p, b), (_, a) in zip(course.samples_before, after, strict=False)],
        trained=count.trained,
        frozen=count.frozen,
        inputs=inputs,
        outputs=[],
        held_out=course.held_out,
        stopped_early=stopped_early,
        resumed_at=fitting.resumed_at,
        seconds=clock.laps,
    )
    done = course.step - fitting.resumed_at
    result.tokens_per_second = done * recipe.batch_size * recipe.accumulate * recipe.ctx_len / clock.laps["training"]
    if processes.sharded:
        values = processes.whole(fitting.trained.items())
        model = _whole_again(tuning, base, sizes, values) if processes.first else None
    if processes.first:
        note = {"rwkv_lab.train": json.dumps(settings | {"torch": torch.__version__})}
        save_tuned(model, tuning, out, note, overwrite)
        result.outputs = [file_facts(out)]
        if log_folder is not None:
            keep = ("bits_before", "bits_after", "held_out_bytes", "trained", "frozen", "stopped_early", "resumed_at")
            summary = {"settings": settings} | {name: getattr(result, name) for name in keep}
            write_log(Path(log_folder), course.log, summary)
        resume_path(out).unlink(missing_ok=True)
        log.info("%s: %.3f -> %.3f bits per byte of held-out %s", kind, bits_before, bits_after, corpus.name)
    processes.wait()
    return result


def _check_watching(recipe: Recipe, eval_every, patience, checkpoint_every, processes: Processes) -> None:
    if min(eval_every, patience, checkpoint_every) < 0:
        raise ParameterError(
            f"eval_every={eval_every}, patience={patience} and checkpoint_every={checkpoint_every} must be at least 0."
        )
    if patience and not eval_every:
        raise ParameterError(f"patience={patience} counts measurements: say with eval_every when to measure.")
    if recipe.batch_size % processes.size:
        raise ParameterError(
            f"batch_size={recipe.batch_size} does not divide among {processes.size} processes; choose a multiple."
        )


def _settings(tuning: Tuning, recipe: Recipe, sizes, corpus, inputs, eval_every: int, patience: int) -> dict:
    """What decides the result, in terms of JSON: travels in the output, and must be the same to resume."""
    settings = asdict(tuning) | asdict(recipe) | sizes
    settings |= {"device": torch.device(tuning.device).type, "text": _fingerprint(corpus)}
    settings |= {"eval_every": eval_every, "patience": patience} if eval_every else {}
    return settings | ({"base": inputs[0].fingerprint} if inputs else {})


def _fingerprint(corpus: Corpus | Examples) -> str:
    digest = hashlib.sha256()
    for part in (corpus.train, corpus.held_out):
        texts = [part] if isinstance(part, bytes) else [text for e in part for text in (e.prompt, e.response)]
        for text in texts:
            digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()[:16]


def _whole_again(tuning: Tuning, base, sizes, values: dict[str, torch.Tensor]) -> RWKV_Dual:
    """The model that was spread over processes, in one."""
    model = make_model(tuning, base, sizes)
    for name, parameter in trained_parameters(model).items():
        put(parameter, values[name])
    return model


def _samples(model, corpus: Corpus, seed: int) -> list[tuple[str, str]]:
    """(prompt, continuation) pairs."""
    prompts = _PROMPTS.get(corpus.name) or (corpus.held_out[:20].decode("utf-8", errors="replace"),)
    return [(p, model.generate_with_streaming(p, _SAMPLE_LENGTH, 1.0, 0.95, seed)) for p in prompts]


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
