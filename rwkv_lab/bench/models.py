"""Checkpoints of real shapes with random weights, written without ever holding one in memory."""

from collections.abc import Iterator
from pathlib import Path

import torch

from rwkv_lab.checkpoint import Layout, expected_tensors, write_checkpoint
from rwkv_lab.checkpoint.file_layout import file_layout
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.checkpoint.write import write_stream

# The shapes of released RWKV-7 World models (rwkv_facts §1.5).
SHAPES = {
    "0.1B": Layout("7.0", 12, 768, 768, 3072, 65536, 12, 64, {"w": 64, "a": 64, "v": 32, "g": 128}),
    "0.4B": Layout("7.0", 24, 1024, 1024, 4096, 65536, 16, 64, {"w": 64, "a": 64, "v": 32, "g": 128}),
    "1.5B": Layout("7.0", 24, 2048, 2048, 8192, 65536, 32, 64, {"w": 96, "a": 96, "v": 64, "g": 256}),
}
MATRICES = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")


def random_model(path: Path, layout: Layout) -> None:
    """A whole bfloat16 model of that layout."""
    required, _ = expected_tensors(layout)
    tensors = []
    for i, (name, shape) in enumerate(required.items()):
        out = OutTensor(name, shape, torch.bfloat16)
        tensors.append(OutTensor(name, shape, out.dtype, compute=lambda i=i, n=out.nbytes // 2: _random_blocks(i, n)))
    write_stream(path, tensors, file_layout("pth", tensors, {}), False, scan=lambda t: False)


def random_state(path: Path, layout: Layout) -> None:
    """A float32 state file for a model of that layout."""
    shape = (layout.n_head, layout.head_size, layout.head_size)
    g = torch.Generator().manual_seed(1)
    states = {f"blocks.{i}.att.time_state": torch.randn(shape, generator=g) for i in range(layout.n_layer)}
    write_checkpoint(path, states)


def random_lora(path: Path, layout: Layout, rank: int) -> None:
    """A bfloat16 LoRA of every attention and FFN matrix."""
    required, _ = expected_tensors(layout)
    g = torch.Generator().manual_seed(2)
    halves = {}
    for i in range(layout.n_layer):
        for matrix in MATRICES:
            out, width = required[f"blocks.{i}.{matrix}.weight"]
            halves[f"blocks.{i}.{matrix}.lora_A"] = (torch.randn(rank, width, generator=g) / width**0.5).bfloat16()
            halves[f"blocks.{i}.{matrix}.lora_B"] = (torch.randn(out, rank, generator=g) * 0.01).bfloat16()
    write_checkpoint(path, halves)


def _random_blocks(seed: int, numel: int) -> Iterator[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    for start in range(0, numel, 1 << 20):
        yield torch.randn(min(1 << 20, numel - start), generator=g).mul_(0.02)
