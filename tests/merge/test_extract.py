"""A LoRA from a fine-tune: it keeps what numpy says, and merging it gives the fine-tune back."""

import json

import numpy as np
import pytest
import torch
from models import LAYOUTS, random_lora, random_model, random_state, same

from rwkv_lab import merge, open_checkpoint
from rwkv_lab.checkpoint import Layout
from rwkv_lab.errors import LayoutError, NumericsError, OutputError, ParameterError
from rwkv_lab.merge import extract, extract_lora, verify_merge


@pytest.fixture
def files(tmp_path):
    """Saves a base and a fine-tune: matrices, a norm and the head changed, the rest not."""

    def save(version="7.0", dtype=torch.float32, size=0.1):
        base = random_model(LAYOUTS[version], dtype)
        other = random_model(LAYOUTS[version], dtype, seed=1)
        moved = [n for n in base if n.endswith(".weight") and "blocks.0.att.value" not in n and n != "emb.weight"]
        tuned = base | {n: (base[n].double() + size * other[n].double()).to(dtype) for n in moved}
        torch.save(base, tmp_path / "base.pth")
        torch.save(tuned, tmp_path / "tuned.pth")
        return base, tuned, (tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "lora.pth")

    return save


def merged_back(paths, alpha) -> dict:
    result = merge(paths[0], paths[2], paths[2].with_name("back.pth"), method="lora", alpha=alpha, overwrite=True)
    assert all(c.passed for c in (*result.checks, *verify_merge(result)))
    return torch.load(result.out, weights_only=True)


@pytest.mark.parametrize("version", list(LAYOUTS))
def test_full_rank_gives_the_fine_tune_back(version, files):
    base, tuned, paths = files(version)
    result = extract_lora(*paths, rank=16)
    back = merged_back(paths, result.alpha)
    for name, t in tuned.items():
        torch.testing.assert_close(back[name], t, rtol=1e-6, atol=1e-6)
    assert result.alpha == 16 and result.error < 1e-6
    names = {m.name for m in result.matrices}
    assert "blocks.0.att.value.weight" not in names and "blocks.0.ffn.key.weight" in names
    assert set(result.whole) == {n for n in tuned if not same(tuned[n], base[n])} - names
    with open_checkpoint(paths[2]) as ck:
        assert ck.kind == "lora" and ck.info["blocks.0.ffn.key.lora_A"].shape == (16, 16)


@pytest.mark.parametrize("rank", [1, 5])
def test_a_rank_keeps_what_numpy_says(rank, files):
    base, tuned, paths = files()
    result = extract_lora(*paths, rank=rank)
    back = merged_back(paths, result.alpha)
    for m in result.matrices:
        delta = (tuned[m.name].double() - base[m.name].double()).numpy()
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert m.rank == rank and m.energy == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), rel=1e-5)
        assert m.error == pytest.approx(np.sqrt(1 - m.energy), rel=1e-4)
        np.testing.assert_allclose(back[m.name].double().numpy() - base[m.name].double().numpy(), best, atol=3e-6)
    assert 0 < result.error < 1


@pytest.mark.parametrize("energy", [0.5, 0.9, 1])
def test_an_energy_gives_every_matrix_its_rank(energy, files):
    base, tuned, paths = files()
    result = extract_lora(*paths, energy=energy)
    assert result.alpha == max(m.rank for m in result.matrices)
    for m in result.matrices:
        s = np.linalg.svd((tuned[m.name].double() - base[m.name].double()).numpy(), compute_uv=False)
        kept = np.cumsum(s**2) / (s**2).sum()
        assert m.energy >= energy - 1e-6 and (m.rank == 1 or kept[m.rank - 2] < energy)
    if energy < 1:
        assert len({m.rank for m in result.matrices}) > 1
    back = merged_back(paths, result.alpha)  # one alpha serves unequal ranks
    for m in result.matrices:
        error = torch.linalg.vector_norm(back[m.name] - tuned[m.name]) / m.norm
        assert float(error) == pytest.approx(m.error, abs=1e-4)


def test_the_randomised_decomposition_is_as_good(files, monkeypatch):
    layout = Layout("4.0", 1, 96, 96, 200, 11, 0, 0)
    monkeypatch.setitem(LAYOUTS, "wide", layout)
    *_, paths = files("wide")
    exact = extract_lora(*paths, rank=4)
    monkeypatch.setattr(extract, "_EXACT_BELOW", 1)
    near = extract_lora(*paths, rank=4, overwrite=True)
    first = paths[2].read_bytes()
    for a, b in zip(exact.matrices, near.matrices, strict=True):
        assert a.error <= b.error + 1e-6 and b.error == pytest.approx(a.error, rel=5e-3)
    extract_lora(*paths, rank=4, overwrite=True)
    assert paths[2].read_bytes() == first


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_bfloat16_models_and_pairs(dtype, files):
    base, tuned, paths = files(dtype=torch.bfloat16)
    result = extract_lora(*paths, rank=16, dtype=dtype)
    with open_checkpoint(paths[2]) as ck:
        wanted = torch.float32 if dtype else torch.bfloat16
        assert ck.info["blocks.1.att.key.lora_B"].dtype == wanted
    assert result.error < (1e-5 if dtype else 1e-2)  # bfloat16 pairs: two factors with 2^-9 each


def test_targets_and_the_note_beside(files):
    _, _, paths = files()
    result = extract_lora(*paths, rank=2, targets=["*.ffn.key.weight"])
    assert {m.name for m in result.matrices} == {f"blocks.{i}.ffn.key.weight" for i in range(2)}
    assert "blocks.1.att.key.weight" in result.whole
    note = json.loads((paths[2].parent / "lora.pth.json").read_text())
    assert note["job"] == "extract_lora" and note["recipe"]["alpha"] == 2 and len(note["matrices"]) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "rank or energy"),
        ({"rank": 2, "energy": 0.5}, "rank or energy"),
        ({"rank": 17}, r"rank 17 is larger than blocks.*\[16, 16\]"),
        ({"rank": 0}, "rank=0: .* 1"),
        ({"rank": 2.0}, "rank=2.0: .*integer"),
        ({"energy": 1.5}, "energy=1.5: .* 1"),
        ({"rank": 2, "targets": ["*.kee.*"]}, "matches none"),
        ({"rank": 2, "dtype": "int8"}, "dtype"),
    ],
)
def test_what_is_refused(given, said, files):
    *_, paths = files()
    with pytest.raises(ParameterError, match=said):
        extract_lora(*paths, **given)
    assert not paths[2].exists()


def test_files_that_are_refused(files, tmp_path):
    base, tuned, paths = files()
    torch.save(tuned | {"head.weight": tuned["head.weight"] * float("nan")}, tmp_path / "nan.pth")
    torch.save(tuned | {"blocks.1.att.key.weight": tuned["emb.weight"].new_full((16, 16), float("nan"))},
               tmp_path / "nan2.pth")  # fmt: skip
    torch.save(base, tmp_path / "copy.pth")
    torch.save(random_model(LAYOUTS["6.0"]), tmp_path / "six.pth")
    torch.save(random_lora(), tmp_path / "adapter.pth")
    torch.save(random_state(), tmp_path / "state.pth")
    for name, error, said in [
        ("nan.pth", NumericsError, "head.weight"),
        ("nan2.pth", NumericsError, "no decomposition"),
        ("copy.pth", ParameterError, "nothing in"),
        ("six.pth", LayoutError, "RWKV-6"),
        ("adapter.pth", ParameterError, "kind 'lora'"),
        ("state.pth", ParameterError, "kind 'state'"),
        ("base.pth", ParameterError, "same file"),
    ]:
        with pytest.raises(error, match=said):
            extract_lora(paths[0], tmp_path / name, paths[2], rank=2)
        assert not paths[2].exists()
    with pytest.raises(OutputError, match="is the input"):
        extract_lora(paths[0], paths[1], paths[1], rank=2, overwrite=True)


def test_the_file_says_its_alpha(files):
    """As an adapter trained here does: none need be given, and another is refused."""
    base, tuned, paths = files()
    for suffix in (".pth", ".safetensors"):
        paths = (*paths[:2], paths[2].with_suffix(suffix))
        result = extract_lora(*paths, rank=16)
        back = merged_back(paths, None)
        for name, t in tuned.items():
            torch.testing.assert_close(back[name], t, rtol=1e-6, atol=1e-6)
        with pytest.raises(ParameterError, match="alpha=8.0 was given, .*states 16.0; leave it out"):
            merged_back(paths, result.alpha / 2)
        assert same(merged_back(paths, 0)["head.weight"], base["head.weight"])


@pytest.mark.parametrize("apart", [1e-12, 1e-250])
def test_float64_models_that_lie_close_together(apart, tmp_path):
    base = {n: t.zero_() if "att.key" in n else t for n, t in random_model(dtype=torch.float64).items()}
    name = "blocks.0.att.key.weight"
    delta = apart * torch.randn(base[name].shape, dtype=torch.float64)
    paths = (tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "lora.pth")
    torch.save(base, paths[0])
    torch.save(base | {name: delta}, paths[1])
    result = extract_lora(*paths, rank=16)
    assert result.matrices[0].norm == pytest.approx(apart * float((delta / apart).norm()), rel=1e-12)
    assert result.error < 1e-12
    if apart == 1e-12:
        merge(paths[0], paths[2], tmp_path / "back.pth", precision="float64")
        found = torch.load(tmp_path / "back.pth", weights_only=True)[name]
        torch.testing.assert_close(found, delta, rtol=1e-9, atol=1e-9 * apart)


def test_the_head_is_decomposed_where_it_is_named(files):
    _, tuned, paths = files()
    result = extract_lora(*paths, rank=11, targets=["head.weight"])
    assert [m.name for m in result.matrices] == ["head.weight"] and "blocks.1.att.key.weight" in result.whole
    back = merged_back(paths, None)
    torch.testing.assert_close(back["head.weight"], tuned["head.weight"], rtol=1e-6, atol=1e-6)
    with pytest.raises(ParameterError, match="^targets: the pattern 'emb.weight' matches none of the .* matrices"):
        extract_lora(*paths, rank=2, targets=["emb.weight"], overwrite=True)
