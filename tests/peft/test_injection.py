import re
from types import SimpleNamespace

import pytest
import torch
from pairwise import each
from random_models import VERSIONS, make_layout, make_tokens, random_tensors, relative_rms
from torch import nn
from torch.nn import functional as F
from trained import CONFIGS, as_if_trained

from rwkv_lab import RWKV_Dual, RWKVMode
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.errors import LayoutError, NumericsError, ParameterError
from rwkv_lab.peft import (
    AdaptedLinear,
    FrozenLinear,
    LoraConfig,
    LoraLinear,
    MissLinear,
    NF4Linear,
    PissaLinear,
    adapter_parameters,
    adapters,
    apply_peft,
    count_parameters,
    load_model_and_apply_peft,
    mark_only_lora_as_trainable,
    merged_state_dict,
    print_model_param,
)

# Generations differ in which matrices they have, dtypes in arithmetic that all layers share: not every pair of them.
PAIRS = [(version, torch.float32) for version in VERSIONS]
PAIRS += [(version, dtype) for version in ("4.0", "7.0") for dtype in (torch.float64, torch.bfloat16)]
TOKENS = make_tokens(2, 13)


def plain(base, version, dtype=torch.float32, **sizes):
    return RWKV_Dual.from_pretrained(base(version, **sizes), dtype=dtype)


def swap_weights(model, state_dict):
    """The model with these weights, however they were made."""
    model.load_state_dict(state_dict)
    return model


@pytest.mark.parametrize(("version", "dtype"), PAIRS, ids=str)
def test_a_fresh_adapter_changes_nothing(base, adapted, version, dtype):
    """LoRA and MiSS bit for bit in both modes."""
    model = plain(base, version, dtype)
    for name in ("lora", "rslora", "miss", "miss-mini", "bat-hf", "bat-rwkv-peft"):
        tuned = adapted(version, CONFIGS[name], dtype)
        for mode in RWKVMode:
            model.set_mode(mode)
            tuned.set_mode(mode)
            (expected, left), (found, state) = model(TOKENS), tuned(TOKENS)
            assert torch.equal(found, expected), name
            assert torch.equal(state.wkv, left.wkv), name


@pytest.mark.parametrize(("version", "dtype"), PAIRS, ids=str)
def test_pissa_changes_nothing_but_rounding(base, adapted, version, dtype):
    """Measured at most 3e-6 in float32 and 4e-15 in float64. In bfloat16 the frozen rest and both halves are rounded,
    which moves the logits as the rounding of the model itself does, whose distance from float32 is the measure."""
    model = plain(base, version, dtype)
    expected = model(TOKENS)[0]
    limit = {torch.float32: 2e-5, torch.float64: 2e-14}.get(dtype)
    if limit is None:
        limit = 3 * relative_rms(expected, plain(base, version)(TOKENS)[0])
    for name in ("pissa", "pissa-exact"):
        tuned = adapted(version, CONFIGS[name], dtype)
        for mode in RWKVMode:
            tuned.set_mode(mode)
            assert relative_rms(tuned(TOKENS)[0], expected) < limit
        # A weight has been taken apart: rest and product are the weight, to the rounding of what was largest.
        merged = tuned.blocks[1].ffn.key.merged_weight()
        weight = model.blocks[1].ffn.key.weight
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(merged.to(torch.float64), weight.double(), rtol=0, atol=4 * eps)


@pytest.mark.parametrize(("version", "name"), [*each(VERSIONS[:-1], CONFIGS), *each(VERSIONS[-1:], CONFIGS)])
def test_both_modes_run_what_was_trained(base, adapted, version, name):
    """As the plain model with the merged weights does; and no target is forgotten."""
    tuned = as_if_trained(adapted(version, CONFIGS[name]))
    expected = tuned(TOKENS)[0]
    assert relative_rms(expected, plain(base, version)(TOKENS)[0]) > 1e-2
    tuned.set_mode(RWKVMode.RNN)
    assert relative_rms(tuned(TOKENS)[0], expected) < 1e-5
    merged = swap_weights(plain(base, version), merged_state_dict(tuned))
    assert relative_rms(merged(TOKENS)[0], expected) < 1e-5
    assert len(adapters(tuned)) == sum(isinstance(m, nn.Linear) for m in merged.modules()) - 1  # all but the head


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weight_is_what_the_layer_does(adapted, name):
    """Against the layer itself, run on unit vectors."""
    tuned = as_if_trained(adapted("6.0", CONFIGS[name], torch.float64))
    for layer in (tuned.blocks[0].ffn.key, tuned.blocks[1].ffn.value):
        torch.testing.assert_close(layer.merged_weight(), layer(torch.eye(layer.in_features, dtype=torch.float64)).T)


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_only_what_is_trained(adapted, name, quant):
    c = CONFIGS[name]
    config = LoraConfig(
        c.method, ("att.key", "ffn.*"), c.lora_r, miss_variant=c.miss_variant, mini_r=c.mini_r, quant=quant,
        train_parts=("ln", "blocks.0.att.w0"),
    )  # fmt: skip
    model = as_if_trained(adapted("7.0", config))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    F.cross_entropy(model(TOKENS)[0].flatten(0, 1), TOKENS.flatten()).backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got == trained
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    parts = {n for n in trained if n not in adapter_parameters(model)}
    assert parts == {n for n in before if re.search(r"ln\w*\.(weight|bias)$|^blocks.0.att.w0$", n)}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == trained


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_gradients_through_a_packed_weight(adapted, quant):
    """As with the unpacked weight, in float64 and under autocast."""
    layer = adapted("7.0", LoraConfig(lora_r=4, quant=quant), torch.float64).blocks[0].ffn.key
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float64)
    dense.weight = nn.Parameter(layer.weight, requires_grad=False)
    x = torch.randn(3, 5, layer.in_features, dtype=torch.float64)
    results = []
    for module in (layer, LoraLinear.from_linear(dense, 4)):
        given = x.clone().requires_grad_()
        y = module(given)
        y.sin().sum().backward()
        results.append((y, given.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        given = x.float().requires_grad_()
        y = layer(given)
    assert y.dtype == torch.bfloat16
    y.float().sin().sum().backward()
    assert relative_rms(given.grad, results[0][1]) < 3e-2  # bfloat16 has steps of 0.8 %


def test_layers_say_that_weight_is_not_all(adapted):
    model = adapted("7.0", LoraConfig(lora_target_modules=["att.key"], quant="nf4"))
    att, ffn = model.blocks[0].att, model.blocks[0].ffn
    assert isinstance(att.key, nn.Linear) and isinstance(att.key, LoraLinear)
    assert att.key.more_than_weight and att.key.packed is not None
    assert isinstance(ffn.key, NF4Linear) and isinstance(ffn.key, FrozenLinear)
    assert not ffn.key.more_than_weight and not ffn.key.weight.requires_grad
    assert not hasattr(model.head, "more_than_weight") and type(model.head) is nn.Linear
    assert ffn.key.weight.shape == (52, 32) and ffn.key.weight.dtype == torch.float32
    model.to(torch.bfloat16)
    assert ffn.key.weight.dtype == torch.bfloat16 and ffn.key.packed.absmax.dtype == torch.float32
    assert model(TOKENS)[0].dtype == torch.bfloat16


def test_a_model_that_is_quantised_already(adapted):
    def quantised():
        return adapted("7.0", LoraConfig(lora_r=4, lora_target_modules=["att.value"], quant="nf4"))

    model = quantised()
    expected = model(TOKENS)[0]
    for config in (LoraConfig(lora_r=4, lora_target_modules=["ffn.key"]), CONFIGS["bat-hf"]):
        model = quantised()
        apply_peft(model, LoraConfig(config.method, ["ffn.key"], 4, miss_variant=config.miss_variant))
        assert torch.equal(model(TOKENS)[0], expected)
        assert model.blocks[0].ffn.key.packed is not None and model.blocks[0].ffn.key.more_than_weight
    with pytest.raises(ParameterError, match="before it is quantised"):
        apply_peft(quantised(), LoraConfig("pissa", ["ffn.key"], 4))


def test_checkpointing_and_dropout(adapted):
    """Gradient checkpointing draws the same dropout again; without training there is none."""
    model = as_if_trained(adapted("7.0", LoraConfig(lora_r=4, lora_dropout=0.5)))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        model(TOKENS)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in adapter_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    first = model(TOKENS)[0]
    assert not torch.equal(first, model(TOKENS)[0])
    model.eval()
    assert torch.equal(model(TOKENS)[0], model(TOKENS)[0])


def test_shapes_and_scaling():
    layer = LoraLinear(10, 6, r=4, lora_alpha=8)
    assert layer.lora_A.shape == (4, 10) and layer.lora_B.shape == (6, 4) and layer.scaling == 2
    assert LoraLinear(10, 6, r=4, lora_alpha=8, use_rslora=True).scaling == 4
    assert isinstance(PissaLinear(10, 6, r=4), LoraLinear) and PissaLinear(10, 6, r=4).scaling == 1
    assert MissLinear(10, 6, r=4).miss_block.shape == (4, 6)
    assert MissLinear(10, 6, r=4, variant="mini", mini_r=3).miss_block.shape == (4, 3)
    assert MissLinear(12, 8, r=4, variant="bat-hf").miss_block.shape == (2, 4, 4)
    assert MissLinear(12, 8, r=4, variant="bat-rwkv-peft").miss_block.shape == (3, 4, 4)


def test_adapters_may_be_finer_than_the_model(adapted):
    model = adapted("7.0", LoraConfig(lora_r=4, adapter_dtype=torch.float32), torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    as_if_trained(model)(TOKENS)[0].float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter_parameters(model).values())


def test_the_seed_decides(adapted):
    a, b, c = (adapter_parameters(adapted("7.0", CONFIGS["pissa"], seed=s)) for s in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)


@pytest.mark.parametrize("version", VERSIONS)
def test_parts(adapted, version):
    names = {n for n, _ in adapted(version, LoraConfig(lora_r=4)).named_parameters() if "lora_" not in n}
    parts = ("emb", "head", "ln", "time") + (() if version == "4.0" else ("time_state",))
    found = {}
    for part in parts:
        model = adapted(version, LoraConfig(lora_r=4, train_parts=(part,)))
        found[part] = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert found["emb"] == {"emb.weight"} and found["head"] == {"head.weight"}
    if version != "4.0":
        assert found.pop("time_state") == {f"blocks.{i}.att.time_state" for i in range(2)}
    assert sum(map(len, found.values())) == len(set().union(*found.values()))
    matrices = {n for n in names if re.match(r"blocks\.\d+\.(att|ffn)\.(receptance|key|value|output|gate)\.weight", n)}
    assert set().union(*found.values()) == names - matrices


def test_counts(adapted, capsys):
    model = adapted("7.0", LoraConfig(lora_target_modules=["att.key"], lora_r=4, train_parts=["head"]))
    count = count_parameters(model)
    assert count.adapters == 2 * (4 * 32 + 32 * 4) and count.besides == 70 * 32
    total = count.trained + count.frozen
    packed = adapted("7.0", LoraConfig(lora_target_modules=["att.key"], lora_r=4, train_parts=["head"], quant="nf4"))
    assert count_parameters(packed) == count
    print_model_param(model)
    printed = capsys.readouterr().out
    assert "blocks.0.att.key.lora_A [4, 32] float32" in printed and "blocks.0.att.key.weight" not in printed
    assert f"{total:,}" in printed


def test_marking_again(adapted):
    model = adapted("7.0", CONFIGS["lora"])
    model.requires_grad_(True)
    trained = mark_only_lora_as_trainable(model, ["emb"])
    assert set(trained) == {"emb.weight", *adapter_parameters(model)}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained)


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("version", "targets", "near"),
    [
        ("7.0", ["att.gate"], "There are, for example: blocks.0.att.receptance"),
        ("7.0", ["att.keys"], "Did you mean att.key"),
        ("7.0", ["ffn.receptance"], "att.receptance"),
        ("6.0", ["att.key", "blocks.7.*"], "Did you mean blocks.0"),
        ("4.0", ["q_proj"], "There are, for example: blocks.0.att."),
    ],
)
def test_a_target_that_matches_nothing(adapted, version, targets, near):
    with pytest.raises(ParameterError, match=re.escape(repr(targets[-1]))) as e:
        adapted(version, LoraConfig(lora_target_modules=targets))
    assert near in str(e.value)


def test_targets_by_pattern(adapted):
    def names(*targets):
        return sorted(adapters(adapted("6.0", LoraConfig(lora_r=4, lora_target_modules=targets))))

    assert names("att.key") == ["blocks.0.att.key", "blocks.1.att.key"]
    assert names("blocks.1.att.key", "head") == ["blocks.1.att.key", "head"]
    assert names("blocks.0.ffn.*") == [f"blocks.0.ffn.{x}" for x in ("key", "receptance", "value")]
    assert names("key") == sorted(f"blocks.{i}.{x}.key" for i in (0, 1) for x in ("att", "ffn"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora_target_modules": []}, "empty"),
        ({"lora_target_modules": "att.key"}, "list"),
        ({"method": "dora"}, "lora, pissa, miss"),
        ({"lora_r": 0}, "at least 1"),
        ({"lora_r": True}, "whole number"),
        ({"lora_alpha": 0}, "positive"),
        ({"lora_alpha": float("nan")}, "positive"),
        ({"lora_dropout": 1.0}, "below 1"),
        ({"quant": "fp5"}, "nf4"),
        ({"method": "pissa", "lora_dropout": 0.1}, "dropout 0"),
        ({"method": "miss", "miss_variant": "bat"}, "two meanings"),
        ({"method": "miss", "miss_variant": "col"}, "mini"),
        ({"method": "miss", "use_rslora": True}, "lora"),
        ({"svd_niter": -1}, "exact"),
        ({"svd_niter": 1.5}, "svd_niter=1.5"),
        ({"svd_niter": "a"}, "svd_niter='a'"),
        ({"lora_dropout": "a"}, "dropout 'a'"),
        ({"adapter_dtype": "float32"}, "torch.float32"),
        ({"mini_r": 0.5}, "mini_r=0.5"),
        ({"adapter_dtype": torch.int8}, "floating"),
    ],
)
def test_settings_that_there_are_not(settings, says):
    with pytest.raises(ParameterError, match=says):
        LoraConfig(**settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_larger_than_the_layer(base, name):
    c = CONFIGS[name]
    model = plain(base, "7.0")
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(ParameterError, match=r"blocks\.0\.\w+\.\w+: rank (33|40)"):
        apply_peft(model, LoraConfig(c.method, None, 40 if "bat" in name else 33, miss_variant=c.miss_variant))
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before


def test_what_goes_wrong_with_models(base, adapted, tmp_path):
    with pytest.raises(ParameterError, match="peft_load_path"):
        load_model_and_apply_peft(SimpleNamespace(), LoraConfig())
    with pytest.raises(ParameterError, match="bfloat16"):
        load_model_and_apply_peft(SimpleNamespace(peft_load_path=base("7.0"), dtype="float12"), LoraConfig())
    with pytest.raises(LayoutError, match="no whole model"):
        write_checkpoint(tmp_path / "part.pth", {"blocks.0.att.x_r": torch.zeros(3)})
        load_model_and_apply_peft(SimpleNamespace(peft_load_path=tmp_path / "part.pth"), LoraConfig())
    with pytest.raises(ParameterError, match="already"):
        apply_peft(adapted("7.0", CONFIGS["lora"]), CONFIGS["miss"])
    with pytest.raises(ParameterError, match="no adapters"):
        mark_only_lora_as_trainable(plain(base, "7.0"))
    with pytest.raises(ParameterError, match="time_state"):
        adapted("4.0", LoraConfig(lora_r=4, train_parts=["time_state"]))
    with pytest.raises(ParameterError, match="lm_head.*\n.*head"):
        adapted("7.0", LoraConfig(lora_r=4, train_parts=["lm_head"]))
    with pytest.raises(ParameterError, match="only one of them"):
        adapted("7.0", LoraConfig(lora_r=4, lora_target_modules=["head"], train_parts=["head"]))
    with pytest.raises(ParameterError, match="has a bias"):
        LoraLinear.from_linear(nn.Linear(4, 4), 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", [CONFIGS["pissa"], CONFIGS["pissa-exact"], LoraConfig(lora_r=4, quant="nf4"),
                                    LoraConfig(lora_r=4, quant="int8")])  # fmt: skip
def test_nan_in_a_weight_that_is_taken_apart(tmp_path, config, value):
    tensors = random_tensors(make_layout("7.0"))
    tensors["blocks.1.att.value.weight"][3, 4] = value
    write_checkpoint(tmp_path / "nan.pth", tensors)
    with pytest.raises(NumericsError, match=r"^blocks\.1\.att\.value: .*NaN or infinity"):
        load_model_and_apply_peft(SimpleNamespace(peft_load_path=tmp_path / "nan.pth"), config)


def test_names_of_dtypes(base):
    for given, dtype in (("bf16", torch.bfloat16), ("float64", torch.float64), (torch.float32, torch.float32)):
        model = load_model_and_apply_peft(SimpleNamespace(peft_load_path=base("7.0"), dtype=given), CONFIGS["lora"])
        assert model.emb.weight.dtype == dtype
        assert all(isinstance(layer, AdaptedLinear) for layer in adapters(model).values())
