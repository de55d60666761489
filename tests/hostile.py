"""Inputs that a merge must refuse: for each, the files, the arguments, the error's class and words of its message.

The numbers are those of the issue's list. `CASES` serves the Python API and papermill alike; what a case of that list
accepts (10: a lying suffix, 20: tied tensors, 21: views, 19: float64) is tested in tests/merge/test_accepted.py.
"""

import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from models import LAYOUTS, SEVEN, random_lora, random_model, random_state
from safetensors.torch import save, save_file

from rwkv_lab.errors import RwkvLabError


@dataclass(frozen=True)
class Case:
    number: int
    name: str
    make: Callable[[Path], dict]  # writes the files into a folder; gives the arguments of `merge`
    error: str  # class of the error
    said: str  # what its message must match

    @property
    def id(self) -> str:
        return f"{self.number}-{self.name.replace(' ', '-')}"


CASES: list[Case] = []


def case(number: int, name: str, error: str, said: str):
    def add(make):
        CASES.append(Case(number, name, make, error, said))
        return make

    return add


def arguments(folder: Path, base=None, tuned=None, **more) -> dict:
    """A good base and a good state, unless others are given (as paths), and an output beside them."""
    if base is None:
        base = folder / "base.pth"
        torch.save(random_model(), base)
    if tuned is None:
        tuned = folder / "state.pth"
        torch.save(random_state(), tuned)
    return {"base": str(base), "tuned": str(tuned), "out": str(folder / "out.pth")} | more


def tuned_bytes(folder: Path, content: bytes, name: str = "tuned.pth") -> dict:
    (folder / name).write_bytes(content)
    return arguments(folder, tuned=folder / name)


def saved(folder: Path, name: str, tensors: dict) -> Path:
    save_file(tensors, folder / name) if name.endswith(".safetensors") else torch.save(tensors, folder / name)
    return folder / name


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@case(1, "malicious pickle in a zip", "UnsafeFileError", r"evil\.pth.*(io|builtins|_io)\.open")
def _(folder):
    return arguments(folder, tuned=saved(folder, "evil.pth", random_state() | {"x": Touch(folder / "canary")}))


@case(2, "legacy tar", "UnsafeFileError", "old.pth.*legacy tar format")
def _(folder):
    with tarfile.open(folder / "old.pth", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Touch(folder / "canary"))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return arguments(folder, tuned=folder / "old.pth")


for _name in ("evil.pth", "evil.bin", "evil.safetensors"):

    @case(3, f"bare pickle called {_name}", "UnsafeFileError", f"{_name}.*bare pickle")
    def _(folder, name=_name):
        return tuned_bytes(folder, pickle.dumps(Touch(folder / "canary"), protocol=2), name)


def _header(header, data=b"", length=None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _entry(**changed) -> dict:
    return {"blocks.0.wrong": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed}


D8 = b"\0" * 8
HEADERS = [
    (4, "header length all ones", b"\xff" * 8 + b'{"a": 1}', "claims 18446744073709551615 bytes"),
    (4, "header length one beyond the file", _header(b"{ }", length=12), "claims 12 bytes"),
    (5, "header not UTF-8", _header(b'{"\xff":1}'), "not UTF-8 JSON"),
    (5, "header not JSON", _header(b"{nonsense"), "not UTF-8 JSON"),
    (5, "header with leading spaces", _header(b"  {}"), "starts with"),
    (5, "header is a list", _header(b"[1,2,3]"), "starts with"),
    (5, "metadata not a string", _header({"__metadata__": {"a": 1}} | _entry(), D8), "__metadata__"),
    (
        6,
        "overlapping offsets",
        _header(_entry() | {"b": _entry(data_offsets=[4, 12])["blocks.0.wrong"]}, D8 * 2),
        "overlap",
    ),
    (6, "gap", _header(_entry() | {"b": _entry(data_offsets=[12, 20])["blocks.0.wrong"]}, D8 * 3), "gap"),
    (6, "trailing bytes", _header(_entry(), D8 + b"!"), "after the last tensor"),
    (7, "shape and range disagree", _header(_entry(shape=[3]), D8), "blocks.0.wrong"),
    (7, "huge shape", _header(_entry(shape=[2**62, 4]), D8), "blocks.0.wrong"),
    (7, "negative dimension", _header(_entry(shape=[-2]), D8), "blocks.0.wrong"),
    (7, "fractional dimension", _header(_entry(shape=[2.0]), D8), "blocks.0.wrong"),
    (7, "unknown dtype", _header(_entry(dtype="F9"), D8), "blocks.0.wrong.*F9"),
    (8, "safetensors minus one byte", save(random_state())[:-1], "truncated: expected 688 bytes, have 687"),
    (8, "safetensors minus half", save(random_state())[:320], "truncated: expected 688 bytes, have 320"),
]
for _number, _name, _content, _said in HEADERS:

    @case(_number, _name, "CorruptFileError", rf"tuned\.safetensors(.|\n)*{_said}")
    def _(folder, content=_content):
        return tuned_bytes(folder, content, "tuned.safetensors")


for _name, _cut in [("pth minus 22 bytes", lambda size: size - 22), ("pth minus half", lambda size: size // 2)]:

    @case(8, _name, "CorruptFileError", r"cut\.pth(.|\n)*truncated")
    def _(folder, cut=_cut):
        path = saved(folder, "cut.pth", random_state())
        os.truncate(path, cut(path.stat().st_size))
        return arguments(folder, tuned=path)


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24\n"
)
for _name, _content, _said in [
    ("empty file", b"", "empty"),
    ("one byte", b"\x80", "neither a torch zip"),
    ("three bytes", b"abc", "neither a torch zip"),
    ("web page", b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>", "web page"),
    ("Git LFS pointer", LFS, "git lfs pull"),
]:

    @case(9, _name, "CorruptFileError", rf"model\.pth.*{_said}")
    def _(folder, content=_content):
        (folder / "model.pth").write_bytes(content)
        return arguments(folder, base=folder / "model.pth")


@case(11, "missing key", "LayoutError", r"lacks 1 tensor: blocks\.1\.att\.value\.weight")
def _(folder):
    tensors = random_model()
    del tensors["blocks.1.att.value.weight"]
    return arguments(folder, base=saved(folder, "base.pth", tensors))


@case(11, "many missing keys", "LayoutError", r"lacks 31 tensors: .* and 21 more")
def _(folder):
    tensors = {n: t for n, t in random_model().items() if not n.startswith("blocks.1.") or n == "blocks.1.att.v1"}
    tensors["blocks.1.att.v2"] = random_model()["blocks.1.att.v2"]
    return arguments(folder, base=saved(folder, "base.pth", tensors))


@case(12, "extra keys in the base", "LayoutError", r"does not know: blocks\.0\.att\.extra")
def _(folder):
    tensors = random_model() | {"blocks.0.att.extra": torch.ones(2)}
    return arguments(folder, base=saved(folder, "base.pth", tensors))


@case(12, "extra keys in the fine-tune", "LayoutError", r"not in the base: blocks\.0\.att\.extra")
def _(folder):
    tensors = random_model(seed=1) | {"blocks.0.att.extra": torch.ones(2)}
    return arguments(folder, tuned=saved(folder, "tuned.pth", tensors))


OTHER = {
    "depth": (replace(SEVEN, n_layer=4), "n_layer differs: .* has 4, the base has 2"),
    "width": (replace(SEVEN, n_embd=32, dim_att=32, n_head=8), "n_embd differs: .* has 32, the base has 16"),
    "vocabulary": (replace(SEVEN, vocab_size=12), "vocab_size differs: .* has 12, the base has 11"),
    "ffn width": (replace(SEVEN, dim_ffn=32), "dim_ffn differs: .* has 32, the base has 64"),
    "heads": (replace(SEVEN, n_head=2, head_size=8), "n_head differs: .* has 2, the base has 4"),
    "ranks": (replace(SEVEN, ranks={**SEVEN.ranks, "g": 6}), r"att\.g1 has shape \[16, 6\].*\[16, 5\] in the base"),
}
for _name, (_layout, _said) in OTHER.items():

    @case(13, f"fine-tune of another {_name}", "LayoutError", _said)
    def _(folder, layout=_layout):
        return arguments(folder, tuned=saved(folder, "tuned.safetensors", random_model(layout)))


@case(13, "state of another depth", "LayoutError", "states for 3 layers, the base has 2")
def _(folder):
    return arguments(folder, tuned=saved(folder, "state.pth", random_state(replace(SEVEN, n_layer=3))))


@case(13, "state of other heads", "LayoutError", r"\[2, 8, 8\].*4 heads of 4")
def _(folder):
    return arguments(folder, tuned=saved(folder, "state.pth", random_state(replace(SEVEN, n_head=2, head_size=8))))


@case(13, "LoRA of another depth", "LayoutError", r"5 of the 15 tensors(.|\n)*RWKV-7.0 with 2 layers")
def _(folder):
    lora = random_lora(replace(SEVEN, n_layer=3), full=False)
    return arguments(folder, tuned=saved(folder, "lora.pth", lora), alpha=8.0)


@case(
    13, "LoRA of another width", "LayoutError", r"blocks.0.att.key of the base is \[16, 16\], here is lora_A \[3, 32\]"
)
def _(folder):
    lora = random_lora(replace(SEVEN, n_embd=32, dim_att=32, n_head=8), full=False)
    return arguments(folder, tuned=saved(folder, "lora.pth", lora), alpha=8.0)


@case(
    14,
    "fine-tune of another generation",
    "LayoutError",
    r"RWKV-6\.0 \(blocks.0.att.time_maa_x.*RWKV-7\.0 \(blocks.0.att.r_k",
)
def _(folder):
    return arguments(folder, tuned=saved(folder, "tuned.pth", random_model(LAYOUTS["6.0"])))


@case(14, "part of another generation", "LayoutError", r"RWKV-6\.0 \(blocks.0.att.time_maa_x.*RWKV-7\.0")
def _(folder):
    part = {n: t for n, t in random_model(LAYOUTS["6.0"]).items() if "time_maa" in n}
    return arguments(folder, tuned=saved(folder, "tuned.pth", part))


@case(14, "LoRA of another generation", "LayoutError", r"RWKV-6\.0 \(blocks.0.att.time_maa_x.*RWKV-7\.0")
def _(folder):
    lora = random_lora() | {"blocks.0.att.time_maa_x": torch.ones(1, 1, 16)}
    return arguments(folder, tuned=saved(folder, "lora.pth", lora), alpha=8.0)


@case(14, "state for a generation without", "LayoutError", r"RWKV-4\.0, which has no time_state")
def _(folder):
    return arguments(folder, base=saved(folder, "base.pth", random_model(LAYOUTS["4.0"])))


@case(14, "whole checkpoint of another generation as a state", "LayoutError", r"RWKV-6\.0.*RWKV-7\.0")
def _(folder):
    tensors = random_model(LAYOUTS["6.0"]) | random_state()
    return arguments(folder, tuned=saved(folder, "tuned.pth", tensors), method="state")


for _prefix in ("module.", "base_model.model."):

    @case(15, f"fine-tune with and without the prefix {_prefix}", "LayoutError", rf"{_prefix}(.|\n)*two models")
    def _(folder, prefix=_prefix):
        both = random_model() | {prefix + n: t for n, t in random_model().items()}
        return arguments(folder, tuned=saved(folder, "t.pth", both))


@case(15, "LoRA of nothing in the base", "LayoutError", "0 of 2 tensors matched")
def _(folder):
    lora = {"encoder.lora_A": torch.ones(2, 16), "encoder.lora_B": torch.ones(16, 2)}
    return arguments(folder, tuned=saved(folder, "lora.pth", lora), alpha=8.0)


@case(16, "LoRA of another rank than its configuration says", "LayoutError", r"is \[3, 16\], .*states rank 2")
def _(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 8}')
    lora = {f"base_model.model.{n}.weight": t for n, t in random_lora(full=False).items()}
    saved(folder, "adapter/adapter_model.safetensors", lora)
    return arguments(folder, tuned=folder / "adapter", alpha=8.0)


KEY = "blocks.0.att.key"
for _name, _changed, _alpha, _error, _said in [
    (
        "ranks that differ",
        {f"{KEY}.lora_A": torch.ones(4, 16)},
        8.0,
        "LayoutError",
        rf"{KEY} has lora_A \[4, 16\] and lora_B \[16, 3\]",
    ),
    ("B without A", {f"{KEY}.lora_A": None}, 8.0, "LayoutError", rf"{KEY}.lora_B is there, {KEY}.lora_A is not"),
    ("A without B", {f"{KEY}.lora_B": None}, 8.0, "LayoutError", rf"{KEY}.lora_A is there, {KEY}.lora_B is not"),
    (
        "rank 0",
        {f"{KEY}.lora_A": torch.ones(0, 16), f"{KEY}.lora_B": torch.ones(16, 0)},
        8.0,
        "LayoutError",
        r"lora_A \[0, 16\](.|\n)*r of at least 1",
    ),
    ("halves swapped", {f"{KEY}.lora_A": torch.ones(16, 3)}, 8.0, "LayoutError", KEY),
    ("a vector", {f"{KEY}.lora_A": torch.ones(16)}, 8.0, "LayoutError", KEY),
    ("the matrix twice", {f"{KEY}.weight": torch.ones(16, 16)}, 8.0, "LayoutError", f"{KEY}.weight stands in"),
    ("alpha missing", {}, None, "ParameterError", "does not state its alpha"),
    ("alpha not a number", {}, float("nan"), "ParameterError", "alpha=nan"),
    ("alpha negative", {}, -1.0, "ParameterError", "alpha=-1"),
]:

    @case(16, f"LoRA with {_name}", _error, _said)
    def _(folder, changed=_changed, alpha=_alpha):
        lora = {n: t for n, t in (random_lora() | changed).items() if t is not None}
        return arguments(folder, tuned=saved(folder, "lora.pth", lora), alpha=alpha)


@case(17, "NaN and Inf", "NumericsError", r"blocks\.0\.ln1\.weight \(2 NaN\), blocks\.1\.att\.key\.weight \(1 Inf\)")
def _(folder):
    tensors = random_model()
    tensors["blocks.0.ln1.weight"][3:5] = float("nan")
    tensors["blocks.1.att.key.weight"][7, 8] = float("inf")
    return arguments(folder, base=saved(folder, "base.pth", tensors))


@case(17, "NaN in the state", "NumericsError", r"blocks\.1\.att\.time_state \(1 NaN\)")
def _(folder):
    tensors = random_state()
    tensors["blocks.1.att.time_state"][0, 0, 0] = float("nan")
    return arguments(folder, tuned=saved(folder, "state.pth", tensors))


@case(18, "too large for fp16", "NumericsError", r"head\.weight \(3 overflow\)")
def _(folder):
    tensors = random_model()
    tensors["head.weight"][0, :3] = 1e5
    return arguments(folder, base=saved(folder, "base.pth", tensors), dtype="fp16")


for _dtype in (torch.int8, torch.complex64, torch.bool, torch.uint8):

    @case(19, f"{_dtype} in the place of floats", "LayoutError", f"ln_out.weight in .* is {_dtype}")
    def _(folder, dtype=_dtype):
        tensors = random_model()
        tensors["ln_out.weight"] = torch.ones(16).to(dtype)
        return arguments(folder, base=saved(folder, "base.pth", tensors))


def _same(folder):
    return str(folder / "base.pth")


def _dotted(folder):
    return f"{folder}/./base.pth"


def _around(folder):
    (folder / "sub").mkdir()
    return f"{folder}/sub/../base.pth"


def _symlink(folder):
    (folder / "link.pth").symlink_to("base.pth")
    return str(folder / "link.pth")


def _hard_link(folder):
    (folder / "link.pth").hardlink_to(folder / "base.pth")
    return str(folder / "link.pth")


def _tuned(folder):
    return str(folder / "state.pth")


for _alias in (_same, _dotted, _around, _symlink, _hard_link, _tuned):

    @case(22, f"output is an input: {_alias.__name__[1:]}", "OutputError", "is the input")
    def _(folder, alias=_alias):
        return arguments(folder) | {"out": alias(folder), "overwrite": True}


@case(23, "output exists", "OutputError", "out.pth exists")
def _(folder):
    (folder / "out.pth").write_text("precious")
    return arguments(folder)


@case(23, "provenance exists", "OutputError", "out.pth.json exists")
def _(folder):
    (folder / "out.pth.json").write_text("precious")
    return arguments(folder)


@case(23, "output is a folder", "OutputError", "is a folder")
def _(folder):
    (folder / "out.pth").mkdir()
    return arguments(folder, overwrite=True)


@case(23, "parent missing", "OutputError", "Create it first")
def _(folder):
    return arguments(folder) | {"out": str(folder / "missing" / "out.pth")}


@case(23, "parent is a file", "OutputError", "is a file")
def _(folder):
    return arguments(folder) | {"out": str(folder / "base.pth" / "out.pth")}


@case(23, "outside the allowed folder", "OutputError", "outside")
def _(folder):
    (folder / "allowed").mkdir()
    return arguments(folder, allowed_dir=str(folder / "allowed"))


@case(23, "a name that is too long", "OutputError", "255 are the limit")
def _(folder):
    return arguments(folder) | {"out": str(folder / ("x" * 250 + ".pth"))}


@case(23, "a suffix that is no format", "ParameterError", ".pth or .safetensors")
def _(folder):
    return arguments(folder) | {"out": str(folder / "out.bin")}


def _shards(folder: Path, weight_map: dict) -> dict:
    model, tensors = folder / "model", random_model()
    model.mkdir()
    save_file(tensors, model / "model-00001-of-00001.safetensors")
    full = dict.fromkeys(tensors, "model-00001-of-00001.safetensors") | weight_map
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": full}))
    return arguments(folder, base=model)


for _name, _map, _error, _said in [
    ("leads out", {"emb.weight": "../canary.safetensors"}, "UnsafeFileError", "outside its folder"),
    ("is absolute", {"emb.weight": "/etc/hostname"}, "UnsafeFileError", "outside its folder"),
    ("names a missing shard", {"emb.weight": "model-00002.safetensors"}, "LayoutError", "which is not there"),
    ("names a missing tensor", {"more": "model-00001-of-00001.safetensors"}, "LayoutError", "lists more in"),
]:

    @case(24, f"index {_name}", _error, _said)
    def _(folder, weight_map=_map):
        return _shards(folder, weight_map)


for _name, _given, _said in [
    ("alpha not a number", {"alpha": float("nan")}, "alpha"),
    ("alpha out of range", {"alpha": 1.5}, "0 to 1"),
    ("an unknown method", {"method": "addition"}, "state, overlay, lora"),
    ("weights without a use", {"weights": [0.5, 0.5]}, "takes no weights"),
    ("an unknown dtype", {"dtype": "int4"}, "'bf16', 'fp16' or 'fp32'"),
    ("an unknown scan", {"scan": "some"}, "all"),
    ("a pattern of nothing", {"include": ["blocks.9.*"]}, r"blocks\.9\.\*.*matches none"),
]:

    @case(25, _name, "ParameterError", _said)
    def _(folder, given=_given):
        return arguments(folder, **given)


assert all(issubclass(getattr(__import__("rwkv_lab.errors", fromlist=["_"]), c.error), RwkvLabError) for c in CASES)
