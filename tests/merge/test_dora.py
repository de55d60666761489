"""DoRA (arXiv 2402.09353): rows of the merged weight have the lengths that training found. peft is the reference."""

import json
from dataclasses import replace

import pytest
import torch
from random_models import make_layout, random_tensors

from rwkv_lab import RWKV_Dual, merge
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge import verify_merge
from rwkv_lab.peft import load_adapter, open_adapter, save_adapter

pytest.importorskip("peft.tuners")  # "peft" alone is also the name of a folder of tests
import peft  # noqa: E402

TARGETS = ["att.key", "ffn.value", "ffn.key"]


@pytest.fixture
def base(tmp_path):
    torch.save(random_tensors(make_layout("7.0")), tmp_path / "base.pth")
    return tmp_path / "base.pth"


@pytest.fixture
def theirs(base):
    def make(**more):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True, **more)
        model = peft.get_peft_model(RWKV_Dual.from_pretrained(base), config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p += 0.1 * torch.randn(p.shape)
        return model

    return make


def merged(*given, **more):
    result = merge(*given, **more)
    checks = [*result.checks, *verify_merge(result)]
    assert all(c.passed for c in checks), "\n".join(map(str, checks))
    return torch.load(result.out, weights_only=True)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"alpha_pattern": {"att.key": 3}}])
@pytest.mark.parametrize("given_as", ["folder", "dump"])
def test_it_is_merged_as_peft_does(base, theirs, tmp_path, given_as, more):
    model = theirs(**more)
    if given_as == "dump" and more:
        more = {"parameters": {"use_rslora": True}} if "use_rslora" in more else None
    if more is None:
        return  # a dump does not state its alphas
    model.save_pretrained(tmp_path / "a")
    torch.save(model.state_dict(), tmp_path / "dump.pth")
    if given_as == "folder":
        found = merged(base, tmp_path / "a", tmp_path / "o.pth")
    else:
        found = merged(tmp_path / "dump.pth", None, tmp_path / "o.pth", alpha=6, **more)
    for n, t in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[n], t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "given", [{"weights": [0.5]}, {"weights": [{"att": 2.0, "*": 0}]}, {"parameters": {"quant": "nf4"}}]
)
def test_weights_and_a_quantised_base(base, theirs, tmp_path, given):
    """A weight scales the whole change."""
    theirs().save_pretrained(tmp_path / "a")
    found = merged(base, tmp_path / "a", tmp_path / "o.pth", **given)
    if "weights" in given:
        before, whole = torch.load(base, weights_only=True), merged(base, tmp_path / "a", tmp_path / "w.pth")
        n, w = "blocks.0.att.key.weight", 0.5 if given["weights"] == [0.5] else 2.0
        torch.testing.assert_close(found[n], before[n] + w * (whole[n] - before[n]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "b"])
def test_it_is_saved_again(base, theirs, tmp_path, name):
    model = theirs()
    model.save_pretrained(tmp_path / "a")
    with open_adapter(tmp_path / "a") as adapter:
        save_adapter(adapter, tmp_path / name)
    expected, found = (merged(base, tmp_path / a, tmp_path / f"{a}.o.pth") for a in ("a", name))
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    if name == "b":
        there = peft.PeftModel.from_pretrained(RWKV_Dual.from_pretrained(base), tmp_path / "b").merge_and_unload()
        for n, t in model.merge_and_unload().state_dict().items():
            torch.testing.assert_close(there.state_dict()[n], t, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_done_with_it_is_refused(base, theirs, tmp_path):
    theirs().save_pretrained(tmp_path / "a")
    merged(base, tmp_path / "a", tmp_path / "o.pth")
    with pytest.raises(ParameterError, match="a DoRA sets the length of every row"):
        merge(tmp_path / "o.pth", tmp_path / "a", tmp_path / "u.pth", parameters={"unmerge": True})
    with open_adapter(tmp_path / "a") as adapter:
        with pytest.raises(ParameterError, match="DoRA, which is merged here and not run"):
            load_adapter(RWKV_Dual.from_pretrained(base), adapter)
        some = {x: replace(t, magnitude=None) if "ffn" in x else t for x, t in adapter.targets.items()}
        with pytest.raises(ParameterError, match=r"att.key is DoRA and .*ffn.* is not; peft has one way"):
            save_adapter(replace(adapter, targets=some), tmp_path / "b")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    with pytest.raises(LayoutError, match="does not state use_dora, and .*lora_magnitude_vector is there"):
        merge(base, tmp_path / "a", tmp_path / "n.pth")
