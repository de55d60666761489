"""The model's logits and states against the formulas in numpy, and against a model's figures from elsewhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy_rwkv7 import NumpyRwkv7
from numpy_rwkv456 import NumpyRwkv456
from random_models import VERSIONS, load_model
from random_rwkv7 import add_random_time_state, make_model, make_tokens, relative_rms

from rwkv_lab.model import RWKV_Dual, RWKVMode

MODES = list(RWKVMode)
MODELS = Path(__file__).parents[2].parent / "shared" / "models"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("n_embd, head_size", [(32, 32), (64, 32), (64, 64), (64, 8)])
def test_float64_follows_the_formulas(n_embd, head_size, tuned, mode):
    model = make_model(n_embd, 3, head_size=head_size, dtype=torch.float64)
    if tuned:
        add_random_time_state(model)
    model.set_mode(mode)
    tokens = make_tokens(1, 37)
    logits, state = model(tokens)
    reference = NumpyRwkv7(model.state_dict(), head_size)
    expected = np.stack([reference.step(int(t)) for t in tokens[0]])
    # Two float64 implementations; a few hundred rounding errors of 1e-16 through three layers and 37 tokens.
    assert relative_rms(logits[0], expected) < 1e-12
    assert relative_rms(state.wkv[0], np.stack(reference.wkv)) < 1e-12
    assert relative_rms(state.att_shift[0], np.stack(reference.att_shift)) < 1e-12
    assert relative_rms(state.ffn_shift[0], np.stack(reference.ffn_shift)) < 1e-12


ODD_SHAPES = [
    dict(n_layer=1, n_head=1, head_size=32, n_embd=20),
    dict(n_layer=2, n_head=3, head_size=8, n_embd=36, dim_ffn=50),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [*ODD_SHAPES, dict(n_layer=2, n_head=1, head_size=64, time_state=True)], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_generation_in_float64_follows_the_formulas(tmp_path, version, sizes, mode):
    """Also what no other implementation computes: dim_att != n_embd, 5.0 with one head, tuned states of one head."""
    if version == "4.0":
        sizes = sizes | {"time_state": False}
    model = load_model(tmp_path, version, torch.float64, **sizes)
    model.set_mode(mode)
    tokens = make_tokens(1, 37, 70)
    logits, state = model(tokens)
    if version == "7.0":
        reference = NumpyRwkv7(model.state_dict(), model.layout.head_size)
    else:
        reference = NumpyRwkv456(model.state_dict(), model.layout)
    assert relative_rms(logits[0], np.stack([reference.step(int(t)) for t in tokens[0]])) < 1e-12
    a, b, p = state.wkv[0].unbind(1) if version == "4.0" else (None, None, None)
    wkv = torch.stack([a, b], 1) * p.exp().unsqueeze(1) if version == "4.0" else state.wkv[0]
    assert relative_rms(wkv, np.stack(reference.wkv)) < 1e-12
    assert relative_rms(state.att_shift[0], np.stack(reference.att_shift)) < 1e-12
    assert relative_rms(state.ffn_shift[0], np.stack(reference.ffn_shift)) < 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tiny-4v0-660K", "tiny-7v0-834K"])
def test_a_model_that_others_trained(name, mode):
    """Logits after `"in`, computed by rwkv.cpp; the RWKV-7 has one head, and no v0, v1, v2 in layer 0."""
    path = MODELS / f"{name}.pth"
    if not path.exists():
        pytest.skip("../shared/models is not there")
    model = RWKV_Dual.from_pretrained(path, mode=mode)
    logits, _ = model(torch.tensor([model.tokenizer.encode('"in')]))
    expected = np.load(path.with_name(f"{name}.expected_logits.npy"))
    assert relative_rms(logits[0, -1], expected) < 1e-5
