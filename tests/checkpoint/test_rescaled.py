"""Weights that were halved after every few layers are told from those that were not."""

import pytest
import torch

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.checkpoint.rescaled import looks_rescaled


def model(n_layer, sizes, every=0, dtype=torch.bfloat16):
    """att.output and ffn.value alone, of the sizes given by layer, halved."""
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(n_layer):
        for name, shape in (("att.output", (64, 64)), ("ffn.value", (64, 256))):
            values = sizes(i) * torch.randn(shape, generator=g)
            tensors[f"blocks.{i}.{name}.weight"] = values.to(dtype) / 2 ** (i // every if every else 0)
    return tensors


def found(tensors, every, folder):
    write_checkpoint(folder / "m.safetensors", tensors, overwrite=True)
    with open_checkpoint(folder / "m.safetensors") as ck:
        return looks_rescaled(ck.info, every)


@pytest.mark.parametrize("sizes", [lambda i: 1, lambda i: 1.15**i, lambda i: 0.9**i, lambda i: 1 + 0.2 * (i % 2)])
@pytest.mark.parametrize(("n_layer", "every"), [(7, 6), (12, 6), (24, 6), (9, 4)])
def test_halved_and_not(sizes, n_layer, every, tmp_path):
    assert found(model(n_layer, sizes, every), every, tmp_path)
    assert not found(model(n_layer, sizes), every, tmp_path)


def test_what_is_no_rescaling(tmp_path):
    assert not found(model(6, lambda i: 1, 6), 6, tmp_path), "no layer that would be halved"
    assert not found(model(12, lambda i: 0.5**i), 6, tmp_path), "smaller from layer to layer"
    assert not found(model(12, lambda i: 0.0), 6, tmp_path), "a fresh model: all zero"
    one = model(12, lambda i: 1)
    halved = {n: t / 2 if n.startswith("blocks.6.att.output") else t for n, t in one.items()}
    assert not found(halved, 6, tmp_path), "one matrix of one layer"
    assert not found(model(12, lambda i: 1, 4), 6, tmp_path), "after other layers"
