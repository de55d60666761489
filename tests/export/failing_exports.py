"""Writers for tests of recovery: each fails in one way, until the settings are the ones that help."""

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

from rwkv_lab.errors import OutputError
from rwkv_lab.export.diagnosis import Settings

# How a failure looks whose only remedy is in the settings behind it. The texts are those of today's packages.
TEXTS: dict[str, tuple[str, Settings]] = {
    "unordered_map": ("unordered_map::at", {"onnx_exporter": "dynamo"}),
    "bool": ("argument 'is_causal' must be bool, not SymBool", {"example_length": 2}),
    "cache": ("Cannot associate shape {} to non-tensor type DynamicCache", {"cache_as_tensors": True}),
    "bfloat16": ("NOT_IMPLEMENTED : Could not find an implementation for Mul(14)", {"example_dtype": "float32"}),
    "rotary": ("Inputs 'cos_cache' and 'sin_cache' are expected to have the same shape", {"onnx_opset_version": 22}),
    "protobuf": ("The model exceeds maximum protobuf size of 2GB", {"use_external_data_format": True}),
    "memory of a GPU": ("CUDA out of memory. Tried to allocate 2 GiB", {"device": "cpu"}),
    "static": ("tracing inferred a static shape of 5 for the dimension", {"onnx_dynamic_axes": False}),
}


def _write(folder: Path, settings: Settings) -> list[str]:
    folder.mkdir()
    (folder / "made-with").write_text(f"{sorted(settings.items(), key=str)}\n{os.getpid()}")
    return ["written"]


def by_text(settings: Settings, folder: Path, *, which: str) -> list[str]:
    """Raises a text of `TEXTS` until the settings are those that help."""
    text, remedy = TEXTS[which]
    if any(settings.get(name) != value for name, value in remedy.items()):
        folder.mkdir()
        (folder / "half").touch()
        raise RuntimeError(text)
    return _write(folder, settings)


def until(settings: Settings, folder: Path, *, name: str, value: object, how: str) -> list[str]:
    """Ends in some way until a setting has a value."""
    if settings.get(name) != value:
        ENDS[how]()
    return _write(folder, settings)


def _raise() -> None:
    raise ValueError("what was never seen before")


def _hang() -> None:
    os.system("sleep 300 & echo $! > hung.pid")
    time.sleep(300)


def _wait() -> None:
    Path("attempt.pid").write_text(str(os.getpid()))
    time.sleep(300)


def _unsupported() -> None:
    raise RuntimeError("No ONNX function found for aten._linalg_eigh")


def _refuse() -> None:
    raise OutputError("there is no space on the disk.")


ENDS = {
    "crash": lambda: ctypes.string_at(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "hang": _hang,
    "raise": _raise,
    "refuse": _refuse,
    "wait": _wait,
    "operator": _unsupported,
}


def write_of_one_size(settings: Settings, folder: Path, **given: Any) -> list[dict]:
    """What exports call; the exporter that torch has by default seems to work at one size alone."""
    from rwkv_lab.export.onnx_attempts import write_in_process

    if settings["onnx_exporter"] == "dynamo" and settings["onnx_dynamic_axes"]:
        raise RuntimeError("tracing inferred a static shape of 3 for the dimension")
    return write_in_process(settings, folder, **given)
