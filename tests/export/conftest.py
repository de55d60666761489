"""Exported models, each written once: tracing takes seconds."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from random_models import load_model

from rwkv_lab.model import RWKV_Dual

SIZES = {"n_layer": 3, "n_head": 2, "head_size": 32, "dim_ffn": 96, "vocab_size": 257}  # int4 has blocks of 32


class Exported(NamedTuple):
    model: RWKV_Dual  # what it was made from
    folder: Path


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[..., Exported]:
    """`exported(version, weights)`: the folder of a random model with three layers, the last of which is not traced."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from rwkv_lab.export import export_onnx

    @cache
    def make(version: str, weights: str = "fp32") -> Exported:
        folder = tmp_path_factory.mktemp(f"rwkv{version}-{weights}")
        model = load_model(folder, version, **SIZES)
        return Exported(model, export_onnx(model, folder / "out", weights, external_data=weights == "int8").folder)

    return make
