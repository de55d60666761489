"""What can be seen inside a running model."""

import pytest
import torch
from random_rwkv7 import make_model, make_tokens, relative_rms

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKVMode, capture
from rwkv_lab.wkv import wkv7

B, T, H, N = 2, 12, 2, 32


def everything(model, mode, tokens):
    model.set_mode(mode)
    with capture(model, names=["*"]) as captured:
        _, state = model(tokens)
    return captured, state


def test_both_modes_show_the_same_numbers_under_the_same_names():
    model, tokens = make_model(dtype=torch.float64), make_tokens(B, T)
    parallel, _ = everything(model, RWKVMode.TRANSFORMER, tokens)
    one_by_one, state = everything(model, RWKVMode.RNN, tokens)
    assert list(parallel) == list(one_by_one)
    for name in parallel:
        if not name.endswith("state"):
            assert relative_rms(one_by_one[name], parallel[name]) < 1e-12, name
    assert parallel["blocks.1.att.state"].shape == (B, 1, H, N, N)
    states = one_by_one["blocks.1.att.state"]
    assert states.shape == (B, T, H, N, N)
    assert torch.equal(states[:, -1], state.wkv[:, 1])
    assert relative_rms(states[:, -1:], parallel["blocks.1.att.state"]) < 1e-12


def test_names_mean_what_the_formulas_say():
    """The recurrence, fed with what was captured, gives the y and the state that were captured."""
    model, tokens = make_model(dtype=torch.float64), make_tokens(B, T)
    seen, _ = everything(model, RWKVMode.TRANSFORMER, tokens)
    r, w, k, v, a, kk, g, y = (seen[f"blocks.1.att.{n}"] for n in ("r", "w", "k", "v", "a", "kk", "g", "y"))
    assert all(z.shape == (B, T, H, N) for z in (r, w, k, v, a, kk, g, y))
    assert w.max() < 0 and w.min() > -0.6066 and a.min() > 0 and a.max() < 1
    expected, state = wkv7(r, w, k, v, -kk, kk * a, backend="reference")
    assert relative_rms(y, expected) < 1e-12
    assert relative_rms(seen["blocks.1.att.state"][:, 0], state) < 1e-12
    x = seen["blocks.0.x"] + seen["blocks.0.att.out"] + seen["blocks.0.ffn.out"]
    assert torch.equal(x, seen["blocks.1.x"])
    assert relative_rms(model.blocks[1].ffn.value(seen["blocks.1.ffn.k"]), seen["blocks.1.ffn.out"]) < 1e-12


def test_only_what_was_asked_for_is_kept_and_only_while_asked():
    model, tokens = make_model(n_layer=3), make_tokens(1, 5)
    with capture(model, names=["w", "ffn.k"], layers=[2, 0]) as outer:
        model(tokens)
        with capture(model, layers=[0]) as inner:
            model(tokens)
    assert list(outer) == ["blocks.0.att.w", "blocks.0.ffn.k", "blocks.2.att.w", "blocks.2.ffn.k"]
    assert outer["blocks.0.att.w"].shape[1] == 10 and inner["blocks.0.att.w"].shape[1] == 5
    assert "blocks.0.att.state" not in inner and "blocks.0.att.g" in inner
    model(tokens)
    assert outer["blocks.0.att.w"].shape[1] == 10
    assert all(not getattr(module, "watchers", ()) for module in model.modules())


def test_watching_changes_nothing_and_ends_after_an_error():
    model, tokens = make_model(), make_tokens(1, 7)
    plain, _ = model(tokens)
    with capture(model, names=["*"]):
        watched, _ = model(tokens)
    assert torch.equal(plain, watched)
    with pytest.raises(RuntimeError, match="mine"), capture(model):
        raise RuntimeError("mine")
    assert not model.blocks[0].att.watchers


def test_refusals():
    model = make_model()
    with pytest.raises(ParameterError, match="layer 2"), capture(model, layers=[2]):
        pass
    with pytest.raises(ParameterError, match="'q'.*kk"), capture(model, names=["w", "q"]) as captured:
        model(make_tokens(1, 1))
    with pytest.raises(ParameterError, match="blocks.9.att.w"):
        captured["blocks.9.att.w"]
