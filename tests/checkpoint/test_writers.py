"""Writers: what they write, torch, safetensors, zip tools and our own reader read back, bit for bit."""

import json
import os
import shutil
import subprocess
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import SEVEN, random_model, same
from safetensors import safe_open
from safetensors.torch import load_file

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint, write_text
from rwkv_lab.checkpoint.prefixes import bare_names
from rwkv_lab.checkpoint.safetensors_header import DTYPES
from rwkv_lab.errors import OutputError, ParameterError

# A tensor's bits come from int64 random numbers, so NaN, Inf and denormals of every format are among them.
KNOWN = [getattr(torch, name) for name in DTYPES.values()]
PTH = [d for d in KNOWN if not str(d).startswith("torch.float8")] + [torch.complex128]
BOTH = {"pth": PTH, "safetensors": KNOWN}
printable = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20).filter(
    lambda n: n != "__metadata__" and bare_names([n], "x")[n] == n
)


@st.composite
def tensor_dicts(draw, suffix):
    """Random names, unicode and empty included, and shapes, 0-d and without elements included."""
    tensors = {}
    for name in draw(st.lists(printable, max_size=6, unique=True)):
        dtype = draw(st.sampled_from(BOTH[suffix]))
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        numel = torch.Size(shape).numel()
        g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (numel * dtype.itemsize,), generator=g)
        tensors[name] = raw.to(torch.uint8).view(dtype).reshape(shape)
    return tensors


def read_by_all(path) -> list[dict]:
    """What every reader that there is makes of a file."""
    with open_checkpoint(path) as ck:
        ours = {n: ck[n] for n in ck}
    if path.suffix == ".safetensors":
        return [ours, load_file(path)]
    read = [torch.load(path, weights_only=True), torch.load(path, weights_only=True, mmap=True)]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    return [ours, *read]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_written_every_reader_reads(suffix, data, tmp_path):
    tensors = data.draw(tensor_dicts(suffix))
    path = tmp_path / f"x.{suffix}"
    write_checkpoint(path, tensors, {"note": "ü"}, overwrite=True)
    for found in read_by_all(path):
        assert set(found) == set(tensors)
        assert all(same(found[n], t) for n, t in tensors.items())


def test_names_with_empty_parts_are_whole(tmp_path):
    """They look like the prefix of a wrapper with nothing behind it."""
    tensors = {name: torch.ones(1) for name in ("", "model.", "_orig_mod.", "module..x", "base_model.model.", ".")}
    write_checkpoint(tmp_path / "x.pth", tensors)
    with open_checkpoint(tmp_path / "x.pth") as ck:
        assert set(ck) == set(tensors)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data(), limit=st.integers(1, 300))
def test_shards_hold_everything_and_keep_the_limit(data, limit, tmp_path):
    tensors = data.draw(tensor_dicts("safetensors"))
    folder = tmp_path / "x"
    write_checkpoint(folder, tensors, max_shard_size=limit, overwrite=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        part = load_file(shard)
        assert len(part) <= 1 or sum(t.nbytes for t in part.values()) <= limit
        assert {n for n, s in index["weight_map"].items() if s == shard.name} == set(part)
        found |= part
    with open_checkpoint(folder) as ck:
        assert set(ck) == set(found) == set(tensors)
        assert all(same(found[n], t) and same(ck[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "\ud800", "__metadata__", "\x1b[31m"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_names_that_no_reader_would_take_are_not_written(name, suffix, tmp_path):
    with pytest.raises(OutputError, match="cannot be called"):
        write_checkpoint(tmp_path / f"x.{suffix}", {name: torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("suffix", "dtype"), [("pth", torch.float8_e5m2), ("safetensors", torch.complex128)])
def test_a_dtype_that_the_format_does_not_have(suffix, dtype, tmp_path):
    with pytest.raises(OutputError, match=f"w is {dtype}"):
        write_checkpoint(tmp_path / f"x.{suffix}", {"w": torch.zeros(2, dtype=dtype)})
    assert list(tmp_path.iterdir()) == []


def test_a_written_pth_passes_unzip(tmp_path):
    if shutil.which("unzip") is None:
        pytest.skip("the program unzip is not installed")
    write_checkpoint(tmp_path / "m.pth", random_model(SEVEN), {"note.json": "{}"})
    done = subprocess.run(["unzip", "-t", tmp_path / "m.pth"], capture_output=True, text=True)
    assert done.returncode == 0 and "No errors detected" in done.stdout, done.stdout + done.stderr


def test_records_lie_where_torch_can_map_them(tmp_path):
    """Tensor data begins at multiples of 64 bytes, so a mapped tensor is aligned for its dtype."""
    write_checkpoint(tmp_path / "m.pth", random_model(SEVEN))
    with open_checkpoint(tmp_path / "m.pth") as ck:
        assert {t.offset % 64 for t in ck.info.values()} == {0}
    loaded = torch.load(tmp_path / "m.pth", weights_only=True, mmap=True)
    assert all(t.data_ptr() % t.dtype.itemsize == 0 and t.is_contiguous() for t in loaded.values())


def test_notes_travel_in_the_file(tmp_path):
    for suffix in ("pth", "safetensors"):
        write_checkpoint(tmp_path / f"m.{suffix}", {"w": torch.ones(1)}, {"made_by": "ünit"})
    with zipfile.ZipFile(tmp_path / "m.pth") as archive:
        assert archive.read("archive/made_by").decode() == "ünit"
    with safe_open(tmp_path / "m.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt", "made_by": "ünit"}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_same_tensors_give_the_same_file(suffix, tmp_path):
    for name in ("a", "b"):
        write_checkpoint(tmp_path / f"{name}.{suffix}", random_model(SEVEN), {"note": "x"})
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_any_layout_in_memory_is_written_dense(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": torch.ones(3, 1).expand(3, 5),
        "row": torch.zeros(1000, 8)[3:4],
        "tied": base,
        "gradient": torch.ones(2, requires_grad=True),
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }
    for suffix in ("pth", "safetensors"):
        write_checkpoint(tmp_path / f"m.{suffix}", tensors)
        for found in read_by_all(tmp_path / f"m.{suffix}"):
            assert all(torch.equal(found[n], t) for n, t in tensors.items())
        assert (tmp_path / f"m.{suffix}").stat().st_size < 4000


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("what", ["file", "folder", "text"])
def test_permissions_follow_the_umask(mask, what, tmp_path):
    before = os.umask(mask)
    try:
        if what == "text":
            write_text(tmp_path / "x", "x", overwrite=False)
        else:
            path = tmp_path / ("x.pth" if what == "file" else "x")
            write_checkpoint(path, {"w": torch.ones(1)}, max_shard_size=1 if what == "folder" else None)
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files and all(p.stat().st_mode & 0o777 == 0o666 & ~mask for p in files)
    assert all(p.stat().st_mode & 0o777 == 0o777 & ~mask for p in tmp_path.iterdir() if p.is_dir())


@pytest.mark.parametrize("name", ["m.bin", "m", "m.pt", "m.PTH"])
def test_the_suffix_of_an_output_decides_and_must_be_known(name, tmp_path):
    with pytest.raises(ParameterError, match=".pth or .safetensors"):
        write_checkpoint(tmp_path / name, {"w": torch.ones(1)})
    with pytest.raises(ParameterError, match="max_shard_size"):
        write_checkpoint(tmp_path / "folder", {"w": torch.ones(1)}, max_shard_size=0)
    assert list(tmp_path.iterdir()) == []
