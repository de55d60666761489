"""Checkpoints of every generation with random weights in which no part is idle, and decays from slow to very fast."""

import torch

from rwkv_lab.checkpoint import Layout, expected_tensors, write_checkpoint
from rwkv_lab.model import RWKV_Dual

VERSIONS = ("4.0", "5.0", "5.1", "5.2", "6.0", "7.0")
# Sizes of models that are exported: those of equal sizes are traced once, which takes seconds. int4 has blocks of 32.
SIZES = {"n_layer": 3, "n_head": 2, "head_size": 32, "dim_ffn": 96, "vocab_size": 257}
ONE_LAYER = {"n_layer": 1, "n_head": 1, "head_size": 32, "dim_ffn": 64, "vocab_size": 257}
_RANKS = {"6.0": {"maa": 5, "decay": 7}, "7.0": {"w": 5, "a": 9, "v": 3, "g": 11}}


def make_layout(version, n_layer=2, n_head=2, head_size=16, n_embd=None, dim_ffn=52, vocab_size=70) -> Layout:
    """n_embd None: as many channels as the heads have. One layer of RWKV-7 has no v0, v1, v2, hence no rank of them."""
    dim_att = n_head * head_size
    ranks = dict(_RANKS.get(version, {}))
    if n_layer == 1:
        ranks.pop("v", None)
    heads = (0, 0) if version == "4.0" else (n_head, head_size)
    return Layout(version, n_layer, n_embd or dim_att, dim_att, dim_ffn, vocab_size, *heads, ranks)


def random_tensors(layout: Layout, seed=0, time_state=False) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    required, optional = expected_tensors(layout)
    shapes = required | ({n: s for n, s in optional.items() if n.endswith("time_state")} if time_state else {})
    return {name: _random(name, shape, layout, g) for name, shape in shapes.items()}


def _random(name, shape, layout, g):
    noise = torch.randn(shape, generator=g)
    part = name.split(".")[-2] if name.endswith((".weight", ".bias")) else name.split(".")[-1]
    if part.startswith("ln"):
        return noise * 0.1 + name.endswith(".weight")
    if part == "time_decay":
        return 2 * noise - 2  # decays e^(-e^x) from 0.9999 to 1e-7 per token
    if part.startswith(("time_mix", "x_")) or part in ("time_maa_k", "time_maa_r"):
        return torch.rand(shape, generator=g)
    if len(shape) == 3 or part in ("emb", "time_first", "time_faaaa"):
        return 0.5 * noise
    return noise * (shape[1] if name.endswith(".weight") else shape[0]) ** -0.5


def write_model(path, layout: Layout, **kwargs):
    write_checkpoint(path, random_tensors(layout, **kwargs), overwrite=True)
    return path


def load_model(folder, version, dtype=torch.float32, seed=0, time_state=False, **sizes) -> RWKV_Dual:
    """Through a file in `folder`, as anyone would; no gradients."""
    path = write_model(folder / "m.safetensors", make_layout(version, **sizes), seed=seed, time_state=time_state)
    return RWKV_Dual.from_pretrained(path, dtype=dtype).requires_grad_(False)


def make_tokens(B, T, vocab_size=70, seed=0) -> torch.Tensor:
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def relative_rms(found, expected) -> float:
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    return float(((found - expected).square().mean() / expected.square().mean()).sqrt())
