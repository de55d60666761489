"""What training writes says which base it belongs to and which training it comes from."""

import pytest
from tiny_training import LRS, SHORT, tiny_base, tiny_text

from rwkv_lab import merge, open_checkpoint
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.checkpoint.origin import origin_of, same_weights, weights_of
from rwkv_lab.errors import ParameterError
from rwkv_lab.peft import open_adapter, save_pissa_init
from rwkv_lab.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin")
    tiny_base(folder, tiny_text(folder))
    with open_checkpoint(folder / "base.pth") as ck:
        other = {n: ck[n] * 1.01 for n in ck}
    write_checkpoint(folder / "other.pth", other)
    return folder


def trained(folder, kind, out, **given):
    given = SHORT | {"lr": LRS[kind], "base": folder / "base.pth"} | given
    return train(kind, folder / out, str(folder / "texts"), **given)


@pytest.mark.parametrize(
    ("kind", "out", "given"),
    [
        ("state", "state.pth", {"quant": "nf4"}),
        ("lora", "lora.safetensors", {"quant": "int8"}),
        ("lora", "folder", {}),
        ("pissa", "pissa.pth", {}),
        ("miss", "miss.pth", {"dtype": "bfloat16"}),
        ("full", "full.pth", {}),
    ],
)
def test_every_kind_names_its_base_and_how_it_was_stored(kind, out, given, folder):
    trained(folder, kind, out, **given)
    with open_checkpoint(folder / out) as ck, open_checkpoint(folder / "base.pth") as base:
        origin = origin_of(ck)
        assert origin is not None and origin.base == "base.pth" and same_weights(origin.weights, weights_of(base))
    assert origin.quant == given.get("quant", "none") and origin.dtype == given.get("dtype", "float32")
    if kind == "full":
        return
    merge(folder / "base.pth", folder / out, folder / f"{out}.merged.pth")
    with pytest.raises(ParameterError, match=r"was trained on base\.pth"):
        merge(folder / "other.pth", folder / out, folder / "o.pth")


def test_a_start_names_the_base_too(folder):
    trained(folder, "pissa", "p.pth")
    with open_adapter(folder / "p.pth") as adapter:
        save_pissa_init(adapter, folder / "init.pth")
    with open_checkpoint(folder / "init.pth") as ck:
        assert origin_of(ck).base == "base.pth"


def test_more_steps_are_the_same_training_and_another_seed_is_not(folder):
    for out, given in (("3.pth", {"steps": 3}), ("4.pth", {"steps": 4}), ("seed.pth", {"seed": 1})):
        trained(folder, "lora", out, **given)
    merged = merge(folder / "base.pth", folder / "3.pth", folder / "three.pth").out
    with pytest.raises(ParameterError, match="contains 3.pth already"):
        merge(merged, folder / "4.pth", folder / "o.pth")
    with pytest.raises(ParameterError, match="3.pth and 4.pth are the same adapter"):
        merge(folder / "base.pth", [folder / "3.pth", folder / "4.pth"], folder / "o.pth")
    result = merge(merged, folder / "seed.pth", folder / "o.pth")
    assert any("seed.pth was trained on base.pth, which this base was made from" in n for n in result.plan.notes)


def test_a_model_trained_whole_contains_what_its_base_contains(folder):
    trained(folder, "lora", "a.pth")
    merged = merge(folder / "base.pth", folder / "a.pth", folder / "with a.pth").out
    trained(folder, "full", "all.pth", base=merged)
    for options in ({}, {"parameters": {"unmerge": True}}):  # how much of it is left is unknown
        with pytest.raises(ParameterError, match="a.pth"):
            merge(folder / "all.pth", folder / "a.pth", folder / "o2.pth", allow_other_base=True, **options)
    with pytest.raises(ParameterError, match="contains a.pth already"):
        merge(folder / "all.pth", folder / "a.pth", folder / "o2.pth", allow_other_base=True)


def test_what_is_trained_further_is_the_same_training(folder):
    trained(folder, "lora", "first.pth")
    trained(folder, "lora", "further.pth", start=folder / "first.pth", seed=2)
    trained(folder, "lora", "longer.pth")
    trained(folder, "lora", "longer.pth", steps=9, resume=True)
    merged = merge(folder / "base.pth", folder / "first.pth", folder / "m.pth").out
    for later in ("further.pth", "longer.pth"):
        with pytest.raises(ParameterError, match=f"{later} is of the same training as first.pth"):
            merge(merged, folder / later, folder / "o.pth", overwrite=True)


def test_a_fresh_model_has_no_base(folder):
    with open_checkpoint(folder / "base.pth") as ck:
        assert origin_of(ck) is None
