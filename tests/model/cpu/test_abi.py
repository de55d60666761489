"""`abi.py`, and the slots that the generations declare, against the text of the C++ sources."""

import ctypes
import re

import pytest
import torch

from rwkv_lab.model.cpu import abi
from rwkv_lab.model.registry import generations
from rwkv_lab.resources import kernels_folder
from rwkv_lab.wkv.pointers import Span

C_TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "Span": Span,
}


def source(name: str) -> str:
    """A file of kernels/cpu without its comments."""
    return re.sub(r"//.*", "", (kernels_folder() / "cpu" / name).read_text())


def body(text: str, head: str) -> str:
    """What stands in the braces behind `head`, which is there once; inner braces are taken out."""
    (start,) = re.finditer(re.escape(head) + r"\s*\{", text)
    depth, out = 1, ""
    for character in text[start.end() :]:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return out
        out += character if depth == 1 and character != "}" else ""
    raise AssertionError(f"{head} does not end")


def c_type(words: str, pointer: bool):
    words = [w for w in words.split() if w not in ("const", "struct")]
    return ctypes.c_void_p if pointer else C_TYPES[words[0]]


def fields(text: str, struct: str) -> list[tuple[str, object]]:
    """(name, ctypes type) of the data members of a struct, in their order; member functions are left out."""
    found = []
    for line in body(text, f"struct {struct}").split(";"):
        if "(" in line or not line.strip():
            continue
        words, _, names = re.match(r"\s*((?:const\s+)?\w+)(\s*)(.*)", line, re.S).groups()
        for name in names.split(","):
            size = re.search(r"\[(\d+)\]", name)
            kind = c_type(words, "*" in name)
            found.append((re.search(r"\w+", name)[0], kind * int(size[1]) if size else kind))
    return found


def enumerators(text: str) -> list[tuple[dict[str, int], str]]:
    """(name -> value, name of the enum or "") of every enum in a file; values may refer to earlier enumerators."""
    found, known = [], {}
    for name, inside in re.findall(r"\benum\s*(\w*)\s*\{([^}]*)\}", text):
        values, following = {}, 0
        for item in inside.split(","):
            if not item.strip():
                continue
            which, _, value = (part.strip() for part in item.partition("="))
            values[which] = following = eval(value, {}, known) if value else following
            known[which] = following
            following += 1
        found.append((values, name))
    return found


def enum(file: str, name: str) -> dict[str, int]:
    (values,) = (values for values, which in enumerators(source(file)) if which == name)
    return values


STRUCTS = [
    ("weights.h", "Tensor"),
    ("step.h", "Model"),
    ("step.h", "Call"),
    ("matmul.h", "Product"),
    ("mix.cpp", "Packing"),
    ("spans.h", "Span"),
]


@pytest.mark.parametrize(("file", "struct"), STRUCTS)
def test_structs_have_the_fields_of_the_sources(file, struct):
    of = Span if struct == "Span" else getattr(abi, struct)
    assert list(of._fields_) == [(name, kind) for name, kind in fields(source(file), struct) if name != "template"]


def test_enums_have_the_values_of_the_sources():
    names = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}
    assert {names[dtype]: value for dtype, value in abi.DTYPES.items()} == enum("simd.h", "Dtype")
    kinds = {"int8-grouped": "INT8", "int4-grouped": "INT4", "int8": "ROWS8", "int4": "BLOCKS4", "nf4": "NF4"}
    assert {kinds[kind]: value for kind, value in abi.QUANTISED.items()} == enum("weights.h", "Quantised")
    paths = {name.lower(): value for name, value in enum("integer.h", "IntegerPath").items()}
    assert {"no_integers": 0} | abi.PATHS == paths
    activations = enum("mix.cpp", "Activation")
    assert {name: getattr(abi, name) for name in activations} == activations


@pytest.mark.parametrize(
    ("file", "functions"), [("mix.cpp", abi.PREFILL), ("step.cpp", abi.STEP), ("pack.cpp", abi.PACK)]
)
def test_functions_have_the_arguments_of_the_sources(file, functions):
    text = source(file)
    text = text[text.index('extern "C"') :]
    found = {}
    for kind, name, arguments in re.findall(r"^(?:extern \"C\" )?(\w+) (\w+)\(([^)]*)\) \{", text, re.M):
        split = [a.strip() for a in arguments.split(",") if a.strip()]
        assert kind == "int64_t", name
        found[name] = tuple(c_type(a, "*" in a) for a in split)
    assert found == functions


def places(slots) -> tuple[dict[str, int], int]:
    """Which place each enumerator has when the slots fill a table in order, and how many places there are."""
    at, out = 0, {}
    for name, what in slots.items():
        out[name] = at
        at += 2 if what.rpartition(".")[2].startswith("ln") else 1
    return out, at


@pytest.mark.parametrize("version", [g.versions[-1] for g in generations()])
def test_slots_stand_where_the_sources_look_for_them(version):
    (form,) = (g.compiled for g in generations() if version in g.versions)
    found, count = places(form.slots)
    ends = {4: "PER_LAYER", 5: "PER_LAYER_5", 6: "PER_LAYER_6", 7: "PER_LAYER"}
    files = {4: "step4.h", 5: "step56.h", 6: "step56.h", 7: "step7.h"}
    expected = {}
    for values, _ in enumerators(source(files[form.number])):
        if not any(name.startswith("PER_LAYER") for name in values) or ends[form.number] in values:
            expected |= values
    expected.pop("SHARED", None)
    assert expected.pop(ends[form.number]) == count
    assert found == expected


def test_what_stands_before_the_layers():
    """emb, ln0, ln_out, head: as `step.Table` begins."""
    (values,) = (values for values, _ in enumerators(source("step.h")) if "EMB" in values)
    assert values == {"EMB": 0, "LN0": 1, "LN_OUT": 3, "HEAD": 5, "LAYERS": 6}


def test_a_difference_is_found():
    text = "struct One { const void *a, *b; int32_t c; int64_t d[5], e; int f() const { return c; } };"
    text += "enum { X = 3, Y, Z = Y + 2 };"
    assert fields(text, "One") == [
        *(("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("c", ctypes.c_int32)),
        *(("d", ctypes.c_int64 * 5), ("e", ctypes.c_int64)),
    ]
    assert enumerators(text) == [({"X": 3, "Y": 4, "Z": 6}, "")]
