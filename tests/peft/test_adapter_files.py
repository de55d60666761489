"""Files in both layouts: what they mean, by plain loops of numpy; what is saved comes back bit for bit."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import same, snapshot
from pairwise import pairwise
from random_models import VERSIONS, make_layout, make_tokens, random_tensors, relative_rms
from reading import record_reads
from trained import CONFIGS, as_if_trained

from rwkv_lab import RWKV_Dual, open_checkpoint
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.errors import CorruptFileError
from rwkv_lab.peft import (
    LoraConfig,
    adapter_of,
    load_adapter,
    merged_state_dict,
    open_adapter,
    quantised_and_back,
    save_adapter,
    save_pissa_init,
)

TOKENS = make_tokens(2, 9)
DTYPES = [torch.float32, torch.bfloat16]
TARGETS = ["a.pth", "a.safetensors", "folder"]
X = "blocks.1.ffn.key"  # 52 x 32


def in_layout_of(method: str, version="7.0", r=4, seed=5, name="disha", prefix=""):
    """Tensors as RWKV-PEFT saves them, for two layers of unequal shape, and norms in full."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.1 * torch.randn(shape, generator=g)

    tensors = {f"{prefix}blocks.1.ln1.weight": draw(32), f"{prefix}blocks.0.ln0.bias": draw(32)}
    for x, (out, inputs) in {"blocks.0.att.key": (32, 32), X: (52, 32)}.items():
        x = prefix + x
        if method == "lora":
            tensors |= {f"{x}.lora_A": draw(r, inputs), f"{x}.lora_B": draw(out, r)}
        elif method == "init":
            tensors |= {f"{x}.init_lora_A": draw(r, inputs), f"{x}.init_lora_B": draw(out, r)}
        else:
            shape = {"bone": (r, out), "hf": (out // r, r, r), "rwkv-peft": (inputs // r, r, r)}[method]
            tensors[f"{x}.{name}"] = draw(*shape)
    if method == "init":
        tensors = {n: t for n, t in tensors.items() if "init" in n}
    return tensors


def by_loops(weight, block, variant):
    """What the block makes of the weight, element by element, in float64."""
    W, D = weight.double().numpy(), block.double().numpy()
    out, inputs = W.shape
    merged = W.copy()
    if variant == "bone":
        for o in range(out):
            for i in range(inputs):
                merged[o, i] += D[i % len(D), o]
        return merged
    r = D.shape[1]
    for a in range(out // r):
        for b in range(inputs // r):
            tile = np.s_[a * r : a * r + r, b * r : b * r + r]
            d = D[a] if variant == "hf" else D[b]
            merged[tile] += W[tile] @ d + d
    return merged


def written(path, tensors):
    write_checkpoint(path, tensors)
    return path


def merged_by_us(base, path, **asked):
    """Weights of the plain model that does what base and adapter do, in float64."""
    model = RWKV_Dual.from_pretrained(base("7.0"), dtype=torch.float64)
    with open_adapter(path, **asked) as adapter:
        load_adapter(model, adapter)
    return merged_state_dict(model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_lora_of_rwkv_peft(base, tmp_path, prefix, suffix):
    tensors = in_layout_of("lora", prefix=prefix)
    path = written(tmp_path / f"rwkv-3{suffix}", tensors)
    W = random_tensors(make_layout("7.0"))
    found = merged_by_us(base, path, alpha=6)
    A, B = (tensors[f"{prefix}{X}.lora_{h}"].double() for h in "AB")
    torch.testing.assert_close(found[f"{X}.weight"], W[f"{X}.weight"].double() + 6 / 4 * B @ A)
    assert torch.equal(found["blocks.1.ln1.weight"], tensors[f"{prefix}blocks.1.ln1.weight"].double())
    assert torch.equal(found["blocks.0.ffn.key.weight"], W["blocks.0.ffn.key.weight"].double())
    found = merged_by_us(base, path, alpha=6, use_rslora=True)
    torch.testing.assert_close(found[f"{X}.weight"], W[f"{X}.weight"].double() + 6 / 2 * B @ A)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_pissa_of_rwkv_peft(base, tmp_path, prefix):
    """Either spelling of the start's names; on the original base, and on what was left over of it."""
    tensors, start = in_layout_of("lora"), in_layout_of("init", seed=6, prefix=prefix)
    path, init = written(tmp_path / "rwkv-3.pth", tensors), written(tmp_path / "init_pissa.pth", start)
    W = random_tensors(make_layout("7.0"))[f"{X}.weight"].double()
    A, B = (tensors[f"{X}.lora_{h}"].double() for h in "AB")
    A0, B0 = (start[f"{prefix}{X}.init_lora_{h}"].double() for h in "AB")
    torch.testing.assert_close(merged_by_us(base, path, pissa_init=init)[f"{X}.weight"], W - B0 @ A0 + B @ A)
    torch.testing.assert_close(merged_by_us(base, path, residual_base=True)[f"{X}.weight"], W + B @ A)


@pytest.mark.parametrize("name", ["disha", "bone"])
@pytest.mark.parametrize(("variant", "r"), [("bone", 4), ("bone", 5), ("hf", 4), ("rwkv-peft", 4)])
def test_miss_of_rwkv_peft(base, tmp_path, variant, r, name):
    tensors = in_layout_of(variant, r=r, name=name)
    found = merged_by_us(base, written(tmp_path / "a.pth", tensors), bat=None if variant == "bone" else variant)
    for x in ("blocks.0.att.key", X):
        weight = random_tensors(make_layout("7.0"))[f"{x}.weight"]
        expected = by_loops(weight, tensors[f"{x}.{name}"], variant)
        np.testing.assert_allclose(found[f"{x}.weight"].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_names_taken_out_of_a_folder(base, tmp_path):
    """Tensors of a Hugging Face adapter saved by themselves: the same, but they do not say alpha."""
    tensors = in_layout_of("lora")
    path = written(tmp_path / "a.pth", tensors)
    renamed = {f"base_model.model.{n}{'.default.weight' if 'lora_' in n else ''}": t for n, t in tensors.items()}
    other = written(tmp_path / "b.safetensors", renamed)
    a, b = (merged_by_us(base, p, alpha=8) for p in (path, other))
    assert all(torch.equal(a[n], b[n]) for n in a)


def has_place(version, name, target, dtype) -> bool:
    """In its layout: what has none is refused, test_adapter_refusals.py."""
    return name != "bat-rwkv-peft" if target == "folder" else name not in ("miss-mini", "bat-hf")


@pytest.mark.parametrize(
    ("version", "name", "target", "dtype"), pairwise(VERSIONS, CONFIGS, TARGETS, DTYPES, where=has_place), ids=str
)
def test_what_is_saved_comes_back(base, adapted, tmp_path, version, name, target, dtype):
    model = as_if_trained(adapted(version, CONFIGS[name], dtype))
    saved = adapter_of(model)
    save_adapter(saved, tmp_path / target)
    again = RWKV_Dual.from_pretrained(base(version), dtype=dtype)
    with open_adapter(tmp_path / target) as adapter:
        load_adapter(again, adapter)
        converted = name.startswith("pissa") and target == "folder"
        if not converted:
            assert adapter.method == saved.method and adapter.full.keys() == saved.full.keys()
            assert adapter.targets.keys() == saved.targets.keys()
            for n, values in saved.tensors().items():
                assert same(values.read(), adapter.tensors()[n].read()), n
            for x, t in saved.targets.items():
                assert getattr(t, "scaling", t.rank) == getattr(adapter.targets[x], "scaling", adapter.targets[x].rank)
    if not converted:
        assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    else:  # the weight was rounded once where the trained model rounds what is left over of it
        assert relative_rms(again(TOKENS)[0], model(TOKENS)[0]) < {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]


@pytest.mark.parametrize("target", ["a.pth", "a.safetensors"])
def test_everything_besides_comes_back(base, adapted, tmp_path, target):
    model = as_if_trained(adapted("6.0", LoraConfig(lora_r=4, train_parts=["emb", "head", "ln", "time", "time_state"])))
    save_adapter(adapter_of(model), tmp_path / target)
    again = RWKV_Dual.from_pretrained(base("6.0"))
    with open_adapter(tmp_path / target) as adapter:
        load_adapter(again, adapter)
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert trained[0] == trained[1]


def test_saved_twice_is_the_same_file(adapted, tmp_path):
    adapter = adapter_of(as_if_trained(adapted("7.0", CONFIGS["pissa"])))
    for name in ("a.pth", "b.pth", "c", "d"):
        save_adapter(adapter, tmp_path / name)
    files = snapshot(tmp_path)
    assert files["a.pth"] == files["b.pth"]
    assert files["c/adapter_model.safetensors"] == files["d/adapter_model.safetensors"]
    assert files["c/adapter_config.json"] == files["d/adapter_config.json"]
    assert set(files) == {"a.pth", "b.pth", "c", "d"} | {
        f"{x}/adapter_{y}" for x in "cd" for y in ("config.json", "model.safetensors")
    }


def test_the_note_says_what_the_layout_does_not(adapted, tmp_path):
    save_adapter(adapter_of(adapted("7.0", LoraConfig(lora_r=4, lora_alpha=10, quant="nf4"))), tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        note = json.loads(archive.read("archive/rwkv_lab.adapter"))
    assert note == {"method": "lora", "quant": "nf4", "alpha": 10, "use_rslora": False}
    with open_adapter(tmp_path / "a.pth", alpha=10) as adapter:
        assert adapter.quant == "nf4" and adapter.targets[X].scaling == 2.5
    with open_adapter(written(tmp_path / "b.pth", in_layout_of("lora")), alpha=10) as adapter:
        assert adapter.quant is None


@pytest.mark.parametrize("name", ["lora", "miss"])
def test_a_folder_says_how_the_base_was_stored(adapted, tmp_path, name):
    for quant in ("none", "nf4", "int8"):
        save_adapter(adapter_of(adapted("7.0", replace(CONFIGS[name], quant=quant))), tmp_path / quant)
        with open_adapter(tmp_path / quant) as adapter:
            assert adapter.quant == quant
    weights = tmp_path / "nf4" / "adapter_model.safetensors"
    with open_checkpoint(weights) as ck:
        tensors = {n: ck[n] for n in ck}
    write_checkpoint(weights, tensors, overwrite=True)
    with open_adapter(tmp_path / "nf4") as adapter:
        assert adapter.quant is None  # as others save it
    write_checkpoint(weights, tensors, {"rwkv_lab.quant": "fp5"}, overwrite=True)
    with pytest.raises(CorruptFileError, match="'fp5'"):
        open_adapter(tmp_path / "nf4")


def test_pissa_for_the_tools_of_rwkv_peft(base, adapted, tmp_path):
    """Two files, as its trainer writes them: names of the start begin with `model.`."""
    model = as_if_trained(adapted("7.0", CONFIGS["pissa"]))
    save_pissa_init(adapter_of(model), tmp_path / "init_pissa.pth")
    save_adapter(adapter_of(model), tmp_path / "own.pth")
    with open_checkpoint(tmp_path / "init_pissa.pth") as init, open_checkpoint(tmp_path / "own.pth") as own:
        assert (init.kind, own.kind) == ("pissa-init", "pissa")
        assert all(n.startswith("model.blocks.") for n in init.stored)
        halves = {n: own[n] for n in own if ".lora_" in n}
    write_checkpoint(tmp_path / "rwkv-1.pth", halves)
    again = RWKV_Dual.from_pretrained(base("7.0"))
    with open_adapter(tmp_path / "rwkv-1.pth", pissa_init=tmp_path / "init_pissa.pth") as adapter:
        load_adapter(again, adapter)
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])


def test_opening_reads_headers_only(adapted, tmp_path, monkeypatch):
    model = adapted("7.0", LoraConfig("pissa", lora_r=4), n_head=8, dim_ffn=600)
    for name in ("a.pth", "a.safetensors", "folder"):
        save_adapter(adapter_of(model), tmp_path / name)
        reads = record_reads(monkeypatch)
        with open_adapter(tmp_path / name) as adapter:
            held = sum(ck.bytes for ck in adapter.opened)
            assert sum(end - start for _, start, end in reads) < held / 3
            assert adapter.targets["blocks.1.ffn.key"].rank == (8 if name == "folder" else 4)
        assert all(ck.closed for ck in adapter.opened)


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_by_themselves(adapted, name, quant):
    """Merging a few rows at a time gives the merged weight, and undoing it the base's."""
    c = CONFIGS[name]
    r = 4 if "bat" in name else 7
    config = LoraConfig(c.method, None, r, 6, 0, c.use_rslora, c.svd_niter, c.miss_variant, c.mini_r, quant=quant)
    model = as_if_trained(adapted("7.0", config, torch.float64))
    tensors = random_tensors(make_layout("7.0"))
    for x in ("blocks.0.att.key", X, "blocks.1.ffn.value"):
        target, weight = adapter_of(model).targets[x], tensors[f"{x}.weight"].double()
        layer = model.get_submodule(x)
        assert not target.misfit(tuple(weight.shape)) and target.misfit((5, 3)) and target.misfit((52,))
        pieces = []
        for start in range(0, len(weight), 4 * target.row_multiple):
            rows = weight[start : start + 4 * target.row_multiple]
            frozen = quantised_and_back(target.residual_rows(rows, start), quant)
            pieces.append(target.adapted_rows(frozen, start))
            if quant == "none":
                torch.testing.assert_close(target.restored_rows(pieces[-1], start), rows)
        if quant != "nf4" or weight.shape[1] % 64 == 0:  # rows of 32 and 52 values do not begin blocks of 64
            torch.testing.assert_close(torch.cat(pieces), layer.merged_weight())
        whole = target.adapted_rows(quantised_and_back(target.residual_rows(weight), quant))
        torch.testing.assert_close(whole, layer.merged_weight())


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["lora", "pissa", "miss"])
def test_a_quantised_base_comes_back(base, adapted, tmp_path, name, quant):
    c = CONFIGS[name]
    model = as_if_trained(adapted("7.0", LoraConfig(c.method, None, 4, quant=quant)))
    save_adapter(adapter_of(model), tmp_path / "a.pth")
    again = RWKV_Dual.from_pretrained(base("7.0"))
    with open_adapter(tmp_path / "a.pth") as adapter:
        load_adapter(again, adapter, quant=adapter.quant)
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    merged = RWKV_Dual.from_pretrained(base("7.0"))
    merged.load_state_dict(merged_state_dict(again))
    assert relative_rms(merged(TOKENS)[0], model(TOKENS)[0]) < 1e-5
