"""What decides the result of a training: recorded in its output, and compared when it is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rwkv_lab.checkpoint import FileFacts
from rwkv_lab.lazy_torch import torch
from rwkv_lab.train.data import Corpus
from rwkv_lab.train.examples import Examples
from rwkv_lab.train.spec import KINDS, ResolvedSpec
from rwkv_lab.train.token_files import TokenCorpus

_TOKENS_AT_ONCE = 1 << 24  # of a mapped file, while its fingerprint is taken


def recorded_settings(
    spec: ResolvedSpec, corpus: Corpus | Examples | TokenCorpus, inputs: Sequence[FileFacts]
) -> dict[str, object]:
    """What decides the result, in terms of JSON: travels in the output, and must be the same to resume."""
    defaults = KINDS[spec.kind].defaults
    settings: dict[str, object] = {
        "kind": spec.kind,
        "dtype": spec.dtype,
        "autocast": spec.autocast,
        "device": torch.device(spec.device).type,
        "quant": spec.quant,
        "rank": spec.effective("rank"),
        "alpha": spec.alpha,
        "targets": spec.targets or None,
        "train_parts": spec.train_parts,
        "seed": spec.seed,
        "data": spec.data,
        "steps": spec.steps,
        "batch_size": spec.batch_size,
        "ctx_len": spec.ctx_len,
        "lr": spec.lr,
        "final_lr": defaults.final_lr,
        "weight_decay": defaults.weight_decay,
        "warmup": spec.warmup,
        "accumulate": spec.accumulate,
    }
    if not inputs:
        settings |= {"n_embd": spec.n_embd, "n_layer": spec.n_layer, "head_size": spec.head_size}
    settings["text"] = _fingerprint(corpus)
    settings |= {"tokenizer": _fingerprint_of(spec.tokenizer)} if spec.tokenizer else {}
    settings |= {"long": spec.long} if spec.long else {}
    settings |= {"started_from": inputs[-1].fingerprint} if spec.start else {}
    settings |= {"eval_every": spec.eval_every, "patience": spec.patience} if spec.eval_every else {}
    return settings | ({"base": inputs[0].fingerprint} if inputs else {})


def _fingerprint(corpus: Corpus | Examples | TokenCorpus) -> str:
    digest = hashlib.sha256()
    for part in (corpus.train, corpus.held_out):
        if isinstance(part, np.ndarray):
            digest.update(len(part).to_bytes(8, "little") + part.dtype.str.encode())
            for start in range(0, len(part), _TOKENS_AT_ONCE):
                digest.update(part[start : start + _TOKENS_AT_ONCE].tobytes())
            continue
        texts = [part] if isinstance(part, bytes) else [text for e in part for turn in e.turns for text in turn]
        for text in texts:
            digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()[:16]


def _fingerprint_of(tokenizer: str) -> str:
    """A tokenizer's name; of a file its hash, whatever it is called."""
    path = Path(tokenizer)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else tokenizer
