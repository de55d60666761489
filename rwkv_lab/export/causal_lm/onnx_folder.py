"""A causal language model into a folder of ONNX that `OnnxModel` runs, with tokenizer and chat template."""

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from rwkv_lab.checkpoint import file_facts
from rwkv_lab.checkpoint.atomic import atomic_folder
from rwkv_lab.checkpoint.provenance import provenance
from rwkv_lab.checks import Check
from rwkv_lab.errors import ONNXExportError
from rwkv_lab.export.causal_lm.chat_template import special_tokens
from rwkv_lab.export.causal_lm.folder import GENERATION, TOKENIZER, files_beside
from rwkv_lab.export.causal_lm.loading import load_causal_lm
from rwkv_lab.export.onnx import need_packages
from rwkv_lab.export.onnx_fixed_sizes import FixedSizes
from rwkv_lab.export.onnx_folder import CAUSAL_LM, CONTRIB, MANIFEST, SEQUENCE, Attention, Exporter, Weights
from rwkv_lab.export.weight_storage import Choice
from rwkv_lab.tokenizer.chat_template import TEMPLATE, template_of

_PLAIN, _CHAT = '"The "', 'model.chat_prompt([{"role": "user", "content": "Hello"}])'
_README = """\
# A {kind} language model for onnxruntime

Run it in this folder; `pip install 'rwkv_lab[text]' onnxruntime jinja2` brings what it needs:

```python
from rwkv_lab.export import OnnxModel

model = OnnxModel(".")
print(model.generate({prompt}, max_new_tokens=50))
```

Weights are stored as {weights}. `{graph}` takes input_ids, attention_mask, and keys and values of what was read before,
of which there may be none; it gives logits, and keys and values with those of the new tokens, float32. `{manifest}`
says what made this folder, and has the SHA-256 of every file.
{fixed}"""
_FIXED = """
It takes {0.batch} rows of {0.length} tokens after {0.past} others, and nothing else. `OnnxModel` pads what it is
given, with zeros in attention_mask, so that any text of {0.context} tokens or fewer can be read.
"""


def export_causal_lm(
    source: Path,
    folder: Path,
    weights: Weights,
    opset: int,
    external_data: bool | None,
    tokenizer: str,
    optimise_graph: bool,
    choice: Choice | None = None,
    exporter: Exporter = "dynamo",
    attention: Attention = "eager",
    sizes: FixedSizes | None = None,
) -> list[Check]:
    """Write a model in a folder of Hugging Face as `model.onnx`; the folder appears whole or not at all.

    Args:
        external_data: weights in a file of their own; None: where there are more than 16 MiB of them.
        tokenizer: a tokenizer.json, or a folder with one; empty: the model's.
        choice: how single matrices are stored, by name, whatever `weights` says.
        exporter: of torch.
        attention: what transformers computes attention by while it is traced.
        sizes: the only ones that the graph takes, `past` less where the model's context is shorter; None for any.

    Returns:
        What was checked of the graph.

    Raises:
        ONNXExportError: it cannot be written as ONNX, or the graph is not what was asked for.
        ParameterError: there is no tokenizer, or a package is missing.
        OutputError: the folder is there already, or cannot be written.
    """
    need_packages()
    beside = files_beside(source, tokenizer=tokenizer)
    model = load_causal_lm(source, attention=attention)
    sizes = _within_context(sizes, model)
    recipe: dict[str, Any] = {"weights": weights, "opset": opset, "optimise_graph": optimise_graph}
    recipe |= {"exporter": exporter, "attention": attention} | ({"choice": dict(choice)} if choice else {})
    recipe |= {"sizes": asdict(sizes)} if sizes else {}
    with atomic_folder(folder, overwrite=False) as inside:
        how = {"opset": opset, "optimise": optimise_graph, "exporter": exporter, "sizes": sizes}
        checks, about = _write_graph(model, inside, weights, external_data, choice or {}, how)
        about |= _write_text(beside, inside, about["layout"]["vocab_size"])
        prompt = _PLAIN if about["chat_template"] is None else _CHAT
        names = {"graph": SEQUENCE, "manifest": MANIFEST, "weights": weights}
        fixed = _FIXED.format(sizes) if sizes else ""
        text = _README.format(kind=model.config.model_type, prompt=prompt, fixed=fixed, **names)
        (inside / "README.md").write_text(text, encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(inside.iterdir())}
        about |= {
            "files": {name: {"bytes": size, "sha256": _sha256(inside / name)} for name, size in files.items()},
            "provenance": provenance(recipe, [file_facts(source)], job="export"),
        }
        manifest = {"format": CAUSAL_LM, **recipe, **about}
        (inside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in inside.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    return checks


def _within_context(sizes: FixedSizes | None, model: Any) -> FixedSizes | None:
    context = getattr(model.config, "max_position_embeddings", None)
    if sizes is None or not isinstance(context, int) or sizes.context <= context:
        return sizes
    return replace(sizes, length=min(sizes.length, context), past=context - 1)


def _write_graph(
    model: Any, folder: Path, weights: Weights, external: bool | None, given: Choice, how: dict[str, Any]
) -> tuple[list[Check], dict[str, Any]]:
    """What was checked, and what the manifest says of the graph; `how` goes to `trace`."""
    from rwkv_lab.export.onnx.causal_lm import axes_of, cache_shapes, trace
    from rwkv_lab.export.onnx.check import check_graph
    from rwkv_lab.export.onnx.files import write_graphs
    from rwkv_lab.export.onnx.quantise import quantise

    choice: dict[str, Weights] = {**_matrices(model, weights), **given}
    shapes = cache_shapes(model)
    graph = trace(model, own_head=bool(choice), **how)
    quantise(graph, weights, choice)
    write_graphs({SEQUENCE: graph}, folder, external)
    domains = [CONTRIB] if "int4" in (weights, *given.values()) else []
    axes = axes_of(len(shapes) // 2, how["sizes"])
    checks = check_graph(folder / SEQUENCE, how["opset"], axes, domains)
    stated = getattr(model.config, "max_position_embeddings", None)
    layout = {
        "version": model.config.model_type,
        "n_layer": len(shapes) // 2,
        "n_embd": model.get_input_embeddings().weight.shape[1],
        "vocab_size": model.get_input_embeddings().weight.shape[0],
        "context": stated,
        "cache": shapes,
    }
    return checks, {"layout": layout, "axes": {SEQUENCE: axes}, "domains": domains}


def _matrices(model: Any, weights: Weights) -> dict[str, Weights]:
    """Which matrices are stored as int8 or int4: those of the layers; the head stays at 8 bits.

    Raises:
        ONNXExportError: none is known.
    """
    if weights not in ("int8", "int4"):
        return {}
    head = model.get_output_embeddings()
    linear = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: dict[str, Weights] = {name: "int8" if module is head else weights for name, module in linear.items()}
    if len(found) < 2:
        raise ONNXExportError(f"A {model.config.model_type} has no layers that are known to be quantised; export fp16.")
    return found


def _write_text(beside: dict[str, bytes], folder: Path, vocab_size: int) -> dict[str, Any]:
    """Write tokenizer and template; what the manifest says of them."""
    (folder / TOKENIZER).write_bytes(beside[TOKENIZER])
    template = template_of(beside)
    if template is not None:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    return {
        "tokenizer": TOKENIZER,
        "chat_template": None if template is None else TEMPLATE,
        "special_tokens": special_tokens(beside),
        "begin_tokens": begin_tokens(folder / TOKENIZER),
        "end_tokens": _end_tokens(beside, folder / TOKENIZER, vocab_size),
    }


def begin_tokens(path: Path) -> list[int]:
    """Tokens that a tokenizer puts before every text."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(path)).encode("a", add_special_tokens=True)
    mask = ids.special_tokens_mask
    return ids.ids[: mask.index(0)] if 0 in mask else []


def _end_tokens(beside: dict[str, bytes], tokenizer: Path, vocab_size: int) -> list[int]:
    """Tokens that end a text: those of the generation settings, and the tokenizer's end of text."""
    from tokenizers import Tokenizer

    stated = json.loads(beside.get(GENERATION, b"{}")).get("eos_token_id")
    ends = stated if isinstance(stated, list) else [] if stated is None else [stated]
    named = special_tokens(beside).get("eos_token")
    own = None if named is None else Tokenizer.from_file(str(tokenizer)).token_to_id(named)
    known = {*ends, *([] if own is None else [own])}
    return sorted(token for token in known if isinstance(token, int) and 0 <= token < vocab_size)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
