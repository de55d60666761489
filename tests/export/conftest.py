"""Exported models, each written once: tracing takes seconds."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from random_models import SIZES, load_model

from rwkv_lab.model import RWKV_Dual


class Exported(NamedTuple):
    model: RWKV_Dual  # what it was made from
    folder: Path


@pytest.fixture(scope="session", autouse=True)
def operators_read_once() -> None:
    """torch.onnx has onnxscript read the sources of all its operators anew for every graph: 0.3 s each time."""
    with suppress(ImportError, AttributeError):  # private, and not needed
        from torch.onnx._internal.exporter._registration import onnxscript_apis

        onnxscript_apis.get_torchlib_ops = cache(onnxscript_apis.get_torchlib_ops)


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[..., Exported]:
    """`exported(version, weights)`: the folder of a random model with three layers, the last of which is not traced."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from rwkv_lab.export import export_onnx
    from rwkv_lab.export.onnx import tracing

    tracing._MOST_KEPT = 64  # all that is traced here, so that tests with models of SIZES need not trace again

    @cache
    def make(version: str, weights: str = "fp32") -> Exported:
        folder = tmp_path_factory.mktemp(f"rwkv{version}-{weights}")
        model = load_model(folder, version, **SIZES)
        source, many = folder / "m.safetensors", weights == "int8"  # a file's graphs are kept for other processes, too
        return Exported(model, export_onnx(source, folder / "out", weights, external_data=many).folder)

    return make
