"""GGUF files that are damaged, made to do harm, or of another kind: refused before any tensor is read."""

import struct
import time

import numpy as np
import pytest
import torch
from models import LAYOUTS, random_model, same

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import CorruptFileError, LayoutError

gguf = pytest.importorskip("gguf")


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(key: str, kind: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + data


def tensor(name="a", dims=(32,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCHITECTURE = value("general.architecture", 8, text("rwkv7"))


def whole(*values, tensors=(), data=b"", version=3, n_tensors=None, n_values=None, magic=b"GGUF") -> bytes:
    values = values or (ARCHITECTURE,)
    counts = (len(tensors) if n_tensors is None else n_tensors, len(values) if n_values is None else n_values)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(values) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


HEADS = value("rwkv7.wkv.head_size", 4, struct.pack("<I", 4))
D = b"\0" * 128
SEVEN = [tensor("blk.0.time_mix_k_k.weight"), tensor("blk.3.time_mix_r_k.weight", (33,), offset=128)]
BIG = 2**63
CASES = {
    "empty header": (b"GGUF", "claims 4 bytes for its version"),
    "version 1": (whole(version=1), "version 1; rwkv_lab reads 2 and 3"),
    "version 4": (whole(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensors that are not there": (whole(n_tensors=BIG), f"claims {BIG} tensors"),
    "values that are not there": (whole(n_values=BIG), f"claims {BIG} values"),
    "one value too many": (whole(n_values=2), "truncated|no printable text"),
    "a key that is too long": (whole(struct.pack("<Q", BIG) + b"abcdefgh"), f"has {BIG} bytes; 65535 are the limit"),
    "a key that ends behind the file": (whole(struct.pack("<Q", 60000) + b"abcdefgh"), "claims 60000 bytes"),
    "a text that ends behind the file": (whole(value("k", 8, struct.pack("<Q", BIG))), f"claims {BIG} bytes for k"),
    "a text that is not UTF-8": (whole(value("k", 8, text(b"\xff"))), "k is not UTF-8"),
    "a key that is not UTF-8": (whole(text(b"\xff\xfe") + struct.pack("<IB", 0, 1)), "key 1 of 1 is not UTF-8"),
    "a key with control characters": (whole(value("a\nb", 0, b"\1")), "no printable text"),
    "an empty key": (whole(value("", 0, b"\1")), "no printable text"),
    "a key twice": (whole(ARCHITECTURE, ARCHITECTURE), "general.architecture appears twice"),
    "a value of an unknown type": (whole(value("k", 13, D)), "unknown type 13"),
    "a truth value of 2": (whole(value("k", 7, b"\2")), "truth value of 2"),
    "an array of arrays": (whole(value("k", 9, struct.pack("<IQ", 9, 1) + D)), "array of the unknown type 9"),
    "an array that is not there": (whole(value("k", 9, struct.pack("<IQ", 4, BIG) + D)), f"claims {BIG} values"),
    "texts of an array": (
        whole(value("k", 9, struct.pack("<IQ", 8, 70) + struct.pack("<Q", BIG) * 70)),
        f"claims {BIG} bytes for k",
    ),
    "an alignment of 0": (whole(ARCHITECTURE, value("general.alignment", 4, struct.pack("<I", 0))), "alignment is 0"),
    "an alignment of 48": (whole(ARCHITECTURE, value("general.alignment", 4, struct.pack("<I", 48))), "power of two"),
    "an alignment in words": (whole(ARCHITECTURE, value("general.alignment", 8, text("x"))), "alignment is x"),
    "a tensor of an unknown type": (whole(tensors=[tensor(kind=99)], data=D), "a is of type 99"),
    "a type that ggml dropped": (whole(tensors=[tensor(kind=4)], data=D), "a is of type 4"),
    "no dimension": (whole(tensors=[tensor(dims=())], data=D), "0 dimensions"),
    "five dimensions": (whole(tensors=[tensor(dims=(1,) * 5)], data=D), "5 dimensions"),
    "a dimension of 0": (whole(tensors=[tensor(dims=(0, 4))], data=D), r"shape \[4, 0\]"),
    "more elements than numbers count": (whole(tensors=[tensor(dims=(2**33, 2**33))], data=D), "truncated"),
    "rows that are no blocks": (whole(tensors=[tensor(dims=(33, 2), kind=8)], data=D), "multiples of 32"),
    "a tensor twice": (whole(tensors=[tensor(), tensor(offset=128)], data=D * 2), "a appears twice"),
    "a name with control characters": (whole(tensors=[tensor("a\0")], data=D), "no printable text"),
    "an offset behind the file": (whole(tensors=[tensor(offset=BIG)], data=D), "should begin at byte"),
    "an offset that is not aligned": (whole(tensors=[tensor(), tensor("b", offset=130)], data=D * 3), "should begin"),
    "tensors that overlap": (whole(tensors=[tensor(), tensor("b", offset=64)], data=D * 2), "should begin at byte"),
    "data that is cut off": (whole(tensors=[tensor()], data=D[:-1]), "the file has .*truncated"),
    "data that is missing": (whole(tensors=[tensor()]), "truncated"),
    "no head size": (whole(tensors=[tensor()], data=D), "wkv.head_size as None"),
    "a head size of 0": (
        whole(ARCHITECTURE, value("rwkv7.wkv.head_size", 4, struct.pack("<I", 0)), tensors=[tensor()], data=D),
        "wkv.head_size as 0",
    ),
    "heads that do not fit": (
        whole(ARCHITECTURE, HEADS, tensors=SEVEN, data=D * 2 + b"\0" * 32),
        r"r_k.weight has shape \[33\]; it should hold blocks.3.att.r_k",
    ),
    "bytes behind the data": (whole(tensors=[tensor()], data=D + b"x"), "1 bytes after the last tensor"),
}
OTHERS = {
    "another architecture": (whole(value("general.architecture", 8, text("llama"))), "architecture 'llama'"),
    "another RWKV": (whole(value("general.architecture", 8, text("rwkv6qwen2"))), "'rwkv6qwen2'"),
    "no architecture": (whole(value("k", 0, b"\1")), "without general.architecture"),
    "an adapter": (whole(ARCHITECTURE, value("general.type", 8, text("adapter"))), "of type 'adapter'"),
    "one part of two": (whole(ARCHITECTURE, value("split.count", 2, struct.pack("<H", 2))), "one of 2 parts.*\n.*Join"),
    "a tensor with no place": (whole(tensors=[tensor()], data=D), "head_size|not an RWKV model"),
}


@pytest.mark.parametrize("name", CASES)
def test_files_that_lie(name, tmp_path):
    content, said = CASES[name]
    (tmp_path / "m.gguf").write_bytes(content)
    start = time.process_time()
    with pytest.raises(CorruptFileError, match=said) as e:
        open_checkpoint(tmp_path / "m.gguf")
    assert "m.gguf" in str(e.value) and len(str(e.value).splitlines()) <= 3
    assert time.process_time() - start < 30  # whatever a length claims


@pytest.mark.parametrize("name", list(OTHERS)[:-1])
def test_files_of_another_kind(name, tmp_path):
    content, said = OTHERS[name]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(LayoutError, match=said) as e:
        open_checkpoint(tmp_path / "m.gguf")
    assert "m.gguf" in str(e.value)


def test_a_file_that_holds_no_model(tmp_path):
    (tmp_path / "m.gguf").write_bytes(whole(ARCHITECTURE, HEADS, tensors=[tensor()], data=D))
    with open_checkpoint(tmp_path / "m.gguf") as ck:
        assert ck.kind not in ("model", "state") and ck.format == "gguf"


@pytest.fixture
def written(tmp_path):
    """A file that the package gguf wrote: (path, tensors)."""
    model = random_model(LAYOUTS["7.0"], torch.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.add_wkv_head_size(4)
    writer.add_bool("some.flag", True)
    writer.add_array("some.list", [1, 2, 3])
    writer.add_array("some.words", [f"token {i}" for i in range(1000)])
    writer.add_tensor("token_embd.weight", model["emb.weight"].numpy())
    writer.add_tensor("blk.0.time_mix_k_k.weight", model["blocks.0.att.k_k"].numpy().reshape(-1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf", model


def test_what_the_package_gguf_writes(written):
    path, model = written
    with open_checkpoint(path) as ck:
        assert same(ck["emb.weight"], model["emb.weight"])
        assert same(ck["blocks.0.att.k_k"], model["blocks.0.att.k_k"])
        assert ck.metadata["some.flag"] == "True" and ck.metadata["some.list"] == "[1, 2, 3]"
        assert ck.metadata["some.words"] == "1000 values"


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_anywhere(written, share):
    path, _ = written
    content = path.read_bytes()
    path.write_bytes(content[: max(int(len(content) * share), 5)])
    with pytest.raises(CorruptFileError, match="truncated|bytes for|has the file"):
        open_checkpoint(path)


def test_any_damaged_byte_of_a_header_is_refused_or_read(written):
    """Never another error than ours, whatever a byte becomes."""
    path, _ = written
    content = np.fromfile(path, np.uint8)
    rng = np.random.default_rng(0)
    refused = 0
    for at in [*range(24), *rng.integers(24, len(content) - 2000, 150)]:
        damaged = content.copy()
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged.tobytes())
        try:
            open_checkpoint(path).close()
        except (CorruptFileError, LayoutError):
            refused += 1
    assert refused > 20


KINDS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4"]


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_tensors_are_what_the_package_gguf_makes_of_them(kind, tmp_path):
    number = getattr(gguf.GGMLQuantizationType, kind)
    elements, nbytes = gguf.GGML_QUANT_SIZES[number]
    rows, blocks = 5, 4 * 256 // elements
    data = np.random.default_rng(0).integers(0, 100, (rows, blocks * nbytes), np.uint8)  # no exponent of Inf or NaN
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.add_wkv_head_size(4)
    writer.add_tensor("token_embd.weight", data, raw_dtype=number)
    writer.add_tensor("blk.0.time_mix_k_k.weight", np.ones(16, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = torch.from_numpy(gguf.dequantize(data, number))
    with open_checkpoint(tmp_path / "m.gguf") as ck:
        info = ck.info["emb.weight"]
        assert (info.shape, info.dtype, info.derived.quantised) == (expected.shape, torch.float32, kind)
        assert same(info.read(), expected) and info.gathered == 0
        assert same(torch.cat(list(info.blocks(32))), expected.flatten())
