"""Prompts of models in 8 or 4 bits: the compiled prefill beside PyTorch with the same rounded weights."""

import pytest
import torch
from random_models import load_model, relative_rms

from rwkv_lab.model import quantise_weights
from rwkv_lab.model.cpu import prefill

# Widths that end inside a group of 64 codes, and inside a line of 128.
SIZES = {
    "4.0": {"n_embd": 100, "dim_ffn": 300},
    "5.2": {},
    "6.0": {},
    "7.0": {"n_embd": 100, "n_head": 5, "head_size": 20},
}


def by_torch(model, tokens, state):
    """A hook that does nothing keeps the compiled paths away."""
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    try:
        return model(tokens, state)
    finally:
        handle.remove()


# float32: sums of up to 300 products in another order, a few units in the last place. int8: such a unit may, rarely,
# bring an activation to its next number, a 127th of its group's largest away, which the state carries to later tokens:
# the median is over three texts. Activations that are not rounded move it by 8e-3 to 2e-2.
APART = {"float32": 1e-5, "int8": 5e-3}


def apart(found, expected, activations):
    if activations == "float32":
        return relative_rms(found, expected)
    return ((found - expected).norm(dim=-1) / (expected.norm(dim=-1) + 1e-9)).median()


@pytest.mark.parametrize("activations", APART)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("version", SIZES)
@torch.inference_mode()
def test_the_same_as_by_pytorch(tmp_path, version, scheme, activations):
    model = quantise_weights(load_model(tmp_path, version, **SIZES[version]), scheme, activations=activations)
    limit, texts = APART[activations], 1 if activations == "float32" else 3
    torch.manual_seed(0)
    state = None
    # few rows take another way than many; 600 are more than a block
    for B, T in ((texts, 37), (1, 2), (3, 130), (texts, 600)):
        tokens = torch.randint(0, 70, (B, T))
        state = state.rows([0] * B) if state is not None else None
        found, after = model(tokens, state)
        expected, other = by_torch(model, tokens, state)
        assert apart(found, expected, activations) < limit and apart(after.wkv, other.wkv, activations) < limit
        state = after.rows([0])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@torch.inference_mode()
def test_bfloat16_rounds_no_more_than_its_dtype(tmp_path, scheme):
    exact = quantise_weights(load_model(tmp_path, "7.0", **SIZES["7.0"]), scheme)
    model = quantise_weights(load_model(tmp_path, "7.0", dtype=torch.bfloat16, **SIZES["7.0"]), scheme)
    tokens = torch.randint(0, 70, (2, 65))
    wanted = exact(tokens)[0]
    ours, theirs = (relative_rms(x.float(), wanted) for x in (model(tokens)[0], by_torch(model, tokens, None)[0]))
    assert ours < 2 * theirs  # both round activations to bfloat16; PyTorch rounds the residual stream, too


@torch.inference_mode()
def test_prompts_do_not_fall_back_to_pytorch(tmp_path, monkeypatch):
    model = quantise_weights(load_model(tmp_path, "7.0", head_size=32), "int8")
    calls, run = [], prefill.run
    monkeypatch.setattr(prefill, "run", lambda *given: calls.append(1) or run(*given))
    assert model(torch.randint(0, 70, (1, 20)))[0].isfinite().all() and calls == [1]
