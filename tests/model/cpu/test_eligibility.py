"""Whatever changes what a model computes is computed: the compiled paths fall back to PyTorch, or follow."""

import types

import pytest
import torch
from random_models import load_model, make_tokens, relative_rms
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKV_Dual, RWKVMode, quantise_weights
from rwkv_lab.model.cpu import eligibility
from rwkv_lab.peft import LoraConfig, apply_peft
from rwkv_lab.wkv import use_backend

APART = 2e-5  # float32, summed in another order


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _own_forward(model):
    key = model.blocks[1].ffn.key
    key.forward = types.MethodType(lambda self, x: 2 * nn.functional.linear(x, self.weight), key)


def _other_class(model):
    model.blocks[1].ffn.key.__class__ = Doubled


def _other_module(model):
    model.blocks[1].ffn.key = Doubled(32, 52, bias=False)


def _bias(model):
    model.head.bias = nn.Parameter(torch.full((70,), 3.0), requires_grad=False)


def _other_eps(model):
    model.blocks[1].ln2.eps = 0.5


def _other_eps_of_heads(model):
    model.blocks[1].att.ln_x.eps = 0.5


def _max_norm(model):
    model.emb.max_norm = 0.1


def _transposed_in_place(model):
    with torch.no_grad():
        model.blocks[1].att.output.weight.as_strided_((32, 32), (1, 32))


def _hook(model):
    model.blocks[0].att.output.register_forward_hook(lambda module, inputs, output: 2 * output)


CHANGES = [
    _own_forward,
    _other_class,
    _other_module,
    _bias,
    _other_eps,
    _other_eps_of_heads,
    _max_norm,
    _transposed_in_place,
    _hook,
]


@pytest.mark.parametrize("large", [1 << 24, -1], ids=["compared before", "compared meanwhile"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_counts(tmp_path, monkeypatch, change, large):
    monkeypatch.setattr(eligibility, "_LARGE", large)
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 9)
    modes = [mode for mode in RWKVMode for _ in range(2)]
    for mode in modes:  # all is ready and in use
        model.set_mode(mode)
        before = model(tokens)[0]
    change(model)
    for mode in modes:
        model.set_mode(mode)
        found = model(tokens)[0]
        with use_backend("reference"):
            expected = model(tokens)[0]
        assert relative_rms(found, expected) < APART < 1e-3 < relative_rms(found, before)


def test_hooks_of_all_modules_are_called(tmp_path):
    model, tokens, seen = load_model(tmp_path, "7.0"), make_tokens(1, 5), []
    for mode in RWKVMode:
        model.set_mode(mode)
        model(tokens)
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        model(tokens)
        handle.remove()
        assert nn.GroupNorm not in seen and {nn.Linear, nn.LayerNorm, nn.Embedding, RWKV_Dual} <= set(seen)
        seen.clear()


def test_operators_are_counted(tmp_path):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 5)
    for mode in RWKVMode:
        model.set_mode(mode)
        with FlopCounterMode(display=False) as counter:
            model(tokens)
        # two per product of the square matrices alone: 4 of C² and 2 of C·F per layer, and the head
        assert counter.get_total_flops() > 2 * 5 * (2 * (4 * 32**2 + 2 * 32 * 52) + 32 * 70)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, for its derivatives
@pytest.mark.parametrize("mode", RWKVMode)
def test_forward_derivatives_are_those_of_differences(tmp_path, mode):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 5)
    model.set_mode(mode)
    weight = model.blocks[0].att.key.weight.clone()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with forward_ad.dual_level():
        del model.blocks[0].att.key.weight
        model.blocks[0].att.key.weight = forward_ad.make_dual(weight, direction)
        found = forward_ad.unpack_dual(model(tokens)[0]).tangent
    double = load_model(tmp_path, "7.0").double()
    double.set_mode(mode)
    there = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            double.blocks[0].att.key.weight.copy_(weight.double() + step * direction.double())
        there.append(double(tokens)[0])
    assert relative_rms(found, (there[0] - there[1]) / 2e-5) < 1e-4  # the difference's own error is below 1e-6


def test_gradients_begin_between_two_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(eligibility, "_LARGE", -1)
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 3)
    model.set_mode(RWKVMode.RNN)
    for _ in range(2):
        model(tokens)
    model.head.weight = nn.Parameter(model.head.weight.clone())
    assert model(tokens)[0].requires_grad


def test_a_subclass_is_asked(tmp_path):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 3)

    class Louder(RWKV_Dual):
        def _logits(self, x):
            return 2 * super()._logits(x)

    expected = 2 * model(tokens)[0]
    model.__class__ = Louder
    for mode in RWKVMode:
        model.set_mode(mode)
        assert relative_rms(model(tokens)[0], expected) < APART


def test_what_no_checkpoint_holds_is_not_saved_or_rounded(tmp_path):
    model = load_model(tmp_path, "7.0")
    with pytest.raises(ParameterError, match="emb, a PackedEmbedding, which no checkpoint holds"):
        quantise_weights(model).save_pretrained(tmp_path / "rounded")
    apply_peft(model, LoraConfig(lora_r=2, lora_target_modules=["head"]))
    with pytest.raises(ParameterError, match="head, a LoraLinear, which no checkpoint holds"):
        model.save_pretrained(tmp_path / "adapted")
    with pytest.raises(ParameterError, match="has head, a LoraLinear.*after adapters are merged"):
        quantise_weights(model)
    assert not (tmp_path / "rounded").exists() and not (tmp_path / "adapted").exists()


def test_rounding_does_not_drop_a_hook(tmp_path):
    model = load_model(tmp_path, "7.0")
    _hook(model)
    with pytest.raises(ParameterError, match="blocks.0.att.output has a hook"):
        quantise_weights(model)
    with pytest.raises(ParameterError, match="not of a NoneType"):
        quantise_weights(None)
