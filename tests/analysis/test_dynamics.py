"""Decays and states along a text, beside the same numbers read off one token at a time."""

import numpy as np
import pytest
import torch
from random_models import VERSIONS, load_model, make_tokens

from rwkv_lab.analysis.dynamics import measure_dynamics
from rwkv_lab.model import capture


@pytest.mark.parametrize("version", VERSIONS)
def test_states_are_those_of_reading_token_by_token(version, tmp_path):
    model = load_model(tmp_path, version, torch.float64, n_layer=3, n_head=2)
    tokens = make_tokens(1, 130)
    found = measure_dynamics(model, tokens)
    assert found.positions == list(range(2, 131, 2)) and found.sizes.shape == (65, 3)
    state = None
    for t in range(130):
        _, state = model.parallel(tokens[:, t : t + 1], state)
        if (t + 1) % 2 == 0:
            held = state.wkv[0, :, 0] / state.wkv[0, :, 1] if version == "4.0" else state.wkv[0]
            expected = [float(layer.square().mean().sqrt()) for layer in held]
            assert found.sizes[t // 2] == pytest.approx(expected, rel=1e-8)
    if version == "4.0":
        assert found.layer is None and found.images.shape == (1, 3, 32)
        np.testing.assert_allclose(found.images[0], held.numpy(), rtol=1e-8)
    else:
        assert found.layer == 1 and found.images.shape == (2, 16, 16)
        np.testing.assert_allclose(found.images, state.wkv[0, 1].numpy(), rtol=1e-8, atol=1e-12)


def test_decays_are_those_that_the_operator_reads(tmp_path):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 20)
    with capture(model, names=["w"]) as captured:
        model.parallel(tokens)
    found = measure_dynamics(model, tokens).log_decays
    assert len(found) == 2 and all((w <= 0).all() for w in found)
    for w, expected in zip(found, captured.values(), strict=True):
        np.testing.assert_array_equal(w, expected.numpy())
