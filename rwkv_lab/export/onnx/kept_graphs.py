"""Traced graphs that other processes find again: one model in several levels is traced once, and so is its like.

A file has a name made of everything that its graph depends on: what is traced, the versions of the packages that trace
it, and our own sources. Weights are not in it: they are listed as inputs, in the order that the graph has them. A file
that is not whole is as good as none, and where none can be written, graphs are traced each time.
"""

import hashlib
import json
import logging
from functools import cache
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx_ir as ir

from rwkv_lab.checkpoint.atomic import atomic_file
from rwkv_lab.errors import OutputError
from rwkv_lab.export.onnx.layers import TRANSPOSED
from rwkv_lab.resources import cache_of

log = logging.getLogger(__name__)

_MOST = 256  # files of about 30 kB; the oldest go
_SOURCES = ("checkpoint", "export", "model", "wkv")  # packages of ours that a graph depends on
_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript")
_LISTED = "rwkv_lab.initializers"  # name, whether it is a weight, and whether that is transposed


def find(key: str) -> ir.Model | None:
    """A graph that was kept under this key, with weights that have no values; None where there is none."""
    path = _path(key)
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        return _graph(data[32:])
    except OSError:
        return None


def has(key: str) -> bool:
    """Whether a file is kept under this key."""
    return _path(key).is_file()


def keep(key: str, model: ir.Model) -> ir.Model:
    """Keep a graph whose weights have no values; where that cannot be done, it is logged. Returns it as `find` does."""
    path, data = _path(key), _bytes(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, overwrite=True) as fd, open(fd, "wb", closefd=False) as file:
            file.write(hashlib.sha256(data).digest() + data)
        for old in sorted(path.parent.glob("*.graph"), key=lambda one: -one.stat().st_mtime)[_MOST:]:
            old.unlink(missing_ok=True)
    except (OSError, OutputError) as e:
        log.info("a traced graph is not kept: %s", e)
    return _graph(data)


def _path(key: str) -> Path:
    whole = "\0".join([key, *(f"{name} {version(name)}" for name in _PACKAGES), _sources()])
    return cache_of("graphs") / f"{hashlib.sha256(whole.encode()).hexdigest()[:32]}.graph"


@cache
def _sources() -> str:
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for package in _SOURCES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _bytes(model: ir.Model) -> bytes:
    model = model.clone()
    graph, listed = model.graph, []
    for name, value in list(graph.initializers.items()):
        is_weight = value.const_value is None
        listed.append([name, is_weight, TRANSPOSED in value.meta])
        if is_weight:
            del graph.initializers[name]
            graph.inputs.append(value)
    model.metadata_props[_LISTED] = json.dumps(listed)
    return ir.to_proto(model).SerializeToString()


def _graph(data: bytes) -> ir.Model:
    model = ir.from_proto(onnx.ModelProto.FromString(data))
    graph, listed = model.graph, json.loads(model.metadata_props.pop(_LISTED))
    values = {str(value.name): value for value in (*graph.inputs, *graph.initializers.values())}
    graph.initializers.clear()
    for name, is_weight, transposed in listed:
        if is_weight:
            graph.inputs.remove(values[name])
        if transposed:
            values[name].meta[TRANSPOSED] = True
        graph.initializers[name] = values[name]
    return model
