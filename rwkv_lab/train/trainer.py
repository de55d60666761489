"""Trains a model, or only its initial states, and measures on text it was not trained on what that changed."""

import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from rwkv_lab.checkpoint import FileFacts, file_facts, write_checkpoint
from rwkv_lab.checkpoint.atomic import check_target
from rwkv_lab.checkpoint.write import file_kind
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.model import RWKV_Dual, bits_per_byte
from rwkv_lab.progress import Progress
from rwkv_lab.train.data import Corpus, load_corpus
from rwkv_lab.train.optimiser import make_optimiser, set_lr

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What is taken where `train` is not told otherwise: chosen for one to two minutes on two CPU cores."""

    data: str
    steps: int
    batch_size: int
    ctx_len: int
    lr: float


RECIPES = {
    "pretrain": Recipe("english", steps=800, batch_size=4, ctx_len=256, lr=3e-3),
    # A tuned state counts most near the start of a text, so its windows are shorter.
    "state": Recipe("python", steps=400, batch_size=8, ctx_len=128, lr=1.0),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
_CLIP = 1.0  # largest norm of the gradient
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
    """What a training run did. Bits per byte are means over held-out text, a fresh state every `ctx_len` bytes."""

    kind: str
    out: Path
    losses: list[float]  # bits per byte of each step's batch
    bits_before: float
    bits_after: float
    held_out_bytes: int
    split: str  # how training text and held-out text were told apart
    samples: list[Sample]
    trained: int  # parameters that were trained
    frozen: int
    inputs: list[FileFacts]
    outputs: list[FileFacts]
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
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    n_embd: int = 128,
    n_layer: int = 3,
    head_size: int = 32,
    overwrite: bool = False,
) -> TrainResult:
    """Train on windows drawn at random from a corpus, and write the result.

    The same arguments give the same file, bit for bit, on the same machine with the same number of threads.

    Args:
        kind: "pretrain" trains everything, from `base` or from a fresh byte-level model of n_embd, n_layer, head_size.
            "state" trains only `blocks.i.att.time_state` `[H,V,K]`, the state that every sequence starts from.
        out: `.pth` or `.safetensors`: the whole model for "pretrain", the states alone for "state".
        data: "english", "python" or the path of a file; `rwkv_lab.train.data` says how each is split.
        steps: batches of `batch_size` windows of `ctx_len` bytes.
        lr: the highest learning rate; states want a large one (1), models a small one.
            data, steps, batch_size, ctx_len and lr are those of `RECIPES[kind]` where they are None.
        dtype: "float32", "float64" or "bfloat16", of the model; states are float32 or float64.

    Raises:
        ParameterError: a kind that there is not, values out of range, no base where one is needed.
        OutputError: `out` exists (unless `overwrite`) or cannot be written. Nothing was trained then.
        NumericsError: the loss became NaN or infinite. Nothing was written then.
        LayoutError, CorruptFileError, UnsafeFileError: of the base.
    """
    out = Path(out)
    recipe = choose_recipe(kind, data=data, steps=steps, batch_size=batch_size, ctx_len=ctx_len, lr=lr)
    _check(kind, base, recipe, dtype, device)
    file_kind(out)
    check_target(out, overwrite)
    clock = _Clock()
    corpus = load_corpus(recipe.data)
    if len(corpus.train) <= recipe.ctx_len + 1:
        raise ParameterError(f"ctx_len={recipe.ctx_len} is longer than the {len(corpus.train)} bytes to train on.")
    model = _model(kind, base, seed, n_embd, n_layer, head_size, DTYPES[dtype], device)
    inputs = [file_facts(base)] if base else []
    optimiser = make_optimiser(model, kind, recipe.lr)
    clock.lap("data")

    bits_before, samples_before = _measure(model, corpus, recipe.ctx_len, seed)
    clock.lap("before")
    losses = _fit(model, optimiser, kind, corpus, recipe, seed)
    clock.lap("training")
    bits_after, samples_after = _measure(model, corpus, recipe.ctx_len, seed)
    clock.lap("after")

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    made_by = {"kind": kind, **asdict(recipe), "dtype": dtype, "seed": seed, "torch": torch.__version__}
    made_by |= {"base": inputs[0].fingerprint} if inputs else {}
    write_checkpoint(out, trained, metadata={"rwkv_lab.train": json.dumps(made_by)}, overwrite=overwrite)
    n_trained = sum(p.numel() for p in trained.values())
    log.info("%s: %.3f -> %.3f bits per byte of held-out %s", kind, bits_before, bits_after, corpus.name)
    return TrainResult(
        kind=kind,
        out=out,
        losses=losses,
        bits_before=bits_before,
        bits_after=bits_after,
        held_out_bytes=len(corpus.held_out),
        split=corpus.split,
        samples=[Sample(p, b, a) for (p, b), (_, a) in zip(samples_before, samples_after, strict=True)],
        trained=n_trained,
        frozen=sum(p.numel() for p in model.parameters()) - n_trained,
        inputs=inputs,
        outputs=[file_facts(out)],
        seconds=clock.laps,
        tokens_per_second=recipe.steps * recipe.batch_size * recipe.ctx_len / clock.laps["training"],
    )


def choose_recipe(kind: str, **given) -> Recipe:
    """`RECIPES[kind]` with the given fields (None: not given) in place of its own.

    Raises:
        ParameterError: no such kind.
    """
    if kind not in RECIPES:
        raise ParameterError(f"There is no kind {kind!r} of training; there are: {', '.join(RECIPES)}.")
    return replace(RECIPES[kind], **{name: value for name, value in given.items() if value is not None})


def _check(kind: str, base, recipe: Recipe, dtype: str, device: str) -> None:
    if kind == "state" and not base:
        raise ParameterError("kind='state' tunes the initial states of a model: pass that model as base=.")
    if min(recipe.steps, recipe.batch_size, recipe.ctx_len) < 1 or not 0 < recipe.lr < math.inf:
        raise ParameterError(
            f"steps={recipe.steps}, batch_size={recipe.batch_size} and ctx_len={recipe.ctx_len} must be >= 1, "
            f"and lr={recipe.lr} above 0."
        )
    if dtype not in DTYPES:
        raise ParameterError(f"There is no dtype {dtype!r}; there are: {', '.join(DTYPES)}.")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ParameterError(f"device={device!r}, but torch finds no CUDA device here; use device='cpu'.")


def _model(kind, base, seed, n_embd, n_layer, head_size, dtype, device) -> RWKV_Dual:
    if base:
        model = RWKV_Dual.from_pretrained(base, dtype=dtype, device=device)
    else:
        with torch.random.fork_rng(devices=[]):  # leaves the caller's generator alone
            torch.manual_seed(seed)
            model = RWKV_Dual(n_embd, n_layer, vocab_size=257, head_size=head_size).to(device, dtype)
    if kind == "state":
        model.add_time_state()
    return model


def _fit(model, optimiser, kind: str, corpus: Corpus, recipe: Recipe, seed: int) -> list[float]:
    """Train in place; returns the loss of every step in bits per byte."""
    tokens = torch.tensor(model.tokenizer.encode(corpus.train))
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    B, T = recipe.batch_size, recipe.ctx_len
    losses = []
    with Progress(kind, total=recipe.steps * B * T, unit="tokens") as progress:
        for step in range(recipe.steps):
            start = torch.randint(len(tokens) - T, (B, 1), generator=generator)
            batch = tokens[start + torch.arange(T + 1)].to(model.get_device())  # [B,T+1]
            set_lr(optimiser, kind, recipe.lr, step, recipe.steps)
            logits, _ = model.parallel(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            losses.append(loss.item() / math.log(2))
            if not math.isfinite(losses[-1]):
                raise NumericsError(f"The loss is {losses[-1]} at step {step}; try a smaller lr than {recipe.lr}.")
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
            optimiser.step()
            progress.advance(B * T)
    return losses


def _measure(model, corpus: Corpus, ctx_len: int, seed: int) -> tuple[float, list[tuple[str, str]]]:
    """Held-out bits per byte, and (prompt, continuation) pairs."""
    bits = bits_per_byte(model, corpus.held_out, ctx_len)
    prompts = _PROMPTS.get(corpus.name) or (corpus.held_out[:20].decode("utf-8", errors="replace"),)
    return bits, [(p, model.generate_with_streaming(p, _SAMPLE_LENGTH, 1.0, 0.95, seed)) for p in prompts]


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
