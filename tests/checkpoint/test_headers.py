"""Damaged and hostile headers: an error of our own or the right values; never a crash, a hang or a huge allocation."""

import io
import json
import pickle
import pickletools
import struct
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import random_state, same
from safetensors.torch import save

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.checkpoint.torch_pickle import read_tensor_pickle
from rwkv_lab.errors import CorruptFileError, RwkvLabError, UnsafeFileError

reuse_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
TENSORS = random_state()
TENSORS["tied"] = TENSORS["blocks.0.att.time_state"].transpose(0, 2)


@cache
def written_by(who: str) -> bytes:
    """The bytes of a checkpoint of TENSORS."""
    out = io.BytesIO()
    if who == "torch":
        torch.save(TENSORS, out)
        return out.getvalue()
    if who == "safetensors":
        return save({n: t.contiguous() for n, t in TENSORS.items()})
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "m.pth", TENSORS)
        return (Path(folder) / "m.pth").read_bytes()


def read_all(path) -> dict:
    with open_checkpoint(path) as ck:
        assert ck.kind and isinstance(ck.reason, str)
        return {n: ck[n] for n in ck}


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


D8 = b"\0" * 8
BAD_SAFETENSORS = {  # file -> a word of the message
    "length ff…ff": (b"\xff" * 8 + b"{}", "claims"),
    "length one too long": (safetensors({"w": entry()}, D8, length=8 + 8 + 60), "claims|truncated"),
    "length over the limit of the format": (safetensors({"w": entry()}, D8, length=100_000_001), "claims"),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), "UTF-8"),
    "not JSON": (safetensors(b"{nonsense"), "JSON"),
    "leading spaces": (safetensors(b'  {"w": 1}'), "starts with"),
    "a list": (safetensors(b"[1, 2, 3]"), "starts with"),
    "metadata is no string": (safetensors({"__metadata__": {"a": 1}, "w": entry()}, D8), "__metadata__"),
    "metadata is no object": (safetensors({"__metadata__": "a", "w": entry()}, D8), "__metadata__"),
    "deep nesting": (safetensors(b'{"w":' + b"[" * 100_000), "JSON"),
    "a huge number": (safetensors(b'{"w":' + b"1" * 100_000 + b"}"), "JSON"),
    "a name twice": (safetensors(b'{"w":1,"w":2}'), "twice"),
    "a key twice": (safetensors(b'{"w":{"dtype":"F32","dtype":"F16"}}'), "twice"),
    "overlap": (safetensors({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "overlap"),
    "aliased": (safetensors({"a": entry(), "b": entry()}, D8), "overlap"),
    "gap": (safetensors({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20), "gap"),
    "gap at the start": (safetensors({"a": entry(offsets=(4, 12))}, b"\0" * 12), "belong to no tensor"),
    "bytes after the last": (safetensors({"a": entry()}, D8 + b"x"), "after the last"),
    "one byte missing": (safetensors({"a": entry()}, D8[1:]), "truncated: expected 8?"),
    "shape and range disagree": (safetensors({"wrong.one": entry(shape=(3,))}, D8), "wrong.one"),
    "a huge shape": (safetensors({"wrong.one": entry(shape=(2**62, 4))}, D8), "wrong.one"),
    "a negative dimension": (safetensors({"wrong.one": entry(shape=(-2, -1))}, D8), "wrong.one"),
    "a fractional dimension": (safetensors({"wrong.one": entry(shape=(2.0,))}, D8), "wrong.one"),
    "a true dimension": (safetensors({"wrong.one": entry(shape=(2, True))}, D8), "wrong.one"),
    "an unknown dtype": (safetensors({"wrong.one": entry(dtype="F9")}, D8), "wrong.one.*F9"),
    "no dtype": (safetensors({"wrong.one": {"shape": [], "data_offsets": [0, 8]}}, D8), "wrong.one"),
    "dtype is a list": (safetensors({"wrong.one": entry(dtype=["F32"])}, D8), "wrong.one"),
    "one key too many": (safetensors({"wrong.one": entry() | {"x": 1}}, D8), "wrong.one"),
    "offsets in reverse": (safetensors({"wrong.one": entry(offsets=(8, 0))}, D8), "wrong.one"),
    "negative offsets": (safetensors({"wrong.one": entry(offsets=(-8, 0))}, D8), "wrong.one"),
    "a newline in a name": (safetensors({"a\nb": entry()}, D8), "control characters"),
    "half a surrogate in a name": (safetensors({"a\ud800": entry()}, D8), "control characters"),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_safetensors_that_do_not_add_up(case, tmp_path):
    content, said = BAD_SAFETENSORS[case]
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CorruptFileError, match=said) as caught:
        open_checkpoint(tmp_path / "m.safetensors")
    assert "m.safetensors" in str(caught.value) and str(caught.value).count("\n") < 3


def test_many_names_with_the_last_twice_are_refused_at_once(tmp_path):
    """Looking for the name by comparing each with each would take hours."""
    names = ",".join(f'"{i}":0' for i in range(300_000))
    (tmp_path / "m.safetensors").write_bytes(safetensors(f'{{{names},"299999":0}}'.encode()))
    with pytest.raises(CorruptFileError, match="'299999' appears twice in its header"):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("way", ["torch", "ours", "safetensors"])
@reuse_folder
@given(data=st.data())
def test_a_truncated_file_is_refused(way, data, tmp_path):
    whole = written_by(way)
    kept = data.draw(st.integers(0, len(whole) - 1))
    (tmp_path / "m").write_bytes(whole[:kept])
    with pytest.raises(CorruptFileError):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("way", ["torch", "ours"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_flipped_bits_in_a_pth_are_found_or_harmless(way, data, tmp_path):
    """Records and their list carry checksums; what is left is the zip's own directory, which must not mislead."""
    content = bytearray(written_by(way))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "m").write_bytes(content)
    try:
        found = read_all(tmp_path / "m")
    except RwkvLabError:
        return
    assert set(found) == set(TENSORS) and all(same(found[n], t.contiguous()) for n, t in TENSORS.items())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_flipped_bits_in_a_safetensors_header(data, tmp_path):
    """The format has no checksum, so a changed name is not found. Every value still comes from its bytes."""
    content = bytearray(written_by("safetensors"))
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "m").write_bytes(content)
    try:
        found = read_all(tmp_path / "m")
    except RwkvLabError:
        return
    read = sorted(t.flatten().view(torch.uint8).numpy().tobytes() for t in found.values())
    assert sum(map(len, read)) == len(content) - header and all(r in bytes(content[header:]) for r in read)


@reuse_folder
@given(st.one_of(st.binary(max_size=600), st.binary(max_size=60).map(lambda b: b"PK\3\4" + b)))
def test_any_bytes_are_refused_in_words(content):
    with tempfile.NamedTemporaryFile() as f:
        f.write(content)
        f.flush()
        with pytest.raises(RwkvLabError):
            open_checkpoint(f.name)


OPS = [bytes([ord(o.code)]) if isinstance(o.code, str) else o.code for o in pickletools.opcodes]


@settings(max_examples=500)
@given(st.lists(st.one_of(st.sampled_from(OPS), st.binary(max_size=5)), max_size=30))
def test_no_pickle_does_more_than_raise(pieces):
    try:
        assert isinstance(read_tensor_pickle(b"\x80\x02" + b"".join(pieces) + b".", "m"), dict)
    except (CorruptFileError, UnsafeFileError):
        pass


def pickled(value) -> bytes:
    return pickle.dumps(value, protocol=2)


def bomb() -> tuple:
    """A tuple of 2^60 leaves in a few hundred bytes: hashing, comparing or printing it would never end."""
    value: tuple = ()
    for _ in range(60):
        value = (value, value)
    return value


def bombs() -> dict[str, bytes]:
    body = pickled(bomb())[:-1]  # without the end: the bomb lies on the stack
    one = b"}" + body[2:] + b"K\x01s."
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n"
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + body[2:] + b"X\x03\0\0\0cpuK\x01tQ"
    return {
        "as a key": b"\x80\x02" + one,
        "as a value": body.replace(b"\x80\x02", b"\x80\x02}X\x01\0\0\0w", 1) + b"s.",
        "as the whole": body + b".",
        "as a storage's name": b"\x80\x02" + storage + b".",
        "as the arguments of a tensor": b"\x80\x02" + tensor + body[2:] + b"R.",
        "as what is called": body + b")R.",
        "many marks": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        "a high stack": b"\x80\x02" + b"K\x01" * 100_000 + b"(t" * 100_000 + b".",
    }


@pytest.mark.parametrize("case", bombs())
def test_pickle_bombs_do_not_go_off(case):
    try:
        read_tensor_pickle(bombs()[case], "m")
    except (CorruptFileError, UnsafeFileError) as e:
        assert len(str(e)) < 500


GLOBALS = ["os.system", "builtins.eval", "builtins.getattr", "torch.load", "torch.nn.Module", "numpy.core.multiarray.x"]


@pytest.mark.parametrize("wanted", GLOBALS)
def test_a_global_that_is_no_tensor_is_named(wanted):
    module, name = wanted.rsplit(".", 1)
    for code in (
        f"c{module}\n{name}\n".encode(),
        b"X"
        + struct.pack("<I", len(module))
        + module.encode()
        + b"X"
        + struct.pack("<I", len(name))
        + name.encode()
        + b"\x93",
    ):
        with pytest.raises(UnsafeFileError, match=wanted):
            read_tensor_pickle(b"\x80\x04" + code + b".", "m")


def rezipped(content: bytes, change, compression=zipfile.ZIP_STORED) -> bytes:
    """The same zip with other records: `change` takes and gives {name: bytes}."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {n: archive.read(n) for n in archive.namelist()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, payload in change(records).items():
            archive.writestr(zipfile.ZipInfo(name) if compression == 0 else name, payload)
    return out.getvalue()


ZIPS = {
    "compressed": (lambda r: r, zipfile.ZIP_DEFLATED, CorruptFileError, "compressed"),
    "leads out": (lambda r: r | {"archive/../../x": b""}, 0, UnsafeFileError, "outside the archive"),
    "absolute": (lambda r: r | {"/x": b""}, 0, UnsafeFileError, "outside the archive"),
    "no pickle": (lambda r: {n: b for n, b in r.items() if "data.pkl" not in n}, 0, CorruptFileError, "data.pkl"),
    "two pickles": (lambda r: r | {"other/data.pkl": b"."}, 0, CorruptFileError, "2 data.pkl"),
    "a record missing": (
        lambda r: {n: b for n, b in r.items() if not n.endswith("data/0")},
        0,
        CorruptFileError,
        r"blocks.0.att.time_state \(record 0\)",
    ),
    "a record too short": (
        lambda r: {n: b[:-4] if n.endswith("data/0") else b for n, b in r.items()},
        0,
        CorruptFileError,
        "claims 64 values",
    ),
    "big-endian": (lambda r: r | {"archive/byteorder": b"big"}, 0, CorruptFileError, "big-endian"),
    "script": (lambda r: r | {"archive/code/x.py": b"", "archive/constants.pkl": b""}, 0, UnsafeFileError, "code"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_zips_that_torch_would_not_write(case, tmp_path):
    change, compression, error, said = ZIPS[case]
    (tmp_path / "m.pth").write_bytes(rezipped(written_by("ours"), change, compression))
    with pytest.raises(error, match=said):
        open_checkpoint(tmp_path / "m.pth")


def test_a_view_that_reaches_beyond_its_record(tmp_path):
    def grown(records):
        name = "archive/data.pkl"
        small, large = b"K\x04K\x04K\x04\x87", b"K\x04K\x04K\x09\x87"  # [4, 4, 4] -> [4, 4, 9]
        assert small in records[name]
        return records | {name: records[name].replace(small, large, 1)}

    (tmp_path / "m.pth").write_bytes(rezipped(written_by("ours"), grown))
    with pytest.raises(CorruptFileError, match="reaches beyond|strides"):
        open_checkpoint(tmp_path / "m.pth")


def test_a_view_of_more_values_than_a_number_can_count(tmp_path):
    torch.save({"w": torch.zeros(1).expand(2**40, 2**20)}, tmp_path / "m.pth")
    with open_checkpoint(tmp_path / "m.pth") as ck:  # legal: 4 bytes that stand for 2^62
        assert ck.info["w"].nbytes == 2**62 and ck.info["w"].span == 4
    with zipfile.ZipFile(tmp_path / "m.pth") as archive:
        name = archive.namelist()[0]
    content = (tmp_path / "m.pth").read_bytes()
    small, large = (2**20).to_bytes(4, "little"), (2**24).to_bytes(4, "little")
    changed = rezipped(content, lambda r: r | {name: r[name].replace(b"J" + small, b"J" + large)})
    (tmp_path / "m.pth").write_bytes(changed)
    with pytest.raises(CorruptFileError, match="larger than any tensor"):
        open_checkpoint(tmp_path / "m.pth")


def test_refusing_takes_little_memory(tmp_path):
    """Files that claim gigabytes, read by a process that may not have them."""
    (tmp_path / "a.safetensors").write_bytes(safetensors({"w": entry(shape=(2**40,), offsets=(0, 2**42))}, D8))
    with open(tmp_path / "b.safetensors", "wb") as f:  # sparse: 8 GB of a header that is over the format's limit
        f.write(struct.pack("<Q", 8_000_000_000) + b"{")
        f.truncate(8_000_000_100)
    with open(tmp_path / "c.pth", "wb") as f:  # sparse: a zip directory that claims to be 8 GB
        f.write(b"PK\3\4")
        f.truncate(8_000_000_000)
        f.seek(0, 2)
        f.write(struct.pack("<4s4HIIH", b"PK\5\6", 0, 0, 9, 9, 4_000_000_000, 4_000_000_000, 0))
    code = (
        "import resource, sys; from rwkv_lab import open_checkpoint; from rwkv_lab.errors import CorruptFileError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try: open_checkpoint(path); sys.exit(path)\n"
        "    except CorruptFileError as e: print(e)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    files = sorted(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout.splitlines()[-1]) < 200_000  # kB
