"""Small checkpoints of every generation with random weights, and what can be merged into them."""

import hashlib
from pathlib import Path

import torch

from rwkv_lab.checkpoint import Layout, expected_tensors

LAYOUTS = {
    "4.0": Layout("4.0", 2, 16, 16, 64, 11, 0, 0),
    "5.0": Layout("5.0", 2, 16, 16, 64, 11, 4, 4),
    "5.1": Layout("5.1", 2, 16, 16, 56, 11, 4, 4),
    "5.2": Layout("5.2", 2, 16, 16, 56, 11, 4, 4),
    "6.0": Layout("6.0", 2, 16, 16, 56, 11, 4, 4, {"maa": 3, "decay": 6}),
    "7.0": Layout("7.0", 2, 16, 16, 64, 11, 4, 4, {"w": 4, "a": 3, "v": 2, "g": 5}),
}
SEVEN = LAYOUTS["7.0"]
MATRICES = ("att.key", "att.value", "att.output", "ffn.key", "ffn.value")


def random_model(layout: Layout = SEVEN, dtype=torch.bfloat16, seed: int = 0, unused: bool = False) -> dict:
    """Every required tensor; with `unused` also layer 0's v0, v1, v2."""
    required, optional = expected_tensors(layout)
    shapes = required | ({n: s for n, s in optional.items() if "time_state" not in n} if unused else {})
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def random_state(layout: Layout = SEVEN, dtype=torch.float32, seed: int = 1) -> dict:
    g = torch.Generator().manual_seed(seed)
    shape = (layout.n_head, layout.head_size, layout.head_size)
    return {f"blocks.{i}.att.time_state": torch.randn(shape, generator=g).to(dtype) for i in range(layout.n_layer)}


def random_lora(layout: Layout = SEVEN, rank: int = 3, dtype=torch.bfloat16, seed: int = 2, full: bool = True) -> dict:
    """LoRA halves of every matrix; with `full` also whole `ln1` tensors, as trainers save them."""
    required, _ = expected_tensors(layout)
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(layout.n_layer):
        for matrix in MATRICES:
            rows, columns = required[f"blocks.{i}.{matrix}.weight"]
            tensors[f"blocks.{i}.{matrix}.lora_A"] = torch.randn(rank, columns, generator=g).to(dtype)
            tensors[f"blocks.{i}.{matrix}.lora_B"] = torch.randn(rows, rank, generator=g).to(dtype)
        if full:
            tensors[f"blocks.{i}.ln1.weight"] = torch.randn(layout.n_embd, generator=g).to(dtype)
    return tensors


def bits(tensor: torch.Tensor) -> bytes:
    """Its values in order, as bytes: NaN and -0 are equal to themselves and to nothing else."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def snapshot(folder: Path) -> dict[str, str]:
    """What lies in a folder and below it: name -> hash of its content."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }
