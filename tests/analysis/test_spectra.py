"""Spectra of changes against the changes written out, in float64."""

import math

import pytest
import torch
from random_models import make_layout, write_model

from rwkv_lab import RWKV_Dual, open_checkpoint
from rwkv_lab.analysis.spectra import Spectrum, adapter_spectra, cosine, delta, model_spectra
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.errors import LayoutError, NumericsError, ParameterError
from rwkv_lab.peft import LoraConfig, adapter_of, apply_peft, merged_state_dict, open_adapter, save_adapter

KINDS = {
    "lora": LoraConfig(lora_r=4, lora_alpha=6),
    "pissa": LoraConfig("pissa", lora_r=4),
    "miss": LoraConfig("miss", lora_r=6),
    "bat": LoraConfig("miss", lora_r=4, miss_variant="bat-rwkv-peft"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base") / "b.safetensors", make_layout("7.0"))


def tuned(base, kind, folder, seed=1):
    model = RWKV_Dual.from_pretrained(base)
    torch.manual_seed(seed)
    apply_peft(model, KINDS[kind])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    path = folder / f"{kind}-{seed}.safetensors"
    save_adapter(adapter_of(model), path)
    return path, merged_state_dict(model)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_the_whole_change(base, tmp_path, kind):
    path, merged = tuned(base, kind, tmp_path)
    with open_checkpoint(base) as ck, open_adapter(path) as adapter:
        spectra = list(adapter_spectra(ck, adapter))
        name = f"{spectra[-1].name}.weight"
        assert [s.name for s in adapter_spectra(ck, adapter, {name})] == [spectra[-1].name]
        assert [s.name for s in spectra] == [n[:-7] for n in ck.info if n[:-7] in adapter.targets] and spectra
        for s in spectra:
            weight = ck[f"{s.name}.weight"].double()
            change = merged[f"{s.name}.weight"].double() - weight
            expected = torch.linalg.svdvals(change)
            found = torch.zeros_like(expected)
            found[: len(s.singular_values)] = s.singular_values[: len(expected)]
            # The merged weights were rounded to float32, W's size times 6e-8; singular values move by no more.
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(weight.norm()))
            assert s.frobenius == pytest.approx(float(change.norm()), rel=1e-4)
            assert s.relative == pytest.approx(float(change.norm() / weight.norm()), rel=1e-4)
            assert s.relative_spectral == pytest.approx(float(expected[0] / torch.linalg.svdvals(weight)[0]), rel=1e-4)
            torch.testing.assert_close(delta(ck, adapter, s.name), change, rtol=0, atol=1e-6)


def test_a_fine_tune_has_spectra_too(base, tmp_path):
    with open_checkpoint(base) as ck:
        tensors = {n: ck[n] for n in ck.info}
        write_checkpoint(tmp_path / "t.pth", tensors | {"head.weight": tensors["head.weight"] * 1.5})
        with open_checkpoint(tmp_path / "t.pth") as other:
            spectra = {s.name: s for s in model_spectra(ck, other.info)}
            only = list(model_spectra(ck, other.info, {"head.weight"}))
    assert spectra["head"].relative == pytest.approx(0.5) and spectra["blocks.0.att.key"].frobenius == 0
    assert [s.name for s in only] == ["head"] and math.isnan(spectra["blocks.0.att.key"].share_of(3))
    assert spectra["blocks.0.att.key"].effective_rank == 0 and spectra["blocks.0.att.key"].rank_for(0.9) == 0


def test_ranks_of_known_spectra():
    def made(*values):
        return Spectrum("x", (8, 8), torch.tensor(values, dtype=torch.float64), 2.0, 1.0)

    assert made(1, 1, 1, 1).effective_rank == pytest.approx(4)
    assert made(3, 0, 0).effective_rank == pytest.approx(1)
    assert [made(3, 1, 0).rank_for(x) for x in (0, 0.5, 0.9, 0.91, 1)] == [0, 1, 1, 2, 2]
    assert [made(1, 1, 1, 1).rank_for(x) for x in (0.25, 0.26, 0.99, 1)] == [1, 2, 4, 4]
    assert [made(3, 1).share_of(r) for r in (0, 1, 2, 5)] == [0, 0.9, 1, 1]
    assert made(3, 4).frobenius == 5 and made(3, 4).relative == 2.5
    assert math.isnan(Spectrum("x", (2, 2), torch.ones(1).double(), 0.0, 0.0).relative)
    with pytest.raises(ParameterError, match="share=1.5"):
        made(1).rank_for(1.5)


def test_directions():
    x, y = torch.randn(2, 5, 7)
    assert cosine(x, 3 * x) == pytest.approx(1) and cosine(x, -x) == pytest.approx(-1)
    assert cosine(x, y) == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), rel=1e-5)
    assert math.isnan(cosine(x, 0 * x))
    with pytest.raises(ParameterError, match="shapes"):
        cosine(x, y[1:])


def test_what_has_no_spectrum(base, tmp_path):
    path, _ = tuned(base, "lora", tmp_path)
    other = write_model(tmp_path / "o.safetensors", make_layout("7.0", n_layer=1))
    with open_checkpoint(other) as ck, open_adapter(path) as adapter, pytest.raises(LayoutError):
        list(adapter_spectra(ck, adapter))
    with open_checkpoint(path) as ck:
        note, tensors = ck.metadata, {n: ck[n] for n in ck.info}
    tensors["blocks.1.att.key.lora_A"][0, 0] = torch.nan
    write_checkpoint(tmp_path / "nan.safetensors", tensors, note)
    with open_checkpoint(base) as ck, open_adapter(tmp_path / "nan.safetensors") as adapter:
        with pytest.raises(NumericsError, match="blocks.1.att.key"):
            list(adapter_spectra(ck, adapter))
