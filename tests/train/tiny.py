"""A tiny base model for tests of training, and settings that take a second."""

import hashlib
from pathlib import Path

from rwkv_lab.train import train

SIZES = dict(n_embd=32, n_layer=2, head_size=16)
SHORT = dict(steps=6, batch_size=4, ctx_len=16, samples=False)
LRS = {"pretrain": 1e-3, "full": 1e-3, "state": 0.3, "lora": 1e-2, "pissa": 3e-3, "miss": 3e-3}


def tiny_text(folder: Path) -> Path:
    """Two texts that repeat themselves; the smaller one is held out or trained on, by its hash."""
    texts = folder / "texts"
    texts.mkdir()
    for i, words in enumerate(("the cat sat on the mat; ", "def cat(mat): return mat + 1\n")):
        (texts / f"{i}.txt").write_text(words * 40)
    return texts


def tiny_base(folder: Path, data: Path) -> Path:
    """A model of a few steps."""
    base = folder / "base.pth"
    train("pretrain", base, str(data), **SHORT | {"steps": 20, "lr": 1e-2}, **SIZES)
    return base


def sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
