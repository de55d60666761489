"""The model of a training: made from its spec, and opened again from what was written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rwkv_lab import model as models
from rwkv_lab.arguments import checked
from rwkv_lab.lazy_torch import torch
from rwkv_lab.train.spec import KINDS, TrainSpec


def make_model(spec: TrainSpec, start: str | Path = "") -> models.RWKV_Dual:
    """The model that is trained, with all frozen that is not. Draws from torch's generators are its seed's alone.

    Args:
        start: an output of this kind to train further; empty: `spec.start`, or where that is empty a new one.

    Raises:
        RwkvLabError: as `Kind.make_model` and `Kind.open`.
    """
    start, kind = start or spec.start, KINDS[spec.kind]
    with _own_draws(spec.seed, torch.device(spec.device)):
        if not start:
            return _with_tokenizer(kind.make_model(spec), spec)
        model = kind.open(spec, Path(start))
        kind.mark_trained(model)
        return _with_tokenizer(model, spec)


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Those that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@checked
def open_trained(spec: TrainSpec, out: str | Path) -> models.RWKV_Dual:
    """The model that a training ended with, from its output and base alone.

    Raises:
        RwkvLabError: of the files.
    """
    return _with_tokenizer(KINDS[spec.kind].open(spec, Path(out)), spec)


def _with_tokenizer(model: models.RWKV_Dual, spec: TrainSpec) -> models.RWKV_Dual:
    if spec.tokenizer:
        model.tokenizer = spec.tokenizer
    return model


@contextmanager
def _own_draws(seed: int, device: torch.device) -> Iterator[None]:
    """Leave the caller's generators alone, and draw the same whatever they have drawn before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
