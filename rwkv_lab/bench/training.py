"""Training speed of the demo model on each backend of the WKV operator."""

import time
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch.nn import functional as F

from rwkv_lab.arguments import checked
from rwkv_lab.bench.comparison import Agreement, Rounds, Row, interleave, log_row, median_share, refusal, relative_rms
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.train import TrainSpec
from rwkv_lab.train.optimiser import make_optimiser, schedule
from rwkv_lab.wkv import use_backend

LIMIT = 1e-3  # relative RMS of all gradients in float32, beside the reference: sums over a thousand tokens
_STEPS = 2  # of one sample
_SIZES = {"n_embd": 128, "n_layer": 3, "vocab_size": 257, "head_size": 32}  # of the demo model


@checked
def measure_training(
    backends: Sequence[str], rounds: Rounds, length: Annotated[int, Ge(1), Le(2**20)] | None = None
) -> list[Row]:
    """Tokens per second of whole training steps (size: tokens of one step), and each backend's ratio to `chunked`.

    Args:
        length: bytes per text; None for that of a pretraining.
    """
    spec, tokens = pretraining(length)
    expected = _gradients("reference", tokens)
    entries, agreed, rows = {}, {}, []
    for backend in backends:
        try:
            agreement = Agreement(relative_rms(_gradients(backend, tokens), expected), LIMIT, positions=tokens.numel())
        except RwkvLabError as e:
            rows.append(log_row(_row(backend, tokens, problem=str(e).splitlines()[0])))
            continue
        if agreement.passed:
            agreed[backend] = agreement
            entries[backend] = training_steps(backend, tokens, spec)
        else:
            rows.append(log_row(_row(backend, tokens, agreement=agreement, problem=refusal(agreement))))
    results = interleave(entries, rounds)
    for backend, (samples, other_load) in results.items():
        shares = {"chunked": median_share(samples, results["chunked"][0])} if "chunked" in results else {}
        values = {"samples": samples, "other_load": other_load, "agreement": agreed[backend], "shares": shares}
        rows.append(log_row(_row(backend, tokens, **values)))
    return rows


def _row(backend: str, tokens: torch.Tensor, **values) -> Row:
    size = tokens.shape[0] * (tokens.shape[1] - 1)
    return Row("training", "demo model", backend, "fp32", size, "tokens/s", **values)


def pretraining(length: int | None = None) -> tuple[TrainSpec, torch.Tensor]:
    """The demo model's training, and random bytes `[B,T+1]` for one step of it."""
    spec = TrainSpec.read({"kind": "pretrain"})
    g = torch.Generator().manual_seed(0)
    shape = spec.effective("batch_size"), (length or spec.effective("ctx_len")) + 1
    return spec, torch.randint(256, shape, generator=g)


def demo_model() -> RWKV_Dual:
    """A fresh model of the demo model's sizes, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RWKV_Dual(**_SIZES)


def _gradients(backend: str, tokens: torch.Tensor) -> torch.Tensor:
    """All gradients of the first step's loss, one after the other."""
    model = demo_model()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for p in model.parameters():  # a fresh model's output matrices are zeros, and hide what comes before them
            p.add_(torch.randn_like(p), alpha=0.02)
    with use_backend(backend):
        _loss(model, tokens).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _loss(model: RWKV_Dual, tokens: torch.Tensor) -> torch.Tensor:
    logits, _ = model.parallel(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def training_steps(backend: str, tokens: torch.Tensor, spec: TrainSpec) -> Callable[[], float]:
    """A function that takes one sample: tokens per second of whole training steps."""
    model = demo_model()
    optimiser = make_optimiser(dict(model.named_parameters()), schedule(spec))

    def take() -> float:
        start = time.perf_counter()
        with use_backend(backend):
            for _ in range(_STEPS):
                loss = _loss(model, tokens)
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
        return _STEPS * tokens.shape[0] * (tokens.shape[1] - 1) / (time.perf_counter() - start)

    return take
