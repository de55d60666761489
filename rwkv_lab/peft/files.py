"""Adapters in files: opened whatever layout they are in, saved in the layout that the name of the output asks for.

What a file does not state has to be given: the alpha of a LoRA in RWKV-PEFT's layout, which of two "bat"s a block
means, what a PiSSA adapter started from. A value that the file states and that is given too must agree with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, file_facts, open_checkpoint, write_checkpoint
from rwkv_lab.checkpoint.origin import ORIGIN
from rwkv_lab.dtypes import FLOAT_NAMES
from rwkv_lab.errors import LayoutError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.peft import hf_layout, rwkv_peft_layout
from rwkv_lab.peft.adapter import Adapter
from rwkv_lab.peft.kinds.pissa import with_start
from rwkv_lab.peft.options import AdapterOptions


@checked
def open_adapter(
    path: str | Path,
    alpha: float | None = None,
    use_rslora: bool | None = None,
    bat: str | None = None,
    pissa_init: str | Path | None = None,
    residual_base: bool = False,
) -> Adapter:
    """Open an adapter: a `.pth` or `.safetensors` as RWKV-LM-LoRA and RWKV-PEFT write them (keys `X.lora_A`, `X.disha`,
    `X.bone`), or a folder of Hugging Face's peft. Only headers are read; close it, or use it in a `with`.

    Args:
        alpha: of a LoRA whose file does not state it.
        use_rslora: whether that LoRA is scaled by alpha / sqrt(r); None for no.
        bat: "hf" or "rwkv-peft", of a MiSS block with three dimensions whose file does not state which it means.
        pissa_init: what a PiSSA adapter started from: RWKV-PEFT's `init_pissa.pth` (names with or without `model.`), or
            the folder that Hugging Face's peft saved before training. It goes with the original base then.
        residual_base: True: a PiSSA adapter goes with a base that is what the SVD left over.

    Raises:
        ParameterError: something that the file does not state was not given, or the file states otherwise.
        LayoutError: no adapter, one of a kind that is not known, halves or tensors missing, shapes that do not fit.
        CorruptFileError, UnsafeFileError: as `open_checkpoint`.
    """
    with ExitStack() as stack:
        ck = stack.enter_context(open_checkpoint(path))
        init = None if pissa_init is None else stack.enter_context(open_checkpoint(pissa_init))
        adapter = read_adapter(ck, init, alpha, use_rslora, bat, residual_base)
        stack.pop_all()
    return replace(adapter, opened=(ck,) if init is None else (ck, init))


def read_adapter(
    ck: Checkpoint,
    init: Checkpoint | None = None,
    alpha: float | None = None,
    use_rslora: bool | None = None,
    bat: str | None = None,
    residual_base: bool = False,
) -> Adapter:
    """As `open_adapter`, of checkpoints that are open and stay the caller's.

    Args:
        init: what a PiSSA adapter started from.
    Raises:
        ParameterError, LayoutError: as `open_adapter`.
    """
    if ck.kind == "unusable":
        raise LayoutError(f"{ck.path}: {ck.reason}.")
    options = AdapterOptions(alpha, use_rslora, bat, init is not None, residual_base)
    _check_dtypes(ck)
    adapter = (rwkv_peft_layout if ck.adapter_config is None else hf_layout).read(ck, options)
    if not adapter.targets:
        raise LayoutError(f"{ck.path} adapts no layer: it has no lora_A and no MiSS block.")
    if init is not None:
        _check_dtypes(init)
        if file_facts(init).fingerprint == file_facts(ck).fingerprint:
            raise LayoutError(f"pissa_init {init.path} is the adapter itself, not what it started from.")
        adapter = replace(adapter, targets=with_start(adapter, init))
    _check_inner_shapes(adapter)
    return replace(adapter, path=ck.path)


def _check_dtypes(ck: Checkpoint) -> None:
    numbers = [t for n, t in ck.info.items() if not n.endswith(".alpha")]  # those may be whole numbers
    odd = next((t for t in numbers if t.dtype_name not in FLOAT_NAMES), None)
    if odd is not None:
        raise LayoutError(
            f"{ck.path}: {odd.name} is torch.{odd.dtype_name}; adapters are float64, float32, bfloat16 or float16."
        )


def _check_inner_shapes(adapter: Adapter) -> None:
    for x, t in adapter.targets.items():
        if f"{x}.weight" in adapter.full:
            raise LayoutError(
                f"{x}.weight stands in {adapter.where} whole and as an adapter; only one of them can be meant."
            )
        fault = t.inner_misfit()
        if fault:
            raise LayoutError(f"{adapter.where}: {x} has {fault}.")


@checked
def save_adapter(
    adapter: Adapter, path: str | Path, overwrite: bool = False, notes: Mapping[str, str] | None = None
) -> None:
    """Save an adapter, whole or not at all.

    A path that ends in `.pth` or `.safetensors` becomes a file in RWKV-PEFT's layout, with a note of what that layout
    does not state and, for PiSSA, what it started from. Any other path becomes a folder of Hugging Face's peft; PiSSA
    is saved there as the LoRA of twice the rank that does the same to the original model.

    Args:
        notes: short texts that travel in the file beside that note.

    Raises:
        ParameterError: an adapter that the layout cannot express.
        OutputError: the output exists (unless `overwrite`) or cannot be written.
    """
    path = Path(path)
    if _is_file(path):
        tensors, note = rwkv_peft_layout.written(adapter)
        notes = {rwkv_peft_layout.NOTE: note, **_origin(adapter), **(notes or {})}
        write_checkpoint(path, _read(tensors), notes, overwrite)
    else:
        hf_layout.write(adapter, path, overwrite, notes or {})


def check_savable(adapter: Adapter, path: str | Path) -> None:
    """Refuse what `save_adapter` would refuse of the adapter, whatever its values are: before they are trained.

    Raises:
        ParameterError: an adapter that the layout cannot express.
    """
    (rwkv_peft_layout if _is_file(Path(path)) else hf_layout).written(adapter)


def _is_file(path: Path) -> bool:
    return path.suffix in (".pth", ".safetensors")


@checked
def save_pissa_init(adapter: Adapter, path: str | Path, overwrite: bool = False) -> None:
    """Save what a PiSSA adapter started from as RWKV-PEFT's `init_pissa.pth`, which its own merging asks for.

    Raises:
        ParameterError: no PiSSA, or one without its start.
        OutputError: as `save_adapter`.
    """
    write_checkpoint(path, _read(rwkv_peft_layout.written_init(adapter)), _origin(adapter), overwrite)


def _origin(adapter: Adapter) -> dict[str, str]:
    return {} if adapter.origin is None else {ORIGIN: adapter.origin}


def _read(tensors: Mapping) -> dict[str, torch.Tensor]:
    return {name: values.read() for name, values in tensors.items()}
