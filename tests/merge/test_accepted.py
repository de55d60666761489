"""What looks odd and is right: lying names, tied tensors, views, float64, permitted extras."""

import json
import logging
import zipfile

import pytest
import torch
from models import random_lora, random_model, random_state, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rwkv_lab import merge, open_checkpoint
from rwkv_lab.checkpoint.stream import Findings
from rwkv_lab.errors import CorruptFileError, NumericsError, OutputError
from rwkv_lab.merge import verify_merge


@pytest.fixture
def files(tmp_path):
    """Saves a base and what is merged into it; gives the paths of both and of the output."""

    def save(base, tuned=None):
        torch.save(base, tmp_path / "base.pth")
        torch.save(random_state() if tuned is None else tuned, tmp_path / "tuned.pth")
        return tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "out.pth"

    return save


def proven(result) -> dict:
    assert all(c.passed for c in (*result.checks, *verify_merge(result)))
    return torch.load(result.out, weights_only=True)


def test_a_name_that_lies_is_noted_and_harmless(tmp_path, caplog):
    save_file(random_model(), tmp_path / "base.pth")
    torch.save(random_state(), tmp_path / "state.safetensors")
    with caplog.at_level(logging.INFO):
        result = merge(tmp_path / "base.pth", tmp_path / "state.safetensors", tmp_path / "out.pth")
    assert "base.pth holds safetensors" in caplog.text and "state.safetensors holds a torch checkpoint" in caplog.text
    assert same(proven(result)["emb.weight"], random_model()["emb.weight"])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_tied_tensors_are_written_once_each_and_the_plan_knows(suffix, files, tmp_path):
    base = random_model()
    base["head.weight"] = base["emb.weight"]
    out = tmp_path / f"o.{suffix}"
    paths = files(base)[:2]
    planned = merge(*paths, out, dry_run=True).plan.output_bytes
    result = merge(*paths, out)
    assert out.stat().st_size == planned
    assert all(c.passed for c in verify_merge(result))
    with open_checkpoint(out) as ck:
        assert same(ck["head.weight"], ck["emb.weight"]) and same(ck["emb.weight"], base["emb.weight"])
        assert ck.info["head.weight"].offset != ck.info["emb.weight"].offset


def test_views_come_out_dense_and_small(files):
    base = random_model()
    large = torch.randn(100_000, 16).bfloat16()
    base["emb.weight"] = large[500:511]
    base["head.weight"] = base["head.weight"].t().contiguous().t()
    base["ln_out.weight"] = torch.ones(1).bfloat16().expand(16)
    base["ln_out.bias"] = torch.randn(64).bfloat16()[::4]
    paths = files(base, random_model(seed=1))
    assert paths[0].stat().st_size > 3_000_000
    for given in ({"exclude": ["emb*", "head*", "ln_out*"]}, {"alpha": 0.5}):
        result = merge(*paths, overwrite=True, **given)
        found = proven(result)
        assert all(t.is_contiguous() for t in found.values()) and result.out.stat().st_size < 60_000
        if "alpha" not in given:
            for n in ("emb.weight", "head.weight", "ln_out.weight", "ln_out.bias"):
                assert same(found[n], base[n].contiguous())


def test_an_expanded_tensor_beyond_memory_is_refused_by_the_plan(files):
    """A few bytes that stand for terabytes, in every place where the layout allows it."""
    base = random_model()
    base["emb.weight"] = base["head.weight"] = torch.ones(1).bfloat16().expand(2**38, 16)
    paths = files(base)
    with pytest.raises(OutputError, match="needs .* GB"):
        merge(*paths)
    assert not paths[2].exists()


def test_float64_is_accepted_with_a_note(files, caplog):
    base = random_model(dtype=torch.float64)
    found = proven(merge(*files(base)))
    assert all(same(found[n], t) for n, t in base.items()) and "float64" in caplog.text


def test_extras_that_are_named_are_taken_along_and_recorded(files):
    base, tuned = random_model() | {"extra.a": torch.ones(2)}, random_model(seed=1) | {"extra.b": torch.ones(3)}
    result = merge(*files(base, tuned), allow_extra=["extra.*"])
    found = proven(result)
    assert same(found["extra.a"], torch.ones(2)) and same(found["extra.b"], torch.ones(3))
    assert json.loads(result.outputs[1].path.read_text())["recipe"]["allow_extra"] == ["extra.*"]


def test_unused_tensors_of_layer_0_may_be_added_but_not_in_part(files):
    tuned = random_model(seed=1, unused=True)
    found = proven(merge(*files(random_model(), tuned)))
    assert all(same(found[f"blocks.0.att.v{i}"], tuned[f"blocks.0.att.v{i}"]) for i in range(3))


def test_nan_and_overflow_that_are_allowed_are_counted_and_recorded(files):
    base = random_model()
    base["head.weight"][0, :3] = 1e5
    base["emb.weight"][1, 1], base["emb.weight"][2, 2], base["emb.weight"][2, 3] = float("nan"), float("inf"), 7e4
    result = merge(*files(base), dtype="fp16", allow_nonfinite=True)
    recorded = json.loads(result.outputs[1].path.read_text())["nonfinite"]
    assert recorded == ["emb.weight (1 NaN, 1 Inf, 1 overflow)", "head.weight (3 overflow)"]
    # What was allowed does not fail the run, and the report still says how much of it there is.
    checks = [*result.checks, *verify_merge(result)]
    assert all(c.passed for c in checks)
    assert [(c.value, c.limit) for c in checks if "NaN" in c.name] == [
        (2, "any: allow_nonfinite"),
        (6, "any: allow_nonfinite"),
    ]
    assert Findings("x").clean


def test_scan_changed_looks_only_at_what_does_not_come_from_the_base(files):
    base, state = random_model(), random_state()
    base["emb.weight"][1, 1] = float("nan")
    paths = files(base, state)
    result = merge(*paths, scan="changed")
    assert same(torch.load(result.out, weights_only=True)["emb.weight"], base["emb.weight"])
    state["blocks.0.att.time_state"][0, 0, 0] = float("inf")
    torch.save(state, paths[1])
    with pytest.raises(NumericsError, match=r"in 1 tensor of the output: blocks.0.att.time_state \(1 Inf\)"):
        merge(*paths, scan="changed", overwrite=True)


@pytest.mark.parametrize("given", [{}, {"alpha": 0.5}, {"dtype": "fp32"}])
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_damaged_data_is_refused_however_it_is_used(which, given, files, tmp_path):
    """Copied, blended or cast: a wrong checksum is never passed on with a new, right one."""
    if which == "base" and "alpha" not in given:
        given = given | {"include": ["head.weight"]}
    paths = files(random_model(), random_model(seed=1))
    path = tmp_path / f"{which}.pth"
    with open_checkpoint(path) as ck:
        info = ck.info["emb.weight"]
    content = bytearray(path.read_bytes())
    content[info.offset + 33] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="bytes of emb.weight do not have the checksum"):
        merge(*paths, **given)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.pth", "tuned.pth"]


def test_a_damaged_lora_is_refused(tmp_path):
    torch.save(random_model(), tmp_path / "base.pth")
    torch.save(random_lora(), tmp_path / "lora.pth")
    with open_checkpoint(tmp_path / "lora.pth") as ck:
        offset = ck.info["blocks.1.ffn.key.lora_B"].offset
    content = bytearray((tmp_path / "lora.pth").read_bytes())
    content[offset + 3] ^= 1
    (tmp_path / "lora.pth").write_bytes(content)
    with pytest.raises(CorruptFileError, match="blocks.1.ffn.key.lora_B"):
        merge(tmp_path / "base.pth", tmp_path / "lora.pth", tmp_path / "out.pth", alpha=1.0)


def test_inputs_without_checksums_are_taken(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(random_model(), tmp_path / "base.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(random_state(), tmp_path / "state.pth")
    proven(merge(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "out.pth"))
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_made_it_is_in_the_output_and_beside_it(suffix, files, tmp_path):
    base, tuned, _ = files(random_model())
    result = merge(base, tuned, tmp_path / f"o.{suffix}", alpha=0.5, include=["*"])
    if suffix == "pth":
        with zipfile.ZipFile(result.out) as archive:
            inside = json.loads(archive.read("archive/rwkv_lab.json"))
    else:
        with safe_open(result.out, "pt") as f:
            inside = json.loads(f.metadata()["rwkv_lab.json"])
        assert set(load_file(result.out)) == {r.name for r in result.plan.rows}
    beside = json.loads((tmp_path / f"o.{suffix}.json").read_text())
    assert beside.items() >= inside.items() and beside["output"]["bytes"] == result.out.stat().st_size
    assert inside["recipe"] == result.recipe and inside["recipe"]["method"] == "state"
    assert [i["fingerprint"] for i in inside["inputs"]] == [i.fingerprint for i in result.inputs]
    assert str(tmp_path) not in json.dumps(inside) + json.dumps(beside)
    assert set(inside["versions"]) == {"python", "torch", "numpy"}
