"""PiSSA, MiSS and DoRA between RWKV-PEFT's file and peft's folder: peft itself loads them on converted models."""

import json
from types import SimpleNamespace

import pytest
import torch
from pairwise import each
from random_models import make_layout, make_tokens, relative_rms, write_model

from rwkv_lab import RWKV_Dual
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.convert import convert, to_pth
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge import merge
from rwkv_lab.peft import LoraConfig, adapter_of, load_model_and_apply_peft, open_adapter, save_adapter

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft.tuners", reason="peft is not installed")  # "peft" alone is also a folder of tests
import peft  # noqa: E402
import transformers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft, about themselves

TOKENS = make_tokens(1, 9)
LAYERS = ["att.key", "att.output", "ffn.value"]
GENERATIONS = {  # targets that peft's own classes load
    "4.0": ["transformers"],
    "5.0": ["transformers"],
    "5.1": ["transformers"],
    "5.2": ["transformers"],
    "6.0": ["transformers"],
    "7.0": ["transformers", "fla"],
}
PAIRS = [(version, target) for version, targets in GENERATIONS.items() for target in targets]
KINDS = {
    "lora": LoraConfig(lora_r=4, lora_alpha=6, use_rslora=True, lora_target_modules=LAYERS),
    "pissa": LoraConfig("pissa", lora_r=4, lora_target_modules=LAYERS),
    "miss": LoraConfig("miss", lora_r=6, lora_target_modules=LAYERS),
    "miss-mini": LoraConfig("miss", lora_r=4, miss_variant="mini", mini_r=2, lora_target_modules=LAYERS),
    "bat-hf": LoraConfig("miss", lora_r=4, miss_variant="bat-hf", lora_target_modules=LAYERS),
}
ALL = [*KINDS, "dora"]
OTHER_BAT = LoraConfig("miss", lora_r=4, miss_variant="bat-rwkv-peft", lora_target_modules=LAYERS)
IN_FILES = ("lora", "pissa", "miss")  # the others have no place in RWKV-PEFT's layout


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """bases(version) -> its path, in float32."""
    folder = tmp_path_factory.mktemp("bases")

    def path(version):
        file = folder / f"{version}.pth"
        return file if file.exists() else write_model(file, make_layout(version, head_size=64, dim_ffn=96))

    return path


def trained(base, kind, out):
    """An adapter of that kind or configuration, saved to `out` as if it had been trained."""
    torch.manual_seed(0)
    if kind == "dora":
        return trained_dora(base, out)
    model = load_model_and_apply_peft(
        SimpleNamespace(peft_load_path=base, dtype=torch.float32), KINDS[kind] if isinstance(kind, str) else kind
    )
    moved(model)
    save_adapter(adapter_of(model), out)
    return out


def trained_dora(base, out):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, use_dora=True)
    model = moved(peft.get_peft_model(RWKV_Dual.from_pretrained(base), config))
    model.save_pretrained(out)
    return out


@torch.no_grad()
def moved(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def loaded(folder, target):
    if target == "fla":
        rwkv7_hf = pytest.importorskip("rwkv7_hf.modeling_rwkv7", reason="rwkv7-hf is not installed")
        return rwkv7_hf.RWKV7ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)


def converted(source, target, out, **options):
    result = convert(source, target, out, **options)
    assert all(check.passed for check in result.checks), result.checks
    return result.out


def compare(base, adapter, folder, target, version, tmp_path):
    """peft on the converted model, the adapter merged by peft, and the adapter merged here: the same model."""
    there = loaded(converted(base, target, tmp_path / "there"), target).eval()
    with torch.no_grad():
        before = there(TOKENS).logits
        there = peft.PeftModel.from_pretrained(there, folder).eval()
        found = there(TOKENS).logits
        there.merge_and_unload().save_pretrained(tmp_path / "merged_there")
    here = merge(base, adapter, tmp_path / "here.pth").out
    expected = RWKV_Dual.from_pretrained(here)(TOKENS)[0]
    assert relative_rms(before, expected) > 1e-2 and relative_rms(found, expected) < 2e-5
    with open_checkpoint(here) as ours, open_checkpoint(tmp_path / "merged_there") as theirs:
        assert theirs.layout.version == version
        for name in ours:
            torch.testing.assert_close(theirs[name].reshape(ours[name].shape), ours[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("where", "kind"), [*each(PAIRS, ALL), *each(PAIRS[-2:-1], ALL), *each(PAIRS[-1:], ALL)], ids=str
)
def test_peft_loads_what_was_converted(where, kind, bases, tmp_path):
    version, target = where
    base = bases(version)
    adapter = trained(base, kind, tmp_path / ("a.pth" if kind in IN_FILES else "a"))
    folder = converted(adapter, target, tmp_path / "folder", generation=version)
    compare(base, adapter, folder, target, version, tmp_path)


@pytest.mark.parametrize("kind", [*IN_FILES, "dora"])
@pytest.mark.parametrize("version", ["4.0", "7.0"])
def test_there_and_back(version, kind, bases, tmp_path):
    """A file, a folder with the names of the target, and a file again: what merges is the same."""
    base, target = bases(version), GENERATIONS[version][-1]
    adapter = trained(base, kind, tmp_path / ("a.pth" if kind in IN_FILES else "a"))
    folder = converted(adapter, target, tmp_path / "folder", generation=version)
    back = to_pth(folder, tmp_path / "back.pth")
    assert all(check.passed for check in back.checks)
    again = converted(back.out, target, tmp_path / "again", generation=version)
    merged = [merge(base, a, tmp_path / f"{i}.pth").out for i, a in enumerate((adapter, folder, back.out, again))]
    expected, *others = (torch.load(path, weights_only=True) for path in merged)
    for found in others:
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("version", "target"), [("5.2", "world"), ("6.0", "world"), ("6.0", "fla")])
@pytest.mark.parametrize("kind", [*KINDS, "dora"])
def test_targets_whose_code_is_elsewhere(version, target, kind, bases, tmp_path):
    """Merged here on the converted base, under the target's names."""
    base = bases(version)
    adapter = trained(base, kind, tmp_path / ("a.pth" if kind in IN_FILES else "a"))
    folder = converted(adapter, target, tmp_path / "folder", generation=version)
    there = converted(base, target, tmp_path / "there")
    expected = torch.load(merge(base, adapter, tmp_path / "0.pth").out, weights_only=True)
    found = torch.load(merge(there, folder, tmp_path / "1.pth").out, weights_only=True)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].reshape(tensor.shape), tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["miss-mini", "bat-hf"])
def test_miss_that_rwkv_peft_has_not(kind, bases, tmp_path):
    adapter = trained(bases("7.0"), kind, tmp_path / "a")
    name = kind.removeprefix("miss-")
    with pytest.raises(ParameterError, match=f"RWKV-PEFT has no MiSS of the kind {name}: save it to a folder"):
        to_pth(adapter, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_the_other_bat_has_no_place_in_peft(bases, tmp_path):
    """One block per input tile, as RWKV-PEFT means it; a file of that program does not say which it is."""
    adapter = trained(bases("7.0"), OTHER_BAT, tmp_path / "a.pth")
    with pytest.raises(ParameterError, match="peft has no MiSS of the kind bat-rwkv-peft.\nSave .* or merge it"):
        convert(adapter, "fla", tmp_path / "out", generation="7.0")
    bare = torch.load(adapter, weights_only=True)
    write_checkpoint(tmp_path / "bare.pth", bare)
    with pytest.raises(
        ParameterError, match=r"(?s)pass bat=.*convert that:\nwith .*open_adapter\('.*bare.pth', bat=…\)"
    ):
        convert(tmp_path / "bare.pth", "fla", tmp_path / "out", generation="7.0")


def test_pissa_without_its_start(bases, tmp_path):
    """Files of RWKV-PEFT and folders of peft: what they started from stands elsewhere, and is asked for."""
    base = bases("7.0")
    whole = torch.load(trained(base, "pissa", tmp_path / "whole.pth"), weights_only=True)
    write_checkpoint(tmp_path / "bare.pth", {n: t for n, t in whole.items() if "init_" not in n})
    write_checkpoint(tmp_path / "init.pth", {f"model.{n}": t for n, t in whole.items() if "init_" in n})
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, init_lora_weights="pissa")
    there = peft.get_peft_model(RWKV_Dual.from_pretrained(base), config)
    there.save_pretrained(tmp_path / "init")
    moved(there).save_pretrained(tmp_path / "bare")
    for name, start in (("bare.pth", "init.pth"), ("bare", "init")):
        with pytest.raises(
            ParameterError, match=r"PiSSA.*\nOnly alpha= is taken by convert.*\nwith .*pissa_init=…"
        ) as e:
            convert(tmp_path / name, "fla", tmp_path / "out", generation="7.0")
        assert len(str(e.value).splitlines()) == 3
        with open_adapter(tmp_path / name, pissa_init=tmp_path / start) as adapter:  # as the message says
            save_adapter(adapter, tmp_path / f"{name}-stated.pth")
        folder = converted(tmp_path / f"{name}-stated.pth", "fla", tmp_path / f"{name}-folder", generation="7.0")
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8  # the start is taken out by it
        (tmp_path / name.replace(".", "-")).mkdir(exist_ok=True)
        compare(base, tmp_path / f"{name}-stated.pth", folder, "fla", "7.0", tmp_path / name.replace(".", "-"))


def test_dora_without_its_lengths(bases, tmp_path):
    folder = trained(bases("7.0"), "dora", tmp_path / "a")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": False}))
    with pytest.raises(LayoutError, match="does not state use_dora"):
        convert(folder, "fla", tmp_path / "out", generation="7.0")
