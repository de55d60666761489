"""Exported models, each written once: tracing takes seconds."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from random_models import SIZES, load_model
from warm_python import MORE

from rwkv_lab.model import RWKV_Dual


class Exported(NamedTuple):
    model: RWKV_Dual  # what it was made from
    folder: Path


@pytest.fixture(scope="module", autouse=True)
def imported_for_children() -> Iterator[None]:
    """Processes that export have what they import."""
    import operators_read_once  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MORE, "exporting")
        yield


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
