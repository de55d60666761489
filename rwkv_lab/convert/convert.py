"""`convert`: any format in, any format out. Open, plan from headers, write, compare."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checkpoint.whole_model import whole_model
from rwkv_lab.convert.hub_download import source_of
from rwkv_lab.convert.plan import ConvertResult
from rwkv_lab.convert.planning import plan_convert
from rwkv_lab.convert.spec import ConvertOptions, ConvertSpec
from rwkv_lab.convert.targets import hugging_face_target
from rwkv_lab.convert.writing import write_convert
from rwkv_lab.lazy_torch import torch
from rwkv_lab.paths import to_path

AnyPath = str | os.PathLike[str]


def convert(
    source: AnyPath | None = None,
    to: str = "",
    out: AnyPath = "",
    *,
    repo_id: str = "",
    file: str = "",
    revision: str = "",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = 5 * 10**9,
    tokenizer: AnyPath = "",
    size: str = "",
    alpha: float | None = None,
    generation: str = "",
    rescale: int = 0,
    allow_nonfinite: bool = False,
    allowed_dir: AnyPath | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    push_to_hub: bool = False,
    model_name: str = "",
    private: bool = True,
    licence: str = "",
) -> ConvertResult:
    """Write a checkpoint in another format, streaming; `out` appears whole or not at all.

    Args:
        source: a model, adapter or state: .pth, .safetensors, .gguf, or a folder, also of another ecosystem.
            None where `repo_id` is given.
        to: "transformers", "fla", "world", … for what reads it, "safetensors" and "pth" for BlinkDL's own names,
            "state" for the tuned state of a model alone.
        out: a folder for "transformers", "fla" and "world", a file for the others. An adapter becomes a folder of
            Hugging Face's peft unless `out` ends in .pth or .safetensors; a state becomes a file.
        repo_id: instead of `source`, "owner/name" of a model on the Hugging Face Hub.
        file: of `repo_id`, the file or folder in it; "" for the repository itself, or the only checkpoint in it.
        revision: of `repo_id`, a branch, tag or commit; "" for the main branch.
        dtype: "bf16", "fp16" or "fp32" for every tensor, of "gguf" also "Q8_0" or "Q4_0" for its matrices; None keeps
            each tensor's own.
        max_shard_size: of a folder, tensor data per file: "2GB", "500MB" or bytes.
        tokenizer: "world", "bytes" or the path of a vocabulary; "" for what the vocabulary's size tells.
        size: what the model is called, such as "0.4B"; it is checked against the weights.
        alpha: of a LoRA whose file does not state it.
        generation: of an adapter whose layers several generations have: "7.0"; of a model it is checked.
        rescale: halve att.output and ffn.value after every so many layers, and record it.
        allow_nonfinite: record NaN, Inf and overflow instead of refusing them.
        allowed_dir: the only folder (with those below it) that the output may go to.
        overwrite: allow `out` to exist; never allows it to be the source.
        dry_run: stop after the plan; nothing is written.
        verify: open the output again and compare every tensor with its source.
        push_to_hub: upload the output to the Hub as `model_name`, once every check has passed.
        model_name: "owner/name" there.
        private: whether a repository that is made for it is private.
        licence: for the model card, "apache-2.0"; "" states none.
    Returns:
        The plan, and unless `dry_run` what was written and checked.
    Raises:
        ParameterError, LayoutError, OutputError, UnsafeFileError, CorruptFileError: before any tensor data is read.
        NumericsError: NaN, Inf or overflow on the way; nothing is left behind.
        HubError: the Hub refuses, or cannot be reached. A push that fails leaves the output complete.
    """
    given = dict(locals())
    spec = ConvertSpec.read({name: given[name] for name in ConvertSpec.model_fields})
    return run_convert(spec, out, ConvertOptions.read({name: given[name] for name in ConvertOptions.model_fields}))


@checked
def run_convert(spec: ConvertSpec, out: AnyPath, options: ConvertOptions | None = None) -> ConvertResult:
    """As `convert`, of a spec.

    Raises:
        RwkvLabError: as `convert`.
    """
    start = time.perf_counter()
    plan = plan_convert(spec, to_path(out, "out"), options)
    with plan.checkpoint:
        planned = time.perf_counter()
        result = write_convert(plan)
    return replace(result, seconds={"plan": planned - start, **result.seconds})


def to_huggingface(source: AnyPath | None = None, out: AnyPath = "", **options: object) -> ConvertResult:
    """Write a folder in the layout in which models of this generation are published for Hugging Face's libraries.

    Args:
        options: as of `convert`.
    Raises:
        RwkvLabError: as `convert`; LayoutError for a source that is no whole model.
    """
    asked = {name: options[name] for name in ("repo_id", "file", "revision") if name in options}
    spec = ConvertSpec.read({"source": source, "to": "transformers", **asked})  # which target is not known yet
    with source_of(spec, headers=True) as (path, _), open_checkpoint(path) as ck:
        target = hugging_face_target(whole_model(ck))
    return convert(source, target, out, **options)  # type: ignore[arg-type]


def to_gguf(source: AnyPath | None = None, out: AnyPath = "", **options: object) -> ConvertResult:
    """Write a GGUF file, which llama.cpp and its relatives read; vocabulary and chat template are in it.

    Args:
        options: as of `convert`; `dtype` may be "F32", "F16", "BF16", "Q8_0" or "Q4_0".
    Raises:
        RwkvLabError: as `convert`; LayoutError for a source that is no whole model of RWKV-6 or 7.
    """
    return convert(source, "gguf", out, **options)  # type: ignore[arg-type]


def to_safetensors(source: AnyPath | None = None, out: AnyPath = "", **options: object) -> ConvertResult:
    """Write one `.safetensors` with BlinkDL's names.

    Args:
        options: as of `convert`.
    Raises:
        RwkvLabError: as `convert`.
    """
    return convert(source, "safetensors", out, **options)  # type: ignore[arg-type]


def to_pth(source: AnyPath | None = None, out: AnyPath = "", **options: object) -> ConvertResult:
    """Write a `.pth` with BlinkDL's names.

    Args:
        options: as of `convert`.
    Raises:
        RwkvLabError: as `convert`.
    """
    return convert(source, "pth", out, **options)  # type: ignore[arg-type]
