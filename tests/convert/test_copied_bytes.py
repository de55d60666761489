"""The comparison after a conversion: it reads the finished output, and finds any bit that differs from the source."""

import pytest
from models import LAYOUTS, random_model
from reading import record_reads

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.convert import convert
from rwkv_lab.convert.verify import verify_convert

WAYS = [("m.pth", "fla", "o"), ("m.pth", "gguf", "o.gguf"), ("m.safetensors", "pth", "o.pth"), ("m.st", "fla", "o")]
SAME, OTHER = "blocks.1.att.key.weight", "blocks.1.att.value.weight"  # lie in every format as they are
TRANSPOSED = "blocks.1.att.w1"  # in fla


@pytest.fixture(params=WAYS, ids=lambda way: "-".join(way[:2]))
def converted(request, tmp_path):
    source, to, out = request.param
    write_checkpoint(tmp_path / "m.safetensors", random_model(LAYOUTS["7.0"]))
    convert(tmp_path / "m.safetensors", "pth", tmp_path / "m.pth")
    (tmp_path / "m.st").write_bytes((tmp_path / "m.safetensors").read_bytes())
    return convert(tmp_path / source, to, tmp_path / out)


def place(out, name):
    """(file, first byte, bytes) of a tensor in an output, by our name."""
    with open_checkpoint(out) as ck:
        info = ck.info[name]
        return info.file.path, info.offset, info.nbytes


def wrong(result):
    return [(check.value, check.name) for check in verify_convert(result) if not check.passed]


@pytest.mark.parametrize("name", [SAME, TRANSPOSED, "emb.weight", "blocks.0.ln1.bias"])
def test_one_bit_of_the_output(converted, name):
    assert not wrong(converted)
    path, offset, nbytes = place(converted.out, name)
    data = bytearray(path.read_bytes())
    data[offset + nbytes - 1] ^= 1
    path.write_bytes(data)
    ((count, said),) = wrong(converted)
    assert count == 1 and f"first {name}" in said


def test_two_tensors_that_stand_in_each_others_place(converted):
    """With their own checksums: what is compared is the source of that name."""
    (path, a, nbytes), (_, b, _) = place(converted.out, SAME), place(converted.out, OTHER)
    data = bytearray(path.read_bytes())
    data[a : a + nbytes], data[b : b + nbytes] = data[b : b + nbytes], data[a : a + nbytes]
    path.write_bytes(data)
    ((count, _),) = wrong(converted)
    assert count == 2


def test_every_byte_of_the_output_is_read_and_no_copied_one_of_the_source(converted, monkeypatch):
    made = record_reads(monkeypatch)
    assert not wrong(converted)
    monkeypatch.undo()
    with open_checkpoint(converted.out) as ck, open_checkpoint(converted.plan.source.path) as source:
        for name in (SAME, OTHER, "emb.weight", "head.weight"):
            info, before = ck.info[name], source.info[name]
            here = [(first, end) for file, first, end in made if file == info.file.path.name]
            assert (info.offset, info.offset + info.nbytes) in here
            there = [(first, end) for file, first, end in made if file == before.file.path.name]
            assert (before.offset, before.offset + before.nbytes) not in there
