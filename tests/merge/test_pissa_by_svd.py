"""A PiSSA without the file that it started from: the start is computed again from the base by the exact SVD."""

import pytest
import torch
from models import same
from random_models import make_layout, random_tensors

from rwkv_lab import RWKV_Dual, merge
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.merge import verify_merge
from rwkv_lab.peft import LoraConfig, adapter_of, apply_peft, save_adapter

TARGETS = ["att.key", "ffn.value"]


@pytest.fixture
def base(tmp_path):
    torch.save(random_tensors(make_layout("7.0")), tmp_path / "base.pth")
    return tmp_path / "base.pth"


def moved(model, size=0.02):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p += size * torch.randn(p.shape, generator=g)
    return model


def proved(result):
    checks = [*result.checks, *verify_merge(result)]
    assert all(c.passed for c in checks), "\n".join(map(str, checks))
    return torch.load(result.out, weights_only=True)


@pytest.fixture
def theirs(base, tmp_path):
    """theirs(start) -> their model, as if trained, and its folder."""
    pytest.importorskip("peft.tuners")  # "peft" alone is also the name of a folder of tests
    import peft

    def make(start, **more):
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=start, **more)
        model = moved(peft.get_peft_model(RWKV_Dual.from_pretrained(base), config))
        model.save_pretrained(tmp_path / "a")
        return model, tmp_path / "a"

    return make


def test_a_folder_of_peft(base, theirs, tmp_path):
    model, folder = theirs("pissa")
    with pytest.raises(ParameterError, match="pissa_init"):
        merge(base, folder, tmp_path / "o.pth")
    result = merge(base, folder, tmp_path / "o.pth", pissa_init="svd")
    found = proved(result)
    assert result.recipe["pissa_init"] == "svd" and any("exact SVD" in note for note in result.plan.notes)
    for n, t in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[n], t, rtol=1e-4, atol=1e-5)


def test_a_randomised_start_is_refused(base, theirs, tmp_path):
    with pytest.raises(ParameterError, match="'pissa_niter_2'(.|\n)*no exact SVD"):
        merge(base, theirs("pissa_niter_2")[1], tmp_path / "o.pth", pissa_init="svd")
    with pytest.raises(ParameterError, match="plain LoRA|no exact SVD|leave out"):
        merge(base, theirs(True)[1], tmp_path / "o.pth", pissa_init="svd")


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_file_without_its_start(base, tmp_path, quant):
    """Ours, of which the start was taken out: the same as with it."""
    model = RWKV_Dual.from_pretrained(base)
    apply_peft(model, LoraConfig("pissa", lora_r=4, lora_target_modules=TARGETS, svd_niter=None, quant=quant))
    save_adapter(adapter_of(moved(model)), tmp_path / "whole.pth")
    tensors = torch.load(tmp_path / "whole.pth", weights_only=True)
    torch.save({n: t for n, t in tensors.items() if "init" not in n}, tmp_path / "bare.pth")
    wanted = proved(merge(base, tmp_path / "whole.pth", tmp_path / "w.pth"))
    given = {"pissa_init": "svd", "parameters": {"quant": quant}}
    found = proved(merge(base, tmp_path / "bare.pth", tmp_path / "b.pth", **given))
    if quant == "none":
        for n, t in wanted.items():
            torch.testing.assert_close(found[n], t, rtol=1e-4, atol=1e-5)
    listed = merge(base, [tmp_path / "bare.pth"], tmp_path / "c.pth", **(given | {"pissa_init": ["svd"]}))
    tensors = proved(listed)
    assert listed.recipe["pissa_init"] == ["svd"] and all(same(tensors[n], t) for n, t in found.items())


def test_what_did_not_start_there_is_refused(base, tmp_path):
    """A plain LoRA, and a base whose singular values agree at the rank: nothing is written."""
    g = torch.Generator().manual_seed(1)
    lora = {f"blocks.0.att.key.lora_{h}": torch.randn(s, generator=g) for h, s in (("A", (4, 32)), ("B", (32, 4)))}
    torch.save(lora, tmp_path / "l.pth")
    with pytest.raises(NumericsError, match="does not resemble the principal part"):
        merge(base, tmp_path / "l.pth", tmp_path / "o.pth", pissa_init="svd")
    tensors = torch.load(base, weights_only=True)
    torch.save(tensors | {"blocks.0.att.key.weight": torch.eye(32)}, tmp_path / "even.pth")
    with pytest.raises(NumericsError, match="singular values 4 and 5 nearly agree"):
        merge(tmp_path / "even.pth", tmp_path / "l.pth", tmp_path / "o.pth", pissa_init="svd")
    assert not (tmp_path / "o.pth").exists()
