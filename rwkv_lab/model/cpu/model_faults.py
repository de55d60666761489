"""What of a model's modules and tensors compiled code cannot take, and what no code can: tensors without values."""

from typing import Any

import torch
from torch import nn

from rwkv_lab import torch_private
from rwkv_lab.checkpoint import tensors_of
from rwkv_lab.errors import ParameterError
from rwkv_lab.model.block import halves_after
from rwkv_lab.model.registry import generation_of
from rwkv_lab.model.standard_modules import is_standard
from rwkv_lab.model.weight_only import PackedEmbedding, PackedLinear
from rwkv_lab.wkv.pointers import missing_memory

PACKED: dict[type, type] = {PackedLinear: nn.Linear, PackedEmbedding: nn.Embedding}  # -> in whose place it stands


def fault_of_modules(model: Any) -> str:
    """What is not as this package makes it, in words; "" where all is."""
    layout, generation = model.layout, generation_of(model.layout)
    if generation.compiled is None:
        return f"RWKV-{layout.version} has no compiled form"
    types = _types_of_blocks(layout)
    for name, module in model.named_modules():
        where, kind = name or "the model", type(module)
        if not is_standard(module) and kind not in PACKED:
            return f"{where} is a {kind.__name__}"
        meant = _meant(name, types)
        if name and PACKED.get(kind, kind) is not meant:
            return f"{where} is a {kind.__name__}, not a {getattr(meant, '__name__', meant)}"
        stored = (torch_private.parameters_of, torch_private.buffers_of, torch_private.children_of)
        if hidden := next((x for part in stored for x in part(module) if x in vars(module)), ""):
            return f"{where} has an attribute that hides its {hidden}"
        if isinstance(module, nn.LayerNorm | nn.GroupNorm) and type(module.eps) not in (float, int):
            return f"{where} has an eps that is a {type(module.eps).__name__}"
        if kind is nn.LayerNorm and module.normalized_shape != (layout.n_embd,):
            return f"{where} norms over {module.normalized_shape}"
        methods = (x for x, value in vars(module).items() if callable(value) and callable(getattr(kind, x, None)))
        if own := next(methods, ""):
            return f"{where} has a {own} of its own"
    for layer, block in enumerate(model.blocks):
        belongs = {"layer": layer, "n_head": layout.n_head, "head_size": layout.head_size}
        belongs["halves"] = generation.halves_float16 and halves_after(layer)
        for module in (block, *block.children()):
            wrong = next((x for x in belongs if vars(module).get(x, belongs[x]) != belongs[x]), None)
            if wrong:
                return f"blocks.{layer} has {wrong}={vars(module)[wrong]}, not {belongs[wrong]}"
    return ""


_TOP = {"emb": nn.Embedding, "blocks": nn.ModuleList, "ln_out": nn.LayerNorm, "head": nn.Linear}


def _types_of_blocks(layout: Any) -> list[dict[str, type]]:
    """The classes of the modules in a first and in any other layer, by name, as its generation makes them."""
    with torch.device("meta"):
        blocks = [generation_of(layout).make_block(layout, layer, 1e-5, ()) for layer in range(min(layout.n_layer, 2))]
    return [{name: type(module) for name, module in block.named_modules()} for block in blocks]


def _meant(name: str, types: list[dict[str, type]]) -> type | None:
    """The class that a module of that name has; None where there should be none."""
    top, _, rest = name.partition(".")
    layer, _, inside = rest.partition(".")
    if top != "blocks" or not layer:
        return _TOP.get(name)
    return types[min(int(layer), len(types) - 1)].get(inside) if layer.isdecimal() else None


def fault_of_tensors(model: Any) -> str:
    """Which tensor no compiled path can read as it is stored, in words; "" where all can be read."""
    dtype, shapes = getattr(model.ln_out.weight, "dtype", None), {}
    for name, module in model.named_modules():
        packed = type(module) in PACKED
        for last, x in (torch_private.buffers_of if packed else torch_private.parameters_of)(module).items():
            where = f"{name}.{last}"
            if x is None:
                continue
            if type(x) is not (torch.Tensor if packed else nn.Parameter):
                return f"{where} is a {type(x).__name__}"
            if missing := _missing_values(x):
                return f"{where} {missing}"
            if x.device.type != "cpu" or x.layout != torch.strided or not x.is_contiguous() or x.is_neg():
                return f"{where} is not contiguous on the CPU"
            if not packed and last != "time_state" and x.dtype != dtype:
                return f"{where} is {x.dtype}, ln_out is {dtype}"
            if not packed:
                shapes[where] = tuple(x.shape)
        if packed and not module.is_whole():
            return f"{name} is not as it was packed"
        if packed and not module.has_compiled_form():
            return f"{name} has rows of {module.columns} numbers in {module.kind}, which end inside a group"
        if packed:
            shapes[f"{name}.weight"] = module.rows, module.columns
    required, optional = tensors_of(model.layout, shapes)
    known = required | optional
    wrong = next((x for x in (*required, *shapes) if x not in shapes or shapes[x] != known.get(x)), None)
    return f"{wrong} does not fit {model.layout}" if wrong else ""


def refuse_tensors_without_values(model: Any) -> None:
    """Before PyTorch computes a call: it would read beyond the memory of a weight that was resized or freed.

    Raises:
        ParameterError: a weight of a model on the CPU has no values, or not all, and no hook is there to give it any.
    """
    if model.get_device().type != "cpu":
        return
    for name, module in model.named_modules():
        for part in (torch_private.parameters_of, torch_private.buffers_of):
            for last, x in part(module).items():
                missing = "" if x is None else _missing_values(x)
                if missing and not _may_be_given(model, name):
                    raise ParameterError(f"{name}.{last} {missing}; load it again.")


def _may_be_given(model: Any, name: str) -> bool:
    """Whether something runs before the module of that name, or one around it, that may give it its values: a hook or
    a forward of its own, as of programs that keep weights elsewhere."""
    parts = name.split(".")
    around = [model, *(model.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts)) if name)]
    return any(torch_private.hooks_of(m)[1] or "forward" in vars(m) for m in around)


def _missing_values(x: torch.Tensor) -> str:
    """What of a tensor's values is not there, to go behind its name; "" where all are."""
    return "is on the meta device and has no values" if x.is_meta else missing_memory(x)
