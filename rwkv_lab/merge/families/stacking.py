"""Layers of one or several models, put one on the other, renumbered; nothing is averaged: method "passthrough".

`layers` lists runs of them from the bottom up: "base[0:12]" are the base's layers 0 to 11, "tuned[6:18]" are layers
of the first tuned model, "tuned2[…]" of the second. What lies below the layers (emb, ln0) comes from the model of the
first run, what lies above (ln_out, head) from that of the last.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from rwkv_lab.checkpoint import Checkpoint, Layout, TensorInfo, expected_tensors
from rwkv_lab.checkpoint.layout import UNUSED_IN_LAYER_0, same_shape
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge.changed_tensors import ChangedTensor
from rwkv_lab.merge.contained_adapters import after_changes
from rwkv_lab.merge.families.stacking_proof import StackingProof
from rwkv_lab.merge.family import Changes, Description, Family
from rwkv_lab.merge.inputs import MergeInputs
from rwkv_lab.merge.method import Method
from rwkv_lab.merge.method_parameters import NEEDED, Parameter, Takes
from rwkv_lab.merge.spec import MergeSpec
from rwkv_lab.names import split_block
from rwkv_lab.text import counted

_RUN = re.compile(r"(base|tuned(\d*))\[(\d{1,4}):(\d{1,4})\]")
LAYERS = Parameter(
    "layers", list, Takes("runs of layers from the bottom up, such as 'base[0:12]', 'tuned[6:12]'"), NEEDED
)
PASSTHROUGH = Method(
    "passthrough",
    "stacked layers",
    "layers of one or several models, put one on the other, renumbered; nothing is averaged",
    StackingProof,
    frozenset({"parameters"}),
    (LAYERS,),
)


class Stacking(Family):
    methods = {"passthrough": PASSTHROUGH}

    def check(self, spec: MergeSpec) -> MergeSpec:
        given = {"alpha": spec.alpha, "weights": spec.weights, "pissa_init": spec.pissa_init, **spec.parameters}
        wrong = [name for name, value in given.items() if value is not None and name != "layers"]
        if wrong:
            raise ParameterError(f"method {spec.method!r} takes no {wrong[0]}; it takes layers, in parameters")
        if spec.include or spec.exclude:
            raise ParameterError(
                "include and exclude say what may change in the base; method 'passthrough' makes a new model"
            )
        layers = spec.parameters.get("layers")
        if not isinstance(layers, list) or not layers or not all(isinstance(run, str) for run in layers):
            raise ParameterError(
                "method 'passthrough' needs parameters={'layers': [...]}, a list of runs from the bottom up,\n"
                "such as ['base[0:12]', 'tuned[6:12]']"
            )
        return spec.changed(parameters={"layers": layers})

    def check_inputs(self, inputs: MergeInputs, spec: MergeSpec, layout: Layout) -> None:
        _order(inputs, spec, layout)

    def changes(self, inputs: MergeInputs, spec: MergeSpec, layout: Layout) -> Changes:
        """Every tensor of the output, and the output's layout."""
        models = [inputs.base, *inputs.tuned]
        layouts, order = _order(inputs, spec, layout)
        out_layout = replace(layout, n_layer=len(order))
        tensors = _stacked(models, order, out_layout)
        describe = partial(_describe, inputs, out_layout, _sources(models, layouts, order))
        return Changes(tensors, out_layout, spec, keeps_base=False, describe=describe)


def _order(inputs: MergeInputs, spec: MergeSpec, layout: Layout) -> tuple[list[Layout], list[tuple[int, int]]]:
    """(layouts of the models, (model, layer) of every layer of the output)."""
    layouts = [layout, *(_same_width(ck, layout) for ck in inputs.tuned)]
    runs = [_run(text, layouts) for text in spec.parameters["layers"]]
    order = [(model, i) for model, start, end in runs for i in range(start, end)]
    _refuse_first_layers(order, layout.version)
    return layouts, order


def _sources(models: Sequence[Checkpoint], layouts: Sequence[Layout], order: Sequence[tuple[int, int]]) -> str:
    """From which models the layers of the output come, in a sentence."""
    taken = [[layer for model, layer in order if model == number] for number in range(len(models))]
    parts = [
        f"{len(layers)} from {ck.path.name} ({len({*layers})} of its {layout.n_layer})"
        for ck, layout, layers in zip(models, layouts, taken, strict=True)
        if layers
    ]
    return f"The output has {counted(len(order), 'layer')}: {', '.join(parts)}."


def _describe(inputs: MergeInputs, layout: Layout, sources: str, applied: Sequence[ChangedTensor]) -> Description:
    contains = after_changes(inputs.base, inputs.tuned, applied)
    if not any(c.action == "layer" for c in applied):
        return Description(contains, [sources])
    notes = [sources, "Stacked layers were never trained to follow each other: expect to tune the result before use."]
    if layout.version == "7.0":
        notes.append("All layers take v_first from the layer 0 of the first run, whichever model they come from.")
    return Description(contains, notes)


def _stacked(models: list[Checkpoint], order: list[tuple[int, int]], layout: Layout) -> list[ChangedTensor]:
    required, optional = expected_tensors(layout)
    out = []
    for name in _names(models, order):
        model, source = _origin(name, order)
        info = models[model].info[source]
        wanted = required.get(name, optional.get(name))
        if wanted is None:
            if source not in UNUSED_IN_LAYER_0:  # needed in other layers
                out.append(_taken(name, model, source, info))
            continue
        if not same_shape(info.shape, wanted):
            raise LayoutError(
                f"{source} in {models[model].path} has shape {list(info.shape)}; beside the base's layers "
                f"{list(wanted)} is needed"
            )
        out.append(_taken(name, model, source, info))
    return out


def _run(text: str, layouts: Sequence[Layout]) -> tuple[int, int, int]:
    """(model, first layer, layer after the last) of "tuned2[3:7]"; model 0 is the base."""
    found = _RUN.fullmatch(text.replace(" ", ""))
    if not found:
        raise ParameterError(f"layers: {text!r} is not a run of layers such as 'base[0:12]' or 'tuned2[6:12]'")
    model = 0 if found[1] == "base" else int(found[2] or 1)
    if found[1] != "base" and not 1 <= model < len(layouts):
        given = {1: "no tuned model is given", 2: "one tuned model is given, called tuned"}
        many = f"{counted(len(layouts) - 1, 'tuned model is', 'tuned models are')} given"
        raise ParameterError(f"layers: {text!r}: {given.get(len(layouts), many)}")
    start, end, depth = int(found[3]), int(found[4]), layouts[model].n_layer
    if not start < end <= depth:
        raise ParameterError(
            f"layers: {text!r}: the model has layers 0 to {depth - 1}; [first:after the last] is needed"
        )
    return model, start, end


def _same_width(ck: Checkpoint, layout: Layout) -> Layout:
    """The layout of a whole model of the same generation and width; its depth may differ."""
    other, misfit = ck.layout, ck.identity.misfit
    if ck.kind != "model" or other is None or misfit is None:
        raise LayoutError(f"{ck.path} is of kind {ck.kind!r}; method 'passthrough' takes layers of whole models")
    if misfit.extra:
        raise LayoutError(f"{ck.path} has {misfit.extra[0]}, which RWKV-{other.version} does not know")
    if other.version != layout.version:
        raise LayoutError(
            f"{ck.path} is RWKV-{other.version} ({other.evidence[0]}), the base is RWKV-{layout.version} "
            f"({layout.evidence[0]})"
        )
    for field in ("n_embd", "vocab_size", "dim_att", "dim_ffn", "n_head", "head_size"):
        if getattr(layout, field) != getattr(other, field):
            raise LayoutError(
                f"{field} differs: {ck.path} has {getattr(other, field)}, the base has {getattr(layout, field)}; "
                "layers of both cannot stand in one model"
            )
    return other


def _refuse_first_layers(order: list[tuple[int, int]], version: str) -> None:
    if order[0][1] != 0:
        makes = "ln0, and v_first for all others" if version == "7.0" else "ln0"
        raise LayoutError(
            f"the first layer of the output would be a layer {order[0][1]}; only a layer 0 has {makes}.\n"
            "Let the first run begin at 0."
        )
    again = next((place for place, (_, i) in enumerate(order) if place and i == 0), None)
    if version == "7.0" and again is not None:
        raise LayoutError(
            f"layer {again} of the output would be a layer 0, which in RWKV-7 makes v_first and has no trained v0, v1 "
            "and v2\nto take it in. Let later runs begin at layer 1 or above."
        )


def _names(models: list[Checkpoint], order: list[tuple[int, int]]) -> list[str]:
    """Names of the output, in the order of a model's own file."""
    bottom, top = models[order[0][0]], models[order[-1][0]]
    outside = [n for n in bottom.info if not split_block(n)]
    after = {"ln_out.weight", "ln_out.bias", "head.weight"}
    names = [n for n in outside if n not in after]
    for place, (model, i) in enumerate(order):
        for n in models[model].info:
            inside = split_block(n)
            if inside and inside[0] == i and (place == 0 or not n.startswith("blocks.0.ln0.")):
                names.append(f"blocks.{place}.{inside[1]}")
    return names + [n for n in top.info if n in after]


def _origin(name: str, order: list[tuple[int, int]]) -> tuple[int, str]:
    """(model, name in it) of a tensor of the output."""
    inside = split_block(name)
    if inside:
        model, i = order[inside[0]]
        return model, f"blocks.{i}.{inside[1]}"
    return order[-1 if name.startswith(("ln_out.", "head.")) else 0][0], name


def _taken(name: str, model: int, source: str, info: TensorInfo) -> ChangedTensor:
    called = "base" if model == 0 else "tuned" if model == 1 else f"tuned{model}"
    if model == 0 and source == name:
        return ChangedTensor(name, "copy", "base", info.shape, info.dtype, copy=info)
    return ChangedTensor(name, "layer", f"{called} {source}", info.shape, info.dtype, copy=info)
