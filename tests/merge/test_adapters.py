"""Adapters of every kind into the base: as Hugging Face's peft merges them, and as the trained module computes."""

import json

import pytest
import torch
from models import same, snapshot
from pairwise import each, pairwise
from random_models import VERSIONS, make_layout, make_tokens, relative_rms, write_model

from rwkv_lab import RWKV_Dual, merge, open_checkpoint
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.errors import LayoutError, NumericsError, ParameterError, RwkvLabError
from rwkv_lab.merge import verify_merge
from rwkv_lab.peft import (
    LoraConfig,
    adapter_of,
    apply_peft,
    load_adapter,
    merged_state_dict,
    open_adapter,
    save_adapter,
    save_pissa_init,
)

TOKENS = make_tokens(2, 13)
CLOSE = 1e-5  # float32; sums in another order
KINDS = {
    "lora": LoraConfig(lora_r=4, lora_alpha=6),
    "rslora": LoraConfig(lora_r=4, lora_alpha=6, use_rslora=True),
    "pissa": LoraConfig("pissa", lora_r=4),
    "miss": LoraConfig("miss", lora_r=6),  # divides neither 32 nor 52 columns
    "miss-mini": LoraConfig("miss", lora_r=4, miss_variant="mini", mini_r=2),
    "bat-hf": LoraConfig("miss", lora_r=4, miss_variant="bat-hf"),
    "bat-rwkv-peft": LoraConfig("miss", lora_r=4, miss_variant="bat-rwkv-peft"),
}
LARGE = ["lora", "pissa", "bat-hf", "bat-rwkv-peft"]
METHODS = {"rslora": "lora", "miss-mini": "miss", "bat-hf": "miss", "bat-rwkv-peft": "miss"}


@torch.no_grad()
def as_if_trained(model, size=0.05, seed=1):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_((size * torch.randn(p.shape, generator=g)).to(p.dtype))
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")

    def path(version="7.0", **sizes):
        file = folder / f"{version}-{'-'.join(f'{k}{v}' for k, v in sizes.items())}.safetensors"
        return file if file.exists() else write_model(file, make_layout(version, **sizes))

    return path


@pytest.fixture
def trained(base, tmp_path):
    """trained(kind, version, name, seed, …) -> (path of the adapter, the module as it was trained)."""

    def make(kind, version="7.0", name=None, seed=1, quant="none", parts=(), **sizes):
        torch.manual_seed(seed)
        config = KINDS[kind]
        model = RWKV_Dual.from_pretrained(base(version, **sizes))
        apply_peft(model, LoraConfig(**{**vars(config), "quant": quant, "train_parts": list(parts)}))
        as_if_trained(model, seed=seed)
        folder = {"miss-mini": True, "bat-hf": True}.get(kind, False)
        path = tmp_path / (name or ("a" if folder else "a.safetensors"))
        save_adapter(adapter_of(model), path)
        return path, model

    return make


def logits(path):
    return RWKV_Dual.from_pretrained(path)(TOKENS)[0]


def proved(result):
    checks = [*result.checks, *verify_merge(result)]
    assert all(c.passed for c in checks), "\n".join(map(str, checks))
    return result


def tensors(path):
    with open_checkpoint(path) as ck:
        return {n: t.read() for n, t in ck.info.items()}


def refused(error, says, *given, **more):
    """Refused in words, before and in a dry run alike, without a trace."""
    folder = given[2].parent
    before = snapshot(folder)
    for dry_run in (True, False):
        with pytest.raises(error, match=says) as caught:
            merge(*given, **more, dry_run=dry_run)
        assert str(caught.value).count("\n") < 3
    assert snapshot(folder) == before


CASES = [*each(VERSIONS[:-1], ["none"], KINDS), *(("7.0", "none", kind) for kind in KINDS)]
QUANTISED = pairwise(("5.2", "7.0"), ("int8", "nf4"), KINDS)


@pytest.mark.parametrize(("version", "quant", "kind"), CASES + QUANTISED)
def test_the_merged_file_computes_what_was_trained(base, trained, tmp_path, version, kind, quant):
    path, model = trained(kind, version, quant=quant, parts=["ln"])
    result = proved(merge(base(version), path, tmp_path / "m.pth"))
    assert result.plan.method == METHODS.get(kind, kind)
    expected = model(TOKENS)[0]
    assert relative_rms(expected, logits(base(version))) > 1e-2
    # A residual that float32 rounds another way may fall on the next level of NF4 or int8: PiSSA only.
    assert relative_rms(logits(result.out), expected) < (1e-2 if kind == "pissa" and quant != "none" else CLOSE)
    again = RWKV_Dual.from_pretrained(base(version))
    with open_adapter(path) as adapter:
        load_adapter(again, adapter, quant)
    merged = tensors(result.out)
    for name, tensor in merged_state_dict(again).items():
        if kind != "pissa" or quant == "none":
            torch.testing.assert_close(merged[name].view_as(tensor), tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quant", ["fp4", "bnb-int8"])
@pytest.mark.parametrize("kind", ["lora", "pissa", "bat-rwkv-peft"])
def test_what_was_trained_on_bitsandbytes_other_roundings(base, trained, tmp_path, kind, quant):
    path, model = trained(kind, quant=quant)
    result = proved(merge(base(), path, tmp_path / "m.pth"))
    assert result.recipe["parameters"]["quant"] == quant
    # A residual that float32 rounds another way may fall on the next level: PiSSA only.
    assert relative_rms(logits(result.out), model(TOKENS)[0]) < (1e-2 if kind == "pissa" else CLOSE)
    given = {"alpha": 6.0 if kind == "lora" else None, "parameters": {"quant": quant}}
    given["parameters"] |= {"bat": "rwkv-peft"} if kind.startswith("bat") else {}
    other = proved(merge(base(), bare(path, tmp_path / "bare.pth"), tmp_path / "n.pth", **given))
    expected = tensors(result.out)
    assert all(torch.equal(t, expected[n]) for n, t in tensors(other.out).items())


@pytest.mark.parametrize("version", ["4.0", "7.0"])
@pytest.mark.parametrize("name", ["lora", "rslora", "pissa", "patterns", "whole", "miss", "miss-mini", "bat-hf"])
def test_hugging_faces_peft_merges_the_same(base, tmp_path, version, name):
    pytest.importorskip("peft.tuners")  # "peft" alone is also the name of a folder of tests
    import peft

    targets = ["att.key", "att.output", "ffn.key", "ffn.value"]
    shared = {"target_modules": targets, "r": 4}
    config = {
        "lora": lambda: peft.LoraConfig(**shared, lora_alpha=6),
        "rslora": lambda: peft.LoraConfig(**shared, lora_alpha=6, use_rslora=True),
        "pissa": lambda: peft.LoraConfig(**shared, lora_alpha=6, init_lora_weights="pissa"),
        "patterns": lambda: peft.LoraConfig(
            **shared, lora_alpha=6, rank_pattern={"ffn.value": 5}, alpha_pattern={"att.output": 3}
        ),
        "whole": lambda: peft.LoraConfig(**shared, modules_to_save=["head", "emb", "ln1"]),
        "miss": lambda: peft.MissConfig(target_modules=targets, r=6),
        "miss-mini": lambda: peft.MissConfig(**shared, mini_r=2, init_weights="mini"),
        "bat-hf": lambda: peft.MissConfig(**shared, init_weights="bat"),
    }[name]()
    torch.manual_seed(0)
    theirs = peft.get_peft_model(RWKV_Dual.from_pretrained(base(version)), config)
    more = {}
    if name == "pissa":
        theirs.save_pretrained(tmp_path / "init")
        more = {"pissa_init": tmp_path / "init"}
    as_if_trained(theirs).save_pretrained(tmp_path / "a")
    expected = theirs(TOKENS)[0]
    result = proved(merge(base(version), tmp_path / "a", tmp_path / "m.safetensors", **more))
    assert relative_rms(logits(result.out), expected) < CLOSE
    found, reference = tensors(result.out), dict(theirs.merge_and_unload().named_parameters())
    for n, p in reference.items():
        torch.testing.assert_close(found[n].view_as(p), p.detach(), rtol=1e-5, atol=2e-6)
    if name == "pissa":
        refused(ParameterError, "pissa_init", base(version), tmp_path / "a", tmp_path / "n.pth")


@pytest.mark.parametrize("version", ["4.0", "6.0"])
def test_pissa_with_rwkv_pefts_own_init_file(base, trained, tmp_path, version):
    path, model = trained("pissa", version)
    bare = {n: t for n, t in tensors(path).items() if "init" not in n}
    torch.save(bare, tmp_path / "p.pth")
    save_pissa_init(adapter_of(model), tmp_path / "init_pissa.pth")
    given = (base(version), tmp_path / "p.pth", tmp_path / "m.pth")
    refused(ParameterError, "pissa_init= or residual_base", *given)
    result = proved(merge(*given, pissa_init=tmp_path / "init_pissa.pth"))
    assert [f.role for f in result.inputs] == ["base", "tuned", "init"]  # a start is no tuned model
    assert result.plan.method == "pissa" and len(result.inputs) == 3
    assert relative_rms(logits(result.out), model(TOKENS)[0]) < CLOSE
    refused(RwkvLabError, "is the input", *given[:2], tmp_path / "init_pissa.pth",
            pissa_init=tmp_path / "init_pissa.pth", overwrite=True)  # fmt: skip
    # The same on what the SVD left over of the base.
    left = {n: t.clone() for n, t in tensors(base(version)).items()}
    for name, layer in model.named_modules():
        if hasattr(layer, "init_lora_A"):
            left[f"{name}.weight"] = layer.weight.detach()
    write_checkpoint(tmp_path / "left.pth", left)
    more = {"parameters": {"residual_base": True}}
    result = proved(merge(tmp_path / "left.pth", tmp_path / "p.pth", tmp_path / "n.pth", **more))
    assert relative_rms(logits(result.out), model(TOKENS)[0]) < CLOSE and any(
        "left over" in n for n in result.plan.notes
    )


def bare(path, out, endings=("lora_A", "lora_B", "disha")):
    """The adapter as others save it: without a note."""
    torch.save({n: t for n, t in tensors(path).items() if n.endswith(endings)}, out)
    return out


def test_what_the_file_does_not_say_is_asked(base, trained, tmp_path):
    given = base(), bare(trained("rslora")[0], tmp_path / "l.pth"), tmp_path / "m.pth"
    model = trained("rslora", name="b.safetensors")[1]
    refused(ParameterError, "does not state its alpha", *given)
    result = proved(merge(*given, alpha=6, parameters={"use_rslora": True}))
    assert relative_rms(logits(result.out), model(TOKENS)[0]) < CLOSE
    refused(ParameterError, "leave it out", base(), tmp_path / "b.safetensors", tmp_path / "n.pth", alpha=7.0)
    bat, model = trained("bat-rwkv-peft", name="bat.safetensors")
    given = base(), bare(bat, tmp_path / "bat.pth"), tmp_path / "o.pth"
    refused(ParameterError, 'bat="hf"', *given)
    result = proved(merge(*given, parameters={"bat": "rwkv-peft"}))
    assert relative_rms(logits(result.out), model(TOKENS)[0]) < CLOSE
    given = *given[:2], tmp_path / "p.pth"
    refused(ParameterError, "did you mean bat", *given, parameters={"bta": "hf"})
    refused(ParameterError, "quant='fp8'", *given, parameters={"bat": "hf", "quant": "fp8"})
    refused(ParameterError, "is miss", *given, parameters={"bat": "hf"}, method="lora")


@pytest.mark.parametrize(("version", "kind"), each(["4.0", "7.0"], KINDS))
def test_unmerging_restores_the_base(base, trained, tmp_path, version, kind):
    """To rounding of the merged file's dtype; a bfloat16 base merged in float32 comes back nearly to the last bit."""
    path, _ = trained(kind, version)
    undo = {"parameters": {"unmerge": True}}
    merge(base(version), path, tmp_path / "m.pth")
    result = proved(merge(tmp_path / "m.pth", path, tmp_path / "b.pth", **undo))
    found, before = tensors(result.out), tensors(base(version))
    for name, tensor in before.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    assert all("does not say on which base" in note for note in result.plan.notes)
    low = {n: t.bfloat16() for n, t in before.items()}
    write_checkpoint(tmp_path / "low.pth", low)
    merge(tmp_path / "low.pth", path, tmp_path / "wide.pth", dtype="fp32")
    back = tensors(proved(merge(tmp_path / "wide.pth", path, tmp_path / "back.pth", dtype="bf16", **undo)).out)
    equal = sum(int((back[n] == t).sum()) for n, t in low.items())
    assert equal / sum(t.numel() for t in low.values()) > 0.999  # values far smaller than what was added may differ


def test_an_adapter_is_merged_once(base, trained, tmp_path):
    (a, _), (b, _) = trained("lora"), trained("miss", name="b.safetensors")
    first, second, out = tmp_path / "1.safetensors", tmp_path / "2.pth", tmp_path / "m.pth"
    merge(base(), a, first)
    refused(ParameterError, "contains a.safetensors already(.|\n)*unmerge", first, a, out)
    merge(first, b, second, hash="sha256")
    for path in (a, b):  # also after another merge, and under another name
        path.rename(tmp_path / "c.safetensors")
        refused(ParameterError, "already", second, tmp_path / "c.safetensors", out)
        (tmp_path / "c.safetensors").rename(path)
    merge(second, a, tmp_path / "3.pth", parameters={"unmerge": True})
    merge(tmp_path / "3.pth", a, tmp_path / "4.pth")
    state = {n: t for n, t in tensors(base()).items() if n == "head.weight"}
    write_checkpoint(tmp_path / "head.pth", state)
    merge(second, tmp_path / "head.pth", tmp_path / "5.pth")
    refused(ParameterError, "already", tmp_path / "5.pth", b, out)
    plan = merge(base(), a, out, parameters={"unmerge": True}, dry_run=True).plan
    assert any("Nothing in the base's provenance" in note for note in plan.notes)
    merge(base(), a, tmp_path / "6.pth", weights=[0.0])
    merge(tmp_path / "6.pth", a, out)  # nothing of it was in there


def test_several_adapters_with_weights(base, trained, tmp_path):
    (a, _), (b, _), (c, _) = (
        trained("lora"), trained("miss", name="b.safetensors", seed=2), trained("pissa", name="c.safetensors", seed=3)
    )  # fmt: skip
    weights = [0.5, -1.5, 1.0]
    result = proved(merge(base(), [a, b, c], tmp_path / "m.pth", weights=weights))
    assert result.plan.method == "adapters" and any(
        "a.safetensors × 0.5, b.safetensors × -1.5" in n for n in result.plan.notes
    )
    start, expected = tensors(base()), {}
    for path, weight in zip((a, b, c), weights, strict=True):
        merge(base(), path, tmp_path / "one.pth", precision="float64", overwrite=True)
        for n, t in tensors(tmp_path / "one.pth").items():
            expected[n] = expected.get(n, start[n].double()) + weight * (t.double() - start[n].double())
    for n, t in tensors(result.out).items():
        torch.testing.assert_close(t.double(), expected[n], rtol=1e-5, atol=1e-5)
    back = proved(merge(result.out, [a, b, c], tmp_path / "b.pth", weights=weights, parameters={"unmerge": True}))
    for n, t in tensors(back.out).items():
        torch.testing.assert_close(t, start[n], rtol=1e-5, atol=1e-5)
    refused(ParameterError, "one per adapter", base(), [a, b], tmp_path / "n.pth", weights=[1.0])
    refused(ParameterError, "finite", base(), [a, b], tmp_path / "n.pth", weights=[1.0, float("nan")])
    refused(ParameterError, "each model counts once", base(), [a, a], tmp_path / "n.pth")


def test_the_order_of_bats_is_that_of_the_list(base, trained, tmp_path):
    (a, _), (b, _) = trained("bat-hf"), trained("bat-rwkv-peft", name="b.pth", seed=2)
    one = tensors(proved(merge(base(), [a, b], tmp_path / "1.pth")).out)
    other = tensors(proved(merge(base(), [b, a], tmp_path / "2.pth", precision="float64")).out)
    name = "blocks.0.att.key.weight"
    assert not torch.allclose(one[name], other[name], rtol=1e-5)
    merge(base(), a, tmp_path / "3.pth")
    torch.testing.assert_close(tensors(merge(tmp_path / "3.pth", b, tmp_path / "4.pth").out)[name], one[name])


def test_whole_tensors_of_adapters(base, trained, tmp_path):
    (a, _), (b, _) = trained("lora", parts=["head"]), trained("miss", name="b.safetensors", parts=["head"])
    result = proved(merge(base(), a, tmp_path / "m.pth"))
    assert same(tensors(result.out)["head.weight"], tensors(a)["head.weight"])
    refused(LayoutError, "head.weight stands whole in", base(), [a, b], tmp_path / "n.pth")
    half = proved(merge(base(), a, tmp_path / "h.pth", weights=[0.5]))
    mean = (tensors(a)["head.weight"] + tensors(base())["head.weight"]) / 2
    torch.testing.assert_close(tensors(half.out)["head.weight"], mean)
    refused(ParameterError, "stands whole", result.out, a, tmp_path / "n.pth", parameters={"unmerge": True})
    only = {n: t for n, t in tensors(a).items() if "lora" in n} | {"blocks.0.att.key.weight": torch.ones(32, 32)}
    torch.save(only, tmp_path / "both.pth")
    refused(LayoutError, "whole and as an adapter", base(), tmp_path / "both.pth", tmp_path / "n.pth", alpha=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_adapters_of_every_kind(base, trained, tmp_path, kind):
    path, _ = trained(kind)
    out = tmp_path / "n.pth"
    refused(LayoutError, r"not in the base|RWKV-", base("7.0", n_layer=1), path, out)  # 13: depth
    if kind != "miss-mini":  # its blocks of [r, mini_r] repeat in a matrix of any size: nothing tells
        refused(LayoutError, r"of the base it is|of the base is", base("7.0", n_head=4), path, out)  # 13: width
    torch.save({"blocks.0.att.time_maa_x": torch.ones(1, 1, 32)}, tmp_path / "part.pth")
    mixed = tensors(path) | {"blocks.0.att.time_maa_x": torch.ones(1, 1, 32)}
    if path.is_dir():
        content = (path / "adapter_model.safetensors").read_bytes()
        (path / "adapter_model.safetensors").unlink()
        refused(LayoutError, "adapter_model", base(), path, out)  # a half-written folder
        write_checkpoint(path / "adapter_model.safetensors", mixed)
        refused(LayoutError, r"RWKV-6\.0(.|\n)*RWKV-7\.0", base(), path, out)  # 14
        (path / "adapter_model.safetensors").write_bytes(content[:-8])
        refused(RwkvLabError, "truncated|expected", base(), path, out)
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_model.safetensors").write_bytes(content)
        (path / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
        refused(LayoutError, "rank 2", base(), path, out)  # 16
        (path / "adapter_config.json").write_text(json.dumps(config))
    else:
        with open_checkpoint(path) as ck:
            note = ck.metadata
        write_checkpoint(path, mixed, note, overwrite=True)
        refused(LayoutError, r"RWKV-6\.0(.|\n)*RWKV-7\.0", base(), path, out)  # 14
        plain = {n: t for n, t in mixed.items() if "maa" not in n}
        write_checkpoint(path, {n.replace("blocks", "layers"): t for n, t in plain.items()}, note, overwrite=True)
        refused(LayoutError, r"0 of \d+ tensors matched", base(), path, out)  # 15
        if "lora_A" in next(iter(plain)):
            halved = {n: t for n, t in plain.items() if n != "blocks.1.ffn.key.lora_A"}
            write_checkpoint(path, halved, note, overwrite=True)
            refused(LayoutError, "lora_A is not", base(), path, out)  # 16
        for dtype in (torch.int8, torch.complex64, torch.bool):  # 19
            write_checkpoint(path, plain | {next(iter(plain)): torch.ones(4, 32, dtype=dtype)}, note, overwrite=True)
            refused(LayoutError, "adapters are|weights must be", base(), path, out)
        for value, word in ((float("nan"), "NaN"), (float("inf"), "NaN|Inf")):  # 17
            bad = plain | {next(iter(plain)): plain[next(iter(plain))].index_fill(0, torch.tensor([0]), value)}
            write_checkpoint(path, bad, note, overwrite=True)
            before = snapshot(tmp_path)
            with pytest.raises(NumericsError, match=word):
                merge(base(), path, out)
            assert snapshot(tmp_path) == before
        write_checkpoint(path, {n: t * 1e7 for n, t in plain.items()}, note, overwrite=True)
        with pytest.raises(NumericsError, match="overflow"):  # 18
            merge(base(), path, out, dtype="fp16")


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf"), True, "8"])
def test_alphas_that_are_none(base, trained, tmp_path, alpha):
    path = bare(trained("lora")[0], tmp_path / "l.pth")
    refused(ParameterError, "alpha", base(), path, tmp_path / "n.pth", alpha=alpha)


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_0_is_the_base_and_twice_is_the_same_file(base, trained, tmp_path, kind):
    path, _ = trained(kind)
    result = proved(merge(base(), path, tmp_path / "m.pth", alpha=0))
    expected = tensors(base())
    assert all(same(t, expected[n]) for n, t in tensors(result.out).items())
    files = [merge(base(), path, tmp_path / f"{i}.pth").out.read_bytes() for i in range(2)]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("quant", "kind"), [*each(["none"], LARGE), *each(["int8", "nf4"], LARGE), ("nf4", "lora"), ("int8", "pissa")]
)
def test_matrices_larger_than_a_block(trained, base, tmp_path, kind, quant):
    """Rows come in pieces: each must find its part of the adapter, and whole blocks of NF4."""
    sizes = {"n_head": 8, "head_size": 20, "dim_ffn": 4000, "n_layer": 1}
    path, model = trained(kind, "4.0", quant=quant, **sizes)
    result = proved(merge(base("4.0", **sizes), path, tmp_path / "m.pth"))
    expected = model(TOKENS)[0]
    assert relative_rms(logits(result.out), expected) < (1e-2 if kind == "pissa" and quant != "none" else CLOSE)
