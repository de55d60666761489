"""Checkpoints of real shapes with random weights, written without ever holding one in memory."""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from rwkv_lab.checkpoint import Layout, expected_tensors, write_checkpoint
from rwkv_lab.checkpoint.file_layout import file_layout
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.checkpoint.write import write_stream
from rwkv_lab.errors import ParameterError
from rwkv_lab.suggestions import did_you_mean

# The shapes of released models; the 0.3B of RWKV-6 is none of them, it lies between.
SHAPES = {
    "v7-0.1b": Layout("7.0", 12, 768, 768, 3072, 65536, 12, 64, {"w": 64, "a": 64, "v": 32, "g": 128}),
    "v7-0.4b": Layout("7.0", 24, 1024, 1024, 4096, 65536, 16, 64, {"w": 64, "a": 64, "v": 32, "g": 128}),
    "v7-1.5b": Layout("7.0", 24, 2048, 2048, 8192, 65536, 32, 64, {"w": 96, "a": 96, "v": 64, "g": 256}),
    "v6-0.3b": Layout("6.0", 24, 768, 768, 2688, 65536, 12, 64, {"maa": 32, "decay": 64}),
    "v4-169m": Layout("4.0", 12, 768, 768, 3072, 50277, 0, 0),
}
MATRICES = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")


def check_sizes(sizes: Iterable[str]) -> None:
    """Raises:
    ParameterError: a size that is not in `SHAPES`.
    """
    for size in sizes:
        if size not in SHAPES:
            raise ParameterError(f"sizes: {size!r} is none of {', '.join(SHAPES)}{did_you_mean(size, SHAPES)}.")


def random_model(path: Path, layout: Layout) -> None:
    """A whole bfloat16 model of that layout, the same each time; its numbers stay as calm as a trained one's."""
    required, _ = expected_tensors(layout)
    tensors = []
    for i, name in enumerate(sorted(required, key=_late)):
        shape = required[name]
        out = OutTensor(name, shape, torch.bfloat16)
        mean, spread = _distribution(name, shape)
        blocks = partial(_random_blocks, i, out.nbytes // 2, mean, spread)
        tensors.append(OutTensor(name, shape, out.dtype, compute=blocks))
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


def _late(name: str) -> bool:
    """The package `rwkv` tells generations apart by these names only where they come before others."""
    return not any(part in name for part in ("ln_x", "gate.weight", "time_maa"))


# Mean and spread of tensors by how their names end; the first that fits. Matrices are not among them.
_VECTORS = (
    (r"ln\w*\.weight", 1, 0.1),
    (r"ln\w*\.bias", 0, 0.1),
    (r"time_mix_\w|time_maa_\w|x_\w", 0.5, 0.2),
    (r"time_decay|att\.w0", -3, 1.5),  # from a memory of a few tokens to one of hundreds
    (r"time_first|time_faaaa|att\.r_k", 0, 0.3),
    (r"att\.k_k", 0.85, 0.05),
    (r"att\.k_a", 1, 0.05),
    (r"att\.[av]0", 0, 1),
)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    for pattern, mean, spread in _VECTORS:
        if re.search(rf"(^|\.)({pattern})$", name):
            return mean, spread
    if name == "emb.weight":
        return 0, 1
    if not name.endswith(".weight"):  # low-rank pairs: [in, rank], [rank, out], of RWKV-6's five at once [5, rank, out]
        return 0, (0.3 if name.endswith("2") else 1) * shape[-2] ** -0.5
    # A peaked head: with flat logits a quantised model would lose no top-1 choice that means anything.
    return 0, (3 if name == "head.weight" else 0.7) * shape[-1] ** -0.5


def _random_blocks(seed: int, numel: int, mean: float, spread: float) -> Iterator[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    for start in range(0, numel, 1 << 20):
        yield torch.randn(min(1 << 20, numel - start), generator=g).mul_(spread).add_(mean)
