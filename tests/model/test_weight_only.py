"""Weights in 8 and 4 bits: what they become, that both paths compute with the same, and what it costs."""

import copy

import pytest
import torch
from random_models import VERSIONS, load_model, make_tokens, relative_rms

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKVMode, agreement_of_logits, generate, quantise_weights
from rwkv_lab.model.cpu import step
from rwkv_lab.model.weight_only import SCHEMES, PackedEmbedding, PackedLinear
from rwkv_lab.wkv import use_backend

# Half a step of the codes, relative to the largest number of a group: 8 bits have 127 steps, 4 bits have 8 on one side
# and 7 on the other, and the best of several scales is at most as bad as the first in squares. bfloat16 scales are off
# by at most 2^-9.
COARSE = {"int8": 1 / 254 + 2**-8, "int4": 1 / 8}


@pytest.mark.parametrize("scheme", COARSE)
@pytest.mark.parametrize("columns", [1, 64, 130, 300])
def test_numbers_stay_near(scheme, columns):
    weight = torch.randn(37, columns, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    packed = PackedLinear(weight, SCHEMES[scheme])
    found = packed.dequantised()
    assert found.shape == weight.shape and not found[3].any()
    assert (found - weight).abs().max() <= COARSE[scheme] * weight.abs().max()
    assert relative_rms(found, weight) < {"int8": 8e-3, "int4": 0.1}[scheme]
    rows = torch.tensor([[5, 3], [36, 0]])
    assert torch.equal(packed.dequantised(rows), found[rows])
    assert torch.equal(PackedEmbedding(weight, SCHEMES[scheme])(rows), found[rows])
    again = PackedLinear(found, SCHEMES[scheme]).dequantised()
    assert relative_rms(again, found) < {"int8": 5e-3, "int4": 0.06}[scheme]


def test_bytes_are_those_that_were_promised():
    weight = torch.randn(256, 768)
    for scheme, bits in (("int8", 8.25), ("int4", 4.5)):
        packed = PackedLinear(weight, SCHEMES[scheme])
        assert (packed.codes.nbytes + packed.scales.nbytes) * 8 == bits * weight.numel()


@pytest.mark.parametrize("scheme", COARSE)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_step_computes_with_exactly_the_rounded_weights(tmp_path, version, scheme):
    for sizes in (dict(), dict(n_head=3, head_size=32, n_embd=70, dim_ffn=150)):
        model = quantise_weights(load_model(tmp_path, version, **sizes), scheme)
        model.set_mode(RWKVMode.RNN)
        for B in (1, 3, 9, 21):
            tokens = make_tokens(B, 4)
            logits, state = model(tokens)
            with use_backend("reference"):
                expected, right = model(tokens)
            assert logits.dtype == torch.float32
            assert relative_rms(logits, expected) < 2e-5  # float32 rounding in another order
            assert relative_rms(state.wkv, right.wkv) < 2e-5


@pytest.mark.parametrize("scheme", COARSE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_batches_of_16_bits_are_as_near_to_float64_as_the_modules(tmp_path, scheme, dtype):
    for sizes in (dict(n_head=1, head_size=64, n_embd=50, dim_ffn=77), dict(n_head=3, head_size=32, dim_ffn=150)):
        model = quantise_weights(load_model(tmp_path, "7.0", dtype=dtype, **sizes), scheme)
        model.set_mode(RWKVMode.RNN)
        tokens = make_tokens(37, 2)
        found = model(tokens)
        with use_backend("reference"):
            expected, right = model(tokens), copy.deepcopy(model).double()(tokens)
        # The factor is that of cpu/test_step.
        assert relative_rms(found[0], right[0]) < 2 * relative_rms(expected[0], right[0]) + 1e-3


def test_a_rounded_model_is_the_model_of_its_dequantised_weights(tmp_path):
    plain = load_model(tmp_path, "7.0")
    packed = quantise_weights(plain, "int4", activations="float32")
    restored = copy.deepcopy(plain)
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            restored.get_submodule(name).weight.data = module.dequantised()
    tokens = make_tokens(2, 30)
    for mode in RWKVMode:
        packed.set_mode(mode)
        assert relative_rms(packed(tokens)[0], restored(tokens)[0]) < 2e-5
    assert type(plain.head) is torch.nn.Linear  # the one given is as it was


def test_it_reads_prompts_and_writes_texts_by_the_step(tmp_path, monkeypatch):
    calls, before = [], step.run
    monkeypatch.setattr(step, "run", lambda *args: calls.append(1) or before(*args))
    plain = load_model(tmp_path, "7.0", vocab_size=256, dtype=torch.bfloat16)
    same = quantise_weights(plain, "int8", in_place=True)
    assert same is plain and type(same.head) is PackedLinear and same.ln_out.weight.dtype == torch.bfloat16
    assert not list(same.head.parameters()) and same.emb.weight.isnan().all() and same.emb.weight.shape == (256, 32)
    wide = quantise_weights(load_model(tmp_path, "7.0", vocab_size=256), "int8")  # in bfloat16 rounding chooses words
    texts = generate(wide, ["abc", "x"], max_new_tokens=5, temperature=0)
    assert len(calls) >= 4
    with use_backend("reference"):
        assert generate(wide, ["abc", "x"], max_new_tokens=5, temperature=0) == texts
    same.double()
    tokens = make_tokens(1, 5)
    assert same(tokens)[0].dtype == torch.float64


def test_the_cost_is_told(tmp_path):
    model, tokens = load_model(tmp_path, "7.0", head_size=32), make_tokens(2, 50)
    expected = model(tokens)[0]
    costs = {scheme: agreement_of_logits(quantise_weights(model, scheme)(tokens)[0], expected) for scheme in COARSE}
    assert 0 < costs["int8"].kl < 1e-3 < costs["int4"].kl < 0.5
    assert costs["int4"].top1 < costs["int8"].top1 <= 1 and costs["int8"].positions == 100
    for scheme in COARSE:  # rounding activations to 8 bits costs about what rounding weights to 8 bits does
        wide, rounded = (quantise_weights(model, scheme, activations=a)(tokens)[0] for a in ("float32", "int8"))
        assert 0 < agreement_of_logits(rounded, wide).kl < 4 * costs["int8"].kl
    itself = agreement_of_logits(expected, expected)
    assert (itself.kl, itself.kl_worst, itself.top1, itself.error) == (0, 0, 1, 0)
    assert "top-1 100.0%" in str(itself)
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    by_hand = float((p * (p / q).log()).sum())
    assert agreement_of_logits(q.log(), p.log()).kl == pytest.approx(by_hand)
    with pytest.raises(ParameterError, match="shapes"):
        agreement_of_logits(expected[:1], expected)


def test_what_cannot_be_rounded_is_refused(tmp_path):
    model = load_model(tmp_path, "7.0")
    with pytest.raises(ParameterError, match="no scheme 'int3'"):
        quantise_weights(model, "int3")
    with pytest.raises(ParameterError, match="activations.*int4"):
        quantise_weights(model, activations="int4")
    with pytest.raises(ParameterError, match="emb, a PackedEmbedding. Weights are rounded once"):
        quantise_weights(quantise_weights(model), "int4")
