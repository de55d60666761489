"""A model and its adapter in one file, not merged: peft's state_dict, and what RWKV-PEFT's trainers save whole."""

import pytest
import torch
from models import same
from random_models import make_layout, make_tokens, random_tensors

from rwkv_lab import RWKV_Dual, merge, open_checkpoint
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge import verify_merge

pytest.importorskip("peft.tuners")  # "peft" alone is also the name of a folder of tests
import peft  # noqa: E402

TOKENS = make_tokens(2, 13)
TARGETS = ["att.key", "att.output", "ffn.value"]


def saved(path, tensors):
    torch.save(tensors, path)
    return path


def moved(module, seed=0):
    """As if every adapter had been trained."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_" in name or "miss_block" in name or "modules_to_save" in name:
                p += 0.05 * torch.randn(p.shape, generator=g)
    return module


@pytest.fixture
def base(tmp_path):
    return saved(tmp_path / "base.pth", random_tensors(make_layout("7.0")))


@pytest.fixture
def theirs(base):
    """theirs(config, …) -> their model with these adapters, by name, as if trained."""

    def make(**configs):
        model = RWKV_Dual.from_pretrained(base)
        (first, config), *others = configs.items()
        model = peft.get_peft_model(model, config, adapter_name=first)
        for name, other in others:
            model.add_adapter(name, other)
        return moved(model)

    return make


def proved(result):
    checks = [*result.checks, *verify_merge(result)]
    assert all(c.passed for c in checks), "\n".join(map(str, checks))
    return result


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "whole": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, modules_to_save=["head", "ln1"]),
    "pissa": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="pissa"),
    "miss": lambda: peft.MissConfig(r=4, target_modules=TARGETS),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("wrapped", ["", "module."])
def test_a_dump_of_peft_is_merged_in_itself(base, theirs, tmp_path, name, wrapped):
    """As base and tuned, as the base alone, and as tuned with the original as base: the same, which is theirs."""
    model = theirs(default=CONFIGS[name]())
    dump = saved(tmp_path / "dump.pth", {wrapped + n: t for n, t in model.state_dict().items()})
    with open_checkpoint(dump) as ck:
        assert ck.kind == "unmerged" and ck.layout.version == "7.0" and "'default'" in ck.reason
    alpha = None if name == "miss" else 6
    found = []
    for i, (first, second) in enumerate([(dump, dump), (dump, None), (base, dump)]):
        result = proved(merge(first, second, tmp_path / f"o{i}.pth", alpha=alpha))
        assert any("the frozen model that its adapter belongs to" in note for note in result.plan.notes)
        found.append(torch.load(result.out, weights_only=True))
    wanted = model.merge_and_unload().state_dict()
    for tensors in found:
        assert set(tensors) == set(wanted)
        for n, t in wanted.items():
            torch.testing.assert_close(tensors[n], t, rtol=1e-6, atol=1e-6)


def test_one_of_several_adapters_has_to_be_named(base, theirs, tmp_path):
    model = theirs(default=CONFIGS["lora"](), second=peft.LoraConfig(r=2, lora_alpha=6, target_modules=["att.key"]))
    dump = saved(tmp_path / "dump.pth", model.state_dict())
    with pytest.raises(ParameterError, match="holds 2 adapters \\('default', 'second'\\)"):
        merge(dump, dump, tmp_path / "o.pth", alpha=6)
    with pytest.raises(ParameterError, match="holds no adapter 'third'; there are: 'default', 'second'"):
        merge(dump, dump, tmp_path / "o.pth", alpha=6, parameters={"adapter": "third"})
    weight = model.base_model.model.blocks[0].att.key.base_layer.weight.detach().clone()
    for name, alpha in (("default", 6), ("second", 6)):
        out = tmp_path / f"{name}.pth"
        proved(merge(dump, dump, out, alpha=alpha, parameters={"adapter": name}))
        layer = model.base_model.model.blocks[0].att.key
        A, B = (getattr(layer, f"lora_{h}")[name].weight.detach() for h in "AB")
        found = torch.load(out, weights_only=True)["blocks.0.att.key.weight"]
        torch.testing.assert_close(found, weight + 6 / len(A) * B @ A)


def test_a_file_that_a_trainer_saved_whole(base, tmp_path):
    """RWKV-PEFT: `X.weight` with `X.lora_A` and `X.lora_B` beside it."""
    tensors = torch.load(base, weights_only=True)
    A, B = torch.randn(3, 32), torch.randn(32, 3)
    both = tensors | {"blocks.0.att.key.lora_A": A, "blocks.0.att.key.lora_B": B}
    dump = saved(tmp_path / "dump.pth", both)
    result = proved(merge(dump, dump, tmp_path / "o.pth", alpha=6))
    found = torch.load(result.out, weights_only=True)
    torch.testing.assert_close(found["blocks.0.att.key.weight"], tensors["blocks.0.att.key.weight"] + 2 * B @ A)
    assert all(same(found[n], tensors[n]) for n in tensors if n != "blocks.0.att.key.weight") and len(found) == len(
        tensors
    )


def test_what_is_not_merged_is_refused_where_a_model_is_needed(base, theirs, tmp_path):
    dump = saved(tmp_path / "dump.pth", theirs(default=CONFIGS["lora"]()).state_dict())
    with pytest.raises(LayoutError, match=r"(?s)an adapter 'default' beside the frozen weights.*as both"):
        RWKV_Dual.from_pretrained(dump)
    lora = {"blocks.0.att.key.lora_A": torch.ones(2, 32), "blocks.0.att.key.lora_B": torch.ones(32, 2)}
    with pytest.raises(LayoutError, match="Merge it in itself first"):
        merge(dump, saved(tmp_path / "l.pth", lora), tmp_path / "o.pth", alpha=2)
    other = saved(tmp_path / "other.pth", random_tensors(make_layout("7.0", n_layer=3)))
    with pytest.raises(LayoutError, match="holds a frozen RWKV-7"):
        merge(other, dump, tmp_path / "o.pth", alpha=2)
