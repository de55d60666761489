"""What can be seen inside a running model."""

import pytest
import torch
from random_models import VERSIONS, load_model
from random_rwkv7 import make_model, make_tokens, relative_rms

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKVMode, capture
from rwkv_lab.wkv import wkv4, wkv5, wkv6, wkv7

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


ATT = {
    "4.0": "x r w k v y state out",
    "5.0": "x r w k v y state out",
    "5.1": "x r w k v g y state out",
    "5.2": "x r w k v g y state out",
    "6.0": "x r w k v g y state out",
    "7.0": "x r w v a kk k g y state out",
}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_generation_shows_its_operators_in_both_modes(version, tmp_path):
    """Names, order and shapes; both modes show the same numbers; the last state is the one that the model returns."""
    model, T = load_model(tmp_path, version, torch.float64, head_size=8, n_embd=24), 9
    tokens = make_tokens(B, T, vocab_size=70)
    parallel, _ = everything(model, RWKVMode.TRANSFORMER, tokens)
    one_by_one, final = everything(model, RWKVMode.RNN, tokens)
    ffn = "x k out" if version == "7.0" else "x r k out"
    names = ["x", *(f"att.{name}" for name in ATT[version].split()), *(f"ffn.{name}" for name in ffn.split())]
    assert list(parallel) == list(one_by_one) == [f"blocks.{i}.{name}" for i in range(2) for name in names]
    A, C = (16,) if version == "4.0" else (2, 8), (24,)
    for name in parallel:
        part = name.split(".", 2)[2]
        if part == "att.state":
            shape = (3, 16) if version == "4.0" else (2, 8, 8)
            assert parallel[name].shape == (B, 1, *shape) and one_by_one[name].shape == (B, T, *shape)
            assert relative_rms(one_by_one[name][:, -1], parallel[name][:, 0]) < 1e-12
            continue
        width = C if part in ("x", "att.x", "att.out", "ffn.x", "ffn.r", "ffn.out") else A
        assert parallel[name].shape == (B, T, *((52,) if part == "ffn.k" else width)), name
        assert relative_rms(one_by_one[name], parallel[name]) < 1e-12, name
    assert torch.equal(one_by_one["blocks.1.att.state"][:, -1], final.wkv[:, 1])
    assert all(parallel[f"blocks.{i}.att.w"].max() <= 0 for i in range(2))


@pytest.mark.parametrize("mode", list(RWKVMode))
@pytest.mark.parametrize("version", [v for v in VERSIONS if v != "7.0"])
def test_the_recurrence_fed_with_what_was_captured_gives_what_was_captured(version, mode, tmp_path):
    model = load_model(tmp_path, version, torch.float64, head_size=8)
    seen, final = everything(model, mode, make_tokens(B, 9, vocab_size=70))
    r, w, k, v, y = (seen[f"blocks.1.att.{name}"] for name in "rwkvy")
    att = model.blocks[1].att
    if version == "4.0":
        expected, state = wkv4(w[0, 0], att.time_first, k, v, backend="reference")
    elif version == "6.0":
        expected, state = wkv6(r, w, k, v, att.time_faaaa, backend="reference")
    else:
        u = att.time_first.exp() if att.log_bonus else att.time_faaaa
        expected, state = wkv5(r, w[0, 0], k, v, u.view(2, -1).expand(2, 8), backend="reference")
    assert relative_rms(y, expected) < 1e-12
    assert relative_rms(seen["blocks.1.att.state"][:, -1], state) < 1e-12
    assert relative_rms(final.wkv[:, 1], state) < 1e-12
    x = seen["blocks.0.x"] + seen["blocks.0.att.out"] + seen["blocks.0.ffn.out"]
    assert relative_rms(seen["blocks.1.x"], x) < 1e-15
    channel_mix = seen["blocks.1.ffn.r"] * model.blocks[1].ffn.value(seen["blocks.1.ffn.k"])
    assert relative_rms(seen["blocks.1.ffn.out"], channel_mix) < 1e-12


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
    assert all(not getattr(module, "receivers", ()) for module in model.modules())


def test_capture_changes_nothing_and_ends_after_an_error():
    model, tokens = make_model(), make_tokens(1, 7)
    plain, _ = model(tokens)
    with capture(model, names=["*"]):
        logits, _ = model(tokens)
    # Without capture a compiled form may run, which rounds in other places.
    assert relative_rms(logits, plain) < 1e-6
    with pytest.raises(RuntimeError, match="mine"), capture(model):
        raise RuntimeError("mine")
    assert not model.blocks[0].att.receivers


def test_names_are_patterns_of_the_one_rule():
    model, tokens = make_model(), make_tokens(1, 3)
    for names, expected in (
        (["blocks.1.ffn"], ["blocks.1.ffn.x", "blocks.1.ffn.k", "blocks.1.ffn.out"]),
        (["att.[kv]"], ["blocks.0.att.v", "blocks.0.att.k", "blocks.1.att.v", "blocks.1.att.k"]),
        (["blocks.0.x", "ffn.k"], ["blocks.0.x", "blocks.0.ffn.k", "blocks.1.ffn.k"]),
    ):
        with capture(model, names=names) as captured:
            model(tokens)
        assert list(captured) == expected


def test_refusals():
    model = make_model()
    with pytest.raises(ParameterError, match="layer 2"), capture(model, layers=[2]):
        pass
    with pytest.raises(ParameterError, match="'q'.*kk"), capture(model, names=["w", "q"]) as captured:
        model(make_tokens(1, 1))
    with pytest.raises(ParameterError, match="blocks.9.att.w"):
        captured["blocks.9.att.w"]
