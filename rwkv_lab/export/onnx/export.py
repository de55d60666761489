"""A model into a folder of ONNX graphs, with all that is needed to run them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Le

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import file_facts
from rwkv_lab.checkpoint.atomic import atomic_folder
from rwkv_lab.checkpoint.provenance import provenance
from rwkv_lab.checks import Check
from rwkv_lab.errors import ONNXExportError, ParameterError
from rwkv_lab.export.onnx import need_packages
from rwkv_lab.export.onnx_folder import (
    CONTRIB,
    INITIAL_STATE,
    LINEAR,
    MANIFEST,
    SEQUENCE,
    STEP,
    Logits,
    Recurrence,
    Weights,
    axes_of,
    readme,
)
from rwkv_lab.export.optimization_processor import OptimizationProcessor
from rwkv_lab.export.samples import tokenizer_of
from rwkv_lab.export.weight_storage import Choice
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.model.dual import outline
from rwkv_lab.model.loading import check_tensors, open_model, read_tensor
from rwkv_lab.model.registry import generation_of
from rwkv_lab.model.standard_modules import replaced_module
from rwkv_lab.tokenizer import ByteTokenizer, Tokenizer, WorldTokenizer

Values = Callable[[str], torch.Tensor]  # a parameter's name -> its values in float32, in the shape that the model has
# What was measured: torch.onnx silently writes 18 for 17, and an invalid file for 26.
Opset = Annotated[int, Ge(18), Le(25)]


@dataclass(frozen=True)
class OnnxExport:
    """What was written.

    files: size in bytes, by name.
    nodes: number of nodes of each graph, by file name.
    checks: what was seen to of the written graphs.
    """

    folder: Path
    opset: int
    weights: str
    files: dict[str, int]
    nodes: dict[str, int]
    checks: list[Check] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


@checked
def export_onnx(
    model: RWKV_Dual | str | Path,
    folder: str | Path,
    weights: Weights = "fp32",
    opset: Opset = 20,
    logits: Logits = "all",
    external_data: bool | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    optimise_graph: bool = True,
    choice: Choice | None = None,
    recurrence: Recurrence = "scan",
) -> OnnxExport:
    """Write a model as two ONNX graphs, for a sequence and for one token, that `rwkv_lab.export.OnnxModel` runs.

    `model.onnx` takes tokens `[batch,length]` and the state, `step.onnx` tokens `[batch,1]`; both give logits and the
    new state, in `wkv`, `att_shift` and `ffn_shift` as `RWKVState` has them. The state before the first token, tuned or
    not, is in `initial_state.npz`. The folder appears whole or not at all.

    Args:
        model: a float32 model on the CPU, or the path of a checkpoint, which is read as such.
        folder: what is written; its parent must be there.
        weights: "fp32"; "fp16" stores matrices in float16; "int8" and "int4" quantise those of time mix, channel mix
            and head, which stays at 8 bits in both. The state is float32 in all of them.
        opset: of ONNX, 18 to 25.
        logits: of the sequence: "all", `[batch,length,V]`, or "last", `[batch,V]`.
        external_data: weights in a file of their own, `model.onnx.data`, which both graphs share; None: where there
            are more than 16 MiB of them.
        tokenizer: "world", "bytes" or the path of a file; None for what the size of the vocabulary tells. Without one
            the folder has none, and is prompted by token ids.
        overwrite: replace a folder that is there.
        optimise_graph: fold constants, and leave out nodes that compute what is known or nothing that is used.
        choice: how single matrices are stored, by name, whatever `weights` says: "fp32", "fp16", "int8" or "int4".
        recurrence: of the sequence graph: "scan", in ONNX's own operators; "linear_attention", for RWKV-5 and 6, one
            operator per layer that onnxruntime alone has.

    Raises:
        ONNXExportError: a model that cannot be written as ONNX, or a written graph that is not what was asked for.
        ParameterError: a value out of range, a model in another dtype, on another device or with adapters, or a package
            that is missing.
        OutputError: the folder is there already, or cannot be written.
        LayoutError, CorruptFileError, UnsafeFileError: the checkpoint; as `RWKV_Dual.from_pretrained`.
    """
    need_packages()
    recipe = {"weights": weights, "opset": opset, "logits": logits, "optimise_graph": optimise_graph}
    recipe |= {"choice": dict(choice)} if choice else {}
    recipe["recurrence"] = recurrence
    with _opened(model) as (model, values, source), atomic_folder(Path(folder), overwrite) as inside:
        _check_recurrence(model, recurrence)
        spoken, name = _tokenizer(model, tokenizer)
        OptimizationProcessor("none", choice).plan_quantisation(model)  # refuses names that the model does not have
        nodes, checks = _write_graphs(
            *(model, values, inside, weights, opset, logits, external_data, optimise_graph, choice, recurrence)
        )
        _write_initial_state(model, values, inside / INITIAL_STATE)
        _write_tokenizer(spoken, name, tokenizer, inside)
        (inside / "README.md").write_text(readme(model.layout.version, weights, spoken is not None), encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(inside.iterdir())}
        manifest = {
            "format": "rwkv_lab.onnx 1",
            "layout": asdict(model.layout),
            **recipe,
            "graphs": {"sequence": SEQUENCE, "step": STEP},
            "axes": {name: axes_of(name == STEP, logits) for name in (SEQUENCE, STEP)},
            "domains": _domains(weights, choice, recurrence),
            "initial_state": INITIAL_STATE,
            "tuned_state": model.has_time_state,
            "tokenizer": name,
            "files": {name: {"bytes": size, "sha256": _sha256(inside / name)} for name, size in files.items()},
            "provenance": provenance(recipe, source, job="export"),
        }
        (inside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in inside.iterdir():
            _sync(path)
    return OnnxExport(Path(folder), opset, weights, files, nodes, checks)


@contextmanager
def _opened(model: RWKV_Dual | str | Path) -> Iterator[tuple[RWKV_Dual, Values, list]]:
    """A model, its values by name, and the facts of its file, which is not read yet."""
    if isinstance(model, RWKV_Dual):
        _check_model(model)
        parameters = dict(model.named_parameters())
        yield model, lambda name: parameters[name].detach(), []
        return
    with open_model(model) as (ck, layout), torch.inference_mode(False):
        empty = outline(ck, layout)
        check_tensors(empty, ck.info, model)
        shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}

        def read(name: str) -> torch.Tensor:
            return read_tensor(ck.info[name], shapes[name]) if name in ck.info else torch.zeros(shapes[name])

        yield empty, read, [file_facts(ck)]


def _write_graphs(
    model: RWKV_Dual,
    values: Values,
    folder: Path,
    weights: Weights,
    opset: int,
    logits: Logits,
    external: bool | None,
    optimise: bool,
    choice: Choice | None,
    recurrence: Recurrence,
) -> tuple[dict[str, int], list[Check]]:
    """Write the graphs; how many nodes each has, and what was checked."""
    from rwkv_lab.export.onnx.check import check_graph
    from rwkv_lab.export.onnx.files import write_graphs
    from rwkv_lab.export.onnx.quantise import quantise
    from rwkv_lab.export.onnx.tracing import trace
    from rwkv_lab.export.onnx.weights import WeightTensors

    tensors = WeightTensors(values)
    graphs = {
        name: trace(model, tensors, opset, name == STEP, logits, optimise, recurrence=recurrence)
        for name in (SEQUENCE, STEP)
    }
    for graph in graphs.values():
        quantise(graph, weights, choice)
    write_graphs(graphs, folder, external)
    domains = _domains(weights, choice, recurrence)
    checks = [check_graph(folder / name, opset, axes_of(name == STEP, logits), domains) for name in graphs]
    return {name: len(graph.graph) for name, graph in graphs.items()}, sum(checks, [])


def _domains(weights: Weights, choice: Choice | None, recurrence: Recurrence) -> list[str]:
    """Domains of operators that may be needed beside ONNX's own."""
    needed = "int4" in (weights, *(choice or {}).values()) or recurrence == "linear_attention"
    return [CONTRIB] if needed else []


def _check_recurrence(model: RWKV_Dual, recurrence: Recurrence) -> None:
    version = model.layout.version
    if recurrence == "linear_attention" and version not in LINEAR:
        raise ONNXExportError(
            f"The recurrence of RWKV-{version} cannot be said in onnxruntime's LinearAttention; that of "
            f"{', '.join(LINEAR)} can.\nExport it with recurrence='scan'."
        )


def _write_initial_state(model: RWKV_Dual, values: Values, path: Path) -> None:
    layout = model.layout
    if model.has_time_state:
        wkv = torch.stack([values(f"blocks.{layer}.att.time_state") for layer in range(layout.n_layer)])
    else:
        wkv = generation_of(layout).first_wkv(layout, torch.device("cpu"))
    shift = np.zeros((1, layout.n_layer, layout.n_embd), np.float32)
    with open(path, "wb") as file:
        np.savez_compressed(file, wkv=wkv[None].contiguous().numpy(), att_shift=shift, ffn_shift=shift)


def _tokenizer(model: RWKV_Dual, which: str | Path | None) -> tuple[Tokenizer | None, str | None]:
    """The model's tokenizer, and its file's name in the folder, or "bytes"."""
    found = tokenizer_of(which, model.layout.vocab_size)
    if found is None:
        return None, None
    if isinstance(found, ByteTokenizer):
        return found, "bytes"
    return found, "rwkv_vocab.txt" if isinstance(found, WorldTokenizer) else "tokenizer.json"


def _write_tokenizer(tokenizer: Tokenizer | None, name: str | None, which: str | Path | None, folder: Path) -> None:
    if isinstance(tokenizer, WorldTokenizer):
        (folder / str(name)).write_bytes(tokenizer.path.read_bytes())
    elif tokenizer is not None and not isinstance(tokenizer, ByteTokenizer):
        (folder / str(name)).write_bytes(Path(str(which)).read_bytes())


def _check_model(model: RWKV_Dual) -> None:
    weight = model.emb.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ParameterError(
            f"The model is in {weight.dtype} on {weight.device}; it is exported from float32 on the CPU.\n"
            "Give the path of its checkpoint, or model.float().cpu()."
        )
    if weight.is_inference():
        raise ParameterError(
            "The model was loaded under torch.inference_mode, whose tensors torch.export does not take.\n"
            "Load it outside, or give the path of its checkpoint."
        )
    if found := replaced_module(model):
        raise ParameterError(
            f"This model has {found}, which no ONNX graph of an RWKV holds.\n"
            "Merge adapters first (rwkv_lab.merge); for fewer bits pass weights=."
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
