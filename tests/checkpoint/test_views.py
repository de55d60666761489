"""Tied tensors, views of every kind, missing and wrong checksums, and files beyond 4 GiB."""

import os
import struct
import zipfile
from zlib import crc32

import pytest
import torch
from models import same, snapshot

from rwkv_lab.checkpoint import file_facts, file_layout, open_checkpoint, write_checkpoint
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.errors import CorruptFileError

BASE = torch.arange(600.0).reshape(20, 30)
VIEWS = {
    "whole": BASE,
    "tied": BASE,
    "transposed": BASE.t(),
    "columns": BASE[:, 5:9],
    "strided": BASE[::3, ::7],
    "row": BASE[7:8],
    "element": BASE[3, 4],
    "nothing": BASE[:0],
    "expanded": BASE[0].expand(4, 30),
    "expanded from one": torch.ones(1).expand(50, 2),
    "permuted": BASE.reshape(4, 5, 30).permute(2, 0, 1),
    "fortran": torch.from_numpy(BASE.numpy().copy(order="F")),
    "unfolded": BASE[0].unfold(0, 4, 2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_in_a_pth_are_read_by_value(name, tmp_path, reads):
    torch.save(VIEWS, tmp_path / "m.pth")
    with open_checkpoint(tmp_path / "m.pth") as ck:
        reads.clear()
        assert same(ck[name], VIEWS[name].contiguous())
        assert sum(end - start for _, start, end in reads) <= ck.info[name].span
        blocks = torch.cat([torch.empty(0, dtype=ck.info[name].dtype), *ck.info[name].blocks()])
        assert same(blocks, VIEWS[name].contiguous().flatten())


def test_one_row_of_a_large_storage_costs_one_row(tmp_path, reads):
    torch.save({"row": torch.zeros(100_000, 10)[777:778]}, tmp_path / "m.pth")
    assert (tmp_path / "m.pth").stat().st_size > 4_000_000
    with open_checkpoint(tmp_path / "m.pth") as ck:
        reads.clear()
        write_checkpoint(tmp_path / "out.pth", {"row": ck["row"]})
        assert sum(end - start for _, start, end in reads) == 40
    assert (tmp_path / "out.pth").stat().st_size < 2_000


def test_tied_tensors_are_told_apart_from_equal_ones(tmp_path):
    torch.save({"a": BASE, "b": BASE, "c": BASE.clone(), "half": BASE[:10]}, tmp_path / "m.pth")
    with open_checkpoint(tmp_path / "m.pth") as ck:
        storage = {n: t.storage for n, t in ck.info.items()}
    assert storage["a"] == storage["b"] == storage["half"] != storage["c"]


def flip(path, offset: int) -> None:
    with open(path, "r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("name", ["whole", "transposed", "fortran"])
@pytest.mark.parametrize("how", ["read", "blocks"])
def test_a_damaged_tensor_is_refused_and_named(name, how, tmp_path):
    torch.save({name: VIEWS[name], "sound": torch.ones(3)}, tmp_path / "m.pth")
    with open_checkpoint(tmp_path / "m.pth") as ck:
        flip(tmp_path / "m.pth", ck.info[name].offset + 100)
        assert same(ck["sound"], torch.ones(3))
        with pytest.raises(CorruptFileError, match=f"bytes of {name} do not have the checksum"):
            ck.info[name].read() if how == "read" else list(ck.info[name].blocks())


def test_a_damaged_last_block_is_refused_before_it_is_handed_out(tmp_path):
    write_checkpoint(tmp_path / "m.pth", {"w": torch.zeros(300_000)})
    with open_checkpoint(tmp_path / "m.pth") as ck:
        flip(tmp_path / "m.pth", ck.info["w"].offset + 1_199_999)
        blocks = ck.info["w"].blocks()
        with pytest.raises(CorruptFileError):
            for _ in range(5):
                next(blocks)


def test_a_damaged_list_of_tensors_is_refused(tmp_path):
    write_checkpoint(tmp_path / "m.pth", {"w": torch.zeros(3)})
    flip(tmp_path / "m.pth", (tmp_path / "m.pth").read_bytes().index(b"FloatStorage"))
    with pytest.raises(CorruptFileError, match=r"data\.pkl"):
        open_checkpoint(tmp_path / "m.pth")


def test_files_saved_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(VIEWS, tmp_path / "m.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    with open_checkpoint(tmp_path / "m.pth") as ck:
        assert all(t.crc32 is None for t in ck.info.values())
        assert all(same(ck[n], t.contiguous()) for n, t in VIEWS.items())


def test_fingerprints_tell_files_apart_and_do_not_depend_on_the_name(tmp_path, reads):
    write_checkpoint(tmp_path / "a.pth", {"w": BASE})
    write_checkpoint(tmp_path / "b.pth", {"w": BASE})
    write_checkpoint(tmp_path / "c.pth", {"w": BASE + 1})
    write_checkpoint(tmp_path / "d.safetensors", {"w": BASE})
    write_checkpoint(tmp_path / "e.safetensors", {"w": BASE + 1})
    for how in ("records", "sha256"):
        a, b, c, d, e = (file_facts(p, how).fingerprint for p in sorted(tmp_path.iterdir()))
        assert a == b and len({a, c, d, e}) == 4 and a.startswith(f"{how}:") and len(a) == len(d)
    reads.clear()
    with open_checkpoint(tmp_path / "a.pth") as ck:
        file_facts(ck)
        assert not any(start < ck.info["w"].offset + 2400 and end > ck.info["w"].offset for _, start, end in reads[1:])


BIG_FLOATS = (5 << 30) // 4  # 5 GiB


def sparse(path, kind: str, tensors: list[OutTensor], crcs: list[int], marks: dict[int, bytes]) -> None:
    """A file as our writer lays it out, with holes where tensors would be, and a few bytes in them."""
    layout = file_layout.file_layout(kind, tensors, {"note": "x"})
    with open(path, "wb") as f:
        f.truncate(layout.size)
        for offset, data in layout.rest(crcs):
            os.pwrite(f.fileno(), data, offset)
        for i, data in marks.items():
            os.pwrite(f.fileno(), data, layout.offsets[i] + tensors[i].nbytes - len(data))


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_files_beyond_4_gib(kind, tmp_path):
    """Both a record that is larger, and one that begins beyond; the checksum of 5 GiB of holes is not computed."""
    tensors = [OutTensor("big", (BIG_FLOATS,), torch.float32), OutTensor("after", (3,), torch.float32)]
    path = tmp_path / f"m.{kind}"
    after = struct.pack("<3f", 1, 2, 3)
    sparse(path, kind, tensors, [0, crc32(after)], {0: struct.pack("<f", 7.0), 1: after})
    assert path.stat().st_size > 5 << 30 and path.stat().st_blocks * 512 < 1 << 20
    with open_checkpoint(path) as ck:
        assert ck.info["big"].shape == (BIG_FLOATS,)
        assert ck["after"].tolist() == [1, 2, 3]
        assert ck.info["big"].file.read(ck.info["big"].offset + 4 * BIG_FLOATS - 4, 4) == struct.pack("<f", 7.0)
    if kind == "pth":
        loaded = torch.load(path, weights_only=True, mmap=True)
        assert loaded["big"].shape == (BIG_FLOATS,) and loaded["big"][-1] == 7 and loaded["after"].tolist() == [1, 2, 3]
        with zipfile.ZipFile(path) as archive:
            assert archive.getinfo("archive/data/1").header_offset > 1 << 32
            assert archive.read("archive/version") == b"3\n" and archive.read("archive/note") == b"x"


def test_the_large_form_of_the_zip_is_read_by_everyone(tmp_path, monkeypatch):
    """Every number moved into the zip64 fields, in a file small enough to read whole."""
    monkeypatch.setattr(file_layout, "_BIG", 16)
    tensors = {"w": BASE, "x": torch.ones(3)}
    write_checkpoint(tmp_path / "m.pth", tensors)
    with zipfile.ZipFile(tmp_path / "m.pth") as archive:
        assert archive.testzip() is None
        assert archive.getinfo("archive/data/0").extract_version == 45
    for loaded in (
        torch.load(tmp_path / "m.pth", weights_only=True),
        torch.load(tmp_path / "m.pth", weights_only=True, mmap=True),
    ):
        assert all(same(loaded[n], t) for n, t in tensors.items())
    with open_checkpoint(tmp_path / "m.pth") as ck:
        assert all(same(ck[n], t) for n, t in tensors.items())


def test_reading_changes_nothing(tmp_path):
    torch.save(VIEWS, tmp_path / "m.pth")
    before = snapshot(tmp_path)
    with open_checkpoint(tmp_path / "m.pth") as ck:
        ck["whole"].zero_()
        ck["expanded"].zero_()
    assert snapshot(tmp_path) == before
