"""The proof of a merge fails where it should: one wrong value, anywhere, of any kind."""

import gc
import math
import re
import weakref
import zipfile

import pytest
import torch
from models import random_lora, random_model, random_state
from pairwise import each
from safetensors.torch import load_file, save_file

from rwkv_lab import merge
from rwkv_lab.merge import proof_files, verify_merge


def rewrite(path, change) -> None:
    """The same file with other tensors: sound in every checksum, so only the comparison can tell."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    else:
        tensors = dict(torch.load(path, weights_only=True))
        change(tensors)
        torch.save(tensors, path)


def nudge(name: str, place: int = 5, ulps: int = 1):
    """Move one value of one tensor by so many of the smallest steps there are."""

    def change(tensors):
        flat = tensors[name].clone().flatten()
        bits = flat.view({2: torch.int16, 4: torch.int32}[flat.dtype.itemsize])
        bits[place] += ulps
        tensors[name] = flat.view(tensors[name].shape)

    return change


MERGES = {  # kind: tuned, arguments, a tensor that is copied from the base, one that is not
    "state": (random_state(), {}, "head.weight", "blocks.0.att.time_state"),
    "a share of a state": (random_state(), {"alpha": 0.3}, "head.weight", "blocks.1.att.time_state"),
    "overlay": ({"emb.weight": random_model(seed=1)["emb.weight"]}, {}, "head.weight", "emb.weight"),
    "blend": ({"emb.weight": random_model(seed=1)["emb.weight"]}, {"alpha": 0.3}, "head.weight", "emb.weight"),
    "lora": (random_lora(), {"alpha": 4.0}, "head.weight", "blocks.0.att.key.weight"),
    "whole tensor of a lora": (random_lora(), {"alpha": 4.0}, "ln_out.bias", "blocks.1.ln1.weight"),
    "cast": (random_state(), {"dtype": "fp16"}, "head.weight", "blocks.0.att.time_state"),
    "cast and blended": (random_model(seed=1), {"alpha": 0.3, "dtype": "fp16"}, "head.weight", "emb.weight"),
}


@pytest.fixture(params=["pth", "safetensors"])
def run(request, tmp_path):
    def merged(kind):
        tuned, given, *names = MERGES[kind]
        torch.save(random_model(), tmp_path / "base.pth")
        torch.save(tuned, tmp_path / "tuned.pth")
        result = merge(tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / f"out.{request.param}", **given)
        assert all(c.passed for c in verify_merge(result))
        return result, *names

    return merged


def failed(result) -> str:
    return "; ".join(c.name for c in verify_merge(result) if not c.passed)


@pytest.mark.parametrize("kind", MERGES)
def test_one_wrong_value_fails_the_proof(kind, run):
    result, copied, changed = run(kind)
    rewrite(result.out, nudge(copied))
    assert "copied tensors that differ" in failed(result) or kind == "cast and blended" and "error" in failed(result)
    rewrite(result.out, nudge(copied, ulps=-1))
    assert failed(result) == ""
    # float32 arithmetic may lie a few of its own steps beside the exact result; the proof allows no more.
    dtype = next(r.dtype for r in result.plan.rows if r.name == changed)
    rewrite(result.out, nudge(changed, ulps=64 if dtype == torch.float32 else 2))
    assert failed(result)


CHANGES = [
    (lambda t: t.pop("ln_out.bias"), "missing"),
    (lambda t: t.update({"more": torch.ones(1)}), "belong there by no rule"),
    (lambda t: t.update({"emb.weight": t["emb.weight"].float()}), "another shape or dtype|copied tensors"),
    (lambda t: t.update({"emb.weight": t["emb.weight"].t().contiguous()}), "shape"),
    (lambda t: t.update({"emb.weight": t["emb.weight"].flatten()}), "shape"),
    (lambda t: t["emb.weight"].fill_(float("nan")), "NaN or Inf"),
    (lambda t: t["emb.weight"][3, 4].fill_(float("inf")), "NaN or Inf"),
    (lambda t: t["emb.weight"].neg_(), "copied|error"),
    (lambda t: t["emb.weight"].copy_(t["head.weight"]), "copied|error"),
]


@pytest.mark.parametrize(
    ("kind", "change"), [*each(["state", "overlay", "blend"], CHANGES[1:]), *each(["state", "blend"], CHANGES)]
)
def test_other_tensors_shapes_and_dtypes_fail_it(kind, change, run):
    change, said = change
    result, *_ = run(kind)
    rewrite(result.out, change)
    assert re.search(said, failed(result)), failed(result)


def test_the_recipe_is_part_of_the_proof(run):
    """The right file for another alpha, another pattern, another precision is the wrong file."""
    result, *_ = run("blend")
    for wrong in ({"alpha": 0.31}, {"alpha": 1}, {"alpha": 0}, {"exclude": ["emb.*"]}, {"dtype": "float16"}):
        result.recipe.update(before := dict(result.recipe), **wrong)
        assert failed(result), wrong
        result.recipe.update(before)
    assert not failed(result)


def test_a_lora_scaled_without_its_rank_fails(run):
    result, *_ = run("lora")
    result.recipe["alpha"] *= 3
    assert "error of 10 computed tensors" in failed(result)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 3.3e38])
@pytest.mark.parametrize("given", [{"alpha": 4}, {"alpha": 0.5}, {"method": "linear", "weights": [1, 1]}], ids=str)
def test_values_that_are_not_finite_and_were_allowed_are_no_error(odd, given, tmp_path):
    base = random_model()
    base["blocks.0.att.key.weight"][0, :3] = torch.tensor([odd, -odd, 1.0])
    tuned = random_lora() if "alpha" in given and given["alpha"] == 4 else base
    torch.save(base, tmp_path / "base.pth")
    torch.save(tuned, tmp_path / "tuned.pth")
    files = tmp_path / "base.pth", tmp_path / "tuned.pth"
    result = merge(*files, tmp_path / "out.pth", dtype="fp16", allow_nonfinite=True, **given)
    assert not failed(result)
    rewrite(result.out, nudge("blocks.0.att.key.weight", place=2))
    assert failed(result)


@pytest.mark.parametrize("given", [{"alpha": 0.1}, {"method": "linear", "weights": [1, 2, 0.3]}], ids=str)
def test_numbers_below_the_normal_range_are_as_exact_as_they_can_be(given, tmp_path):
    name = "blocks.0.att.key.weight"
    base, *others = ({n: t * 1e-40 for n, t in random_model(dtype=torch.float32, seed=i).items()} for i in range(3))
    lora = {n: t * (1e-40 if "lora_B" in n else 1) for n, t in random_lora(dtype=torch.float32, full=False).items()}
    files = [lora] if "alpha" in given else [{name: other[name]} for other in others]
    for i, tensors in enumerate([base, *files]):
        torch.save(tensors, tmp_path / f"{i}.pth")
    tuned = [tmp_path / f"{i}.pth" for i in range(1, len(files) + 1)]
    result = merge(tmp_path / "0.pth", tuned, tmp_path / "out.pth", **given)
    assert not failed(result)
    rewrite(result.out, nudge(name, ulps=64))
    assert failed(result)


def test_a_wrong_checksum_in_the_output_fails(tmp_path):
    torch.save(random_model(), tmp_path / "base.pth")
    torch.save(random_state(), tmp_path / "state.pth")
    result = merge(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "out.pth")
    content = bytearray(result.out.read_bytes())
    with zipfile.ZipFile(result.out) as archive:
        where = archive.getinfo("archive/version").header_offset + 14
    assert content[where : where + 4] == archive.getinfo("archive/version").CRC.to_bytes(4, "little")
    at = content.rindex(b"3\n")
    content[at] ^= 1
    result.out.write_bytes(content)
    assert "checksum is wrong" in failed(result)


def test_it_reads_safetensors_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Not more than a few tensors of a file are alive at once."""
    save_file(random_model(), tmp_path / "base.safetensors")
    save_file(random_model(seed=1), tmp_path / "tuned.safetensors")
    result = merge(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "o.safetensors", alpha=0.5)
    alive, most = weakref.WeakSet(), [0]
    real = proof_files._Safetensors.__getitem__

    def counting(self, name):
        tensor = real(self, name)
        alive.add(tensor)
        most[0] = max(most[0], len(alive))
        return tensor

    monkeypatch.setattr(proof_files._Safetensors, "__getitem__", counting)
    gc.collect()
    assert all(c.passed for c in verify_merge(result))
    assert 3 <= most[0] <= 9 < len(random_model())
