"""A tiny base model for tests of training, and settings that take a second."""

import hashlib
from pathlib import Path

from rwkv_lab.train import train

SIZES = dict(n_embd=32, n_layer=2, head_size=16)
SHORT = dict(steps=6, batch_size=4, ctx_len=16, samples=False)
LRS = {"pretrain": 1e-3, "full": 1e-3, "state": 0.03, "lora": 1e-2, "pissa": 3e-3, "miss": 3e-3}


def tiny_text(folder: Path) -> Path:
    """Ten files of a text that repeats itself, no two of them alike: what is held out is like what is trained on."""
    texts = folder / "texts"
    texts.mkdir()
    for i in range(10):
        (texts / f"{i}.txt").write_text(f"the cat sat on {i} mats; " * 20)
    return texts


def tiny_base(folder: Path, data: Path) -> Path:
    """A model of a few steps."""
    base = folder / "base.pth"
    train("pretrain", base, str(data), **SHORT | {"steps": 20, "lr": 1e-2}, **SIZES)
    return base


def sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
