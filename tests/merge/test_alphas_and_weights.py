"""Of adapters: an alpha that stands in the file for each matrix, and weights that differ by tensor."""

import numpy as np
import pytest
import torch
from models import random_lora, random_model, same
from safetensors.torch import save_file

from rwkv_lab import merge
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge import verify_merge
from rwkv_lab.peft import open_adapter

KEY, VALUE = "blocks.0.att.key", "blocks.1.ffn.value"


@pytest.fixture
def base(tmp_path):
    torch.save({n: t.float() for n, t in random_model().items()}, tmp_path / "base.pth")
    return tmp_path / "base.pth"


def lora(*layers, spell="lora_A/lora_B", seed=3):
    whole = random_lora(dtype=torch.float32, seed=seed, full=False)
    A, B = spell.split("/")
    return {f"{x}.{there}": whole[f"{x}.{here}"] for x in layers for here, there in (("lora_A", A), ("lora_B", B))}


def merged(base, tuned, out, **given):
    result = merge(base, tuned, out, overwrite=True, **given)
    checks = [*result.checks, *verify_merge(result)]
    assert all(c.passed for c in checks), "\n".join(map(str, checks))
    return torch.load(out, weights_only=True)


def scales(found, base, *tensors_and_layers):
    """By layer: what B A was multiplied with."""
    before = torch.load(base, weights_only=True)
    out = {}
    for tensors, x in tensors_and_layers:
        product = tensors[f"{x}.lora_B"].double() @ tensors[f"{x}.lora_A"].double()
        delta = found[f"{x}.weight"].double() - before[f"{x}.weight"].double()
        out[x] = float((delta * product).sum() / product.square().sum())
        np.testing.assert_allclose(delta, out[x] * product, atol=1e-5)
    return pytest.approx(out, abs=1e-5)


@pytest.mark.parametrize("spell", ["lora_A/lora_B", "lora_A.weight/lora_B.weight", "lora_down.weight/lora_up.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_an_alpha_in_the_file_decides_for_its_matrix(base, tmp_path, spell, dtype):
    tensors = lora(KEY, VALUE, spell=spell)
    alphas = {f"{KEY}.alpha": torch.tensor(6).to(dtype), f"{VALUE}.alpha": torch.tensor([12]).to(dtype)}
    save_file(tensors | alphas, tmp_path / "l.safetensors")
    found = merged(base, tmp_path / "l.safetensors", tmp_path / "o.pth")
    plain = lora(KEY, VALUE)
    assert scales(found, base, (plain, KEY), (plain, VALUE)) == {KEY: 2, VALUE: 4}
    with open_adapter(tmp_path / "l.safetensors") as adapter:
        assert {x: t.alpha for x, t in adapter.targets.items()} == {KEY: 6, VALUE: 12}
    zero = merged(base, [tmp_path / "l.safetensors"], tmp_path / "z.pth", alpha=0)
    assert all(same(zero[n], t) for n, t in torch.load(base, weights_only=True).items())


@pytest.mark.parametrize("network", ["lora_unet_", "lycoris_", "lora_"])
def test_names_of_kohya_without_dots(base, tmp_path, network):
    there = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
    tensors = {f"{network}blocks_0_att_key.{there[h]}": lora(KEY)[f"{KEY}.{h}"] for h in there}
    save_file(tensors | {f"{network}blocks_0_att_key.alpha": torch.tensor(1.5)}, tmp_path / "l.safetensors")
    found = merged(base, tmp_path / "l.safetensors", tmp_path / "o.pth")
    assert scales(found, base, (lora(KEY), KEY)) == {KEY: 0.5}


def test_an_alpha_that_contradicts_lacks_or_is_none(base, tmp_path):
    path = tmp_path / "l.safetensors"
    save_file(lora(KEY, VALUE) | {f"{KEY}.alpha": torch.tensor(6.0), f"{VALUE}.alpha": torch.tensor(6.0)}, path)
    merged(base, path, tmp_path / "o.pth", alpha=6)  # it agrees
    with pytest.raises(ParameterError, match=r"alpha=8.* was given, .*states 6 in .*alpha; leave it out"):
        merge(base, path, tmp_path / "n.pth", alpha=8)
    save_file(lora(KEY, VALUE) | {f"{KEY}.alpha": torch.tensor(6.0)}, path)
    with pytest.raises(ParameterError, match=f"does not state its alpha of {VALUE}"):
        merge(base, path, tmp_path / "n.pth")
    found = merged(base, path, tmp_path / "o.pth", alpha=6)
    assert scales(found, base, (lora(KEY), KEY), (lora(VALUE), VALUE)) != {KEY: 2, VALUE: 1}
    for wrong in (torch.tensor(0.0), torch.tensor(float("nan")), torch.tensor([1.0, 2.0]), torch.tensor(-3)):
        save_file(lora(KEY) | {f"{KEY}.alpha": wrong}, path)
        with pytest.raises(LayoutError, match="an alpha is one positive number"):
            merge(base, path, tmp_path / "n.pth")


def two(base, tmp_path):
    for name, seed in (("a", 3), ("b", 4)):
        save_file(lora(KEY, VALUE, seed=seed), tmp_path / f"{name}.safetensors")
    return [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def test_weights_differ_by_pattern(base, tmp_path):
    path = two(base, tmp_path)[0]
    pairs = (lora(KEY, VALUE), KEY), (lora(KEY, VALUE), VALUE)
    for given, wanted in [
        ([{"blocks.0.*": 0.5, "*": 1.0}], {KEY: 0.5, VALUE: 1}),
        ([{"blocks.0": 0.5}], {KEY: 0.5, VALUE: 1}),
        ([{"att": 0, "*": 3}], {KEY: 0, VALUE: 3}),
        ({"ffn.value": -2.0}, {KEY: 1, VALUE: -2}),
        ([{"gradient": [1, 0.25]}], {KEY: 1, VALUE: 0.25}),
        ([{"blocks.*": {"gradient": [0, 1]}}], {KEY: 0, VALUE: 1}),
    ]:
        found = merged(base, path, tmp_path / "o.pth", alpha=3, weights=given)
        assert scales(found, base, *pairs) == wanted


@pytest.mark.parametrize("given", [[{"att": 0.5}, {"ffn": 2.0, "*": 0}], {"att": [0.5, 0], "ffn": [1, 2]}])
def test_weights_by_pattern_of_several_adapters(base, tmp_path, given):
    found = merged(base, two(base, tmp_path), tmp_path / "o.pth", alpha=3, weights=given)
    before = torch.load(base, weights_only=True)
    a, b = lora(KEY, VALUE, seed=3), lora(KEY, VALUE, seed=4)
    for x, (w, v) in {KEY: (0.5, 0), VALUE: (1, 2)}.items():
        wanted = before[f"{x}.weight"] + sum(s * t[f"{x}.lora_B"] @ t[f"{x}.lora_A"] for s, t in ((w, a), (v, b)))
        torch.testing.assert_close(found[f"{x}.weight"], wanted)


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_weights_by_pattern_on_a_quantised_base(base, tmp_path, quant):
    given = {"weights": [{"att": 0.0}], "parameters": {"quant": quant}}
    merged(base, two(base, tmp_path)[0], tmp_path / "o.pth", alpha=3, **given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{"blocks.9": 0.5}], "matches none of the 2"),
        ([{"att": "much"}], "a number is needed"),
        ([{"att": [1, 2]}], "weights has 2 numbers"),
        ([{"att": float("nan")}], "finite"),
        ({"att": [1, 2]}, "1 numbers are needed|1 number"),
        ([1, 2], "a list of 1 number "),
        (0.5, "a list of 1 number "),
    ],
)
def test_weights_that_cannot_be_meant(base, tmp_path, given, says):
    with pytest.raises(ParameterError, match=says):
        merge(base, two(base, tmp_path)[0], tmp_path / "o.pth", alpha=3, weights=given)
    assert not (tmp_path / "o.pth").exists()


def test_an_alpha_that_is_given_is_for_the_matrices_that_state_none(base, tmp_path):
    tensors = lora(KEY, VALUE) | {f"{KEY}.alpha": torch.tensor(6.0)}
    torch.save(tensors, tmp_path / "l.pth")
    with pytest.raises(ParameterError, match=f"does not state its alpha of {VALUE}"):
        merge(base, tmp_path / "l.pth", tmp_path / "o.pth")
    found = merged(base, tmp_path / "l.pth", tmp_path / "o.pth", alpha=9)
    assert scales(found, base, (tensors, KEY), (tensors, VALUE)) == {KEY: 2.0, VALUE: 3.0}
