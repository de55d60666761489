"""Base and fine-tunes of it into one model, by a method of `rwkv_lab.merge.mixing`: which tensors, what values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rwkv_lab.checkpoint import Checkpoint, Layout
from rwkv_lab.checkpoint.layout import UNUSED_IN_LAYER_0
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.changed_tensors import ChangedTensor, Computed, in_step
from rwkv_lab.merge.contained_adapters import after_changes
from rwkv_lab.merge.families.mixing_proof import MixingProof
from rwkv_lab.merge.family import Changes, Description, Family, refuse_option
from rwkv_lab.merge.input_checks import check_full_tensors, refuse_other_dimensions
from rwkv_lab.merge.inputs import MergeInputs
from rwkv_lab.merge.method import Method
from rwkv_lab.merge.method_parameters import NEEDED, check_values
from rwkv_lab.merge.mixing import MIXING
from rwkv_lab.merge.mixing_method import Blocks, MixingMethod, Signature
from rwkv_lab.merge.mixing_notes import notes_on_mixing
from rwkv_lab.merge.parts import note_on_part
from rwkv_lab.merge.random_numbers import draws
from rwkv_lab.merge.settings import GRADIENT, REST, check_setting, value_for, with_default
from rwkv_lab.merge.spec import MergeSpec
from rwkv_lab.text import counted

PIECE = 1 << 17  # elements worked on at a time: a dozen of them in float32 fit the caches, and the allocator keeps them


def _method(method: MixingMethod) -> Method:
    own = set(method.signature.parameters)
    takes = {"include", "exclude"} | own & {"alpha", "weights"} | ({"parameters"} if own else set())
    parameters = tuple(method.signature.parameters.values())
    return Method(method.name, method.title, method.help, MixingProof, frozenset(takes), parameters)


class Mixing(Family):
    """All files of `rwkv_lab.merge.mixing`."""

    methods = {name: _method(method) for name, method in MIXING.items()}

    def check(self, spec: MergeSpec) -> MergeSpec:
        refuse_option(spec, "pissa_init", "it is for PiSSA adapters")
        signature = MIXING[spec.method].signature
        signature.check_count(spec.method, len(spec.tuned))
        values = _given(spec)
        signature.check_names(spec.method, values)
        for p in signature.parameters.values():
            if p.name not in values:
                values[p.name] = p.default
            elif p.default is not NEEDED:
                values[p.name] = with_default(values[p.name], p.default)
        values = {name: values[name] for name in signature.parameters}
        alpha, weights = values.pop("alpha", None), values.pop("weights", None)
        return spec.changed(alpha=alpha, weights=weights, parameters=values)

    def check_inputs(self, inputs: MergeInputs, spec: MergeSpec, layout: Layout) -> None:
        base, tuned = inputs.base, inputs.tuned
        for ck in tuned:
            if ck.kind not in ("model", "partial", "state"):
                why = f": {ck.reason}" if ck.reason else ""
                raise LayoutError(f"{ck.path} is of kind {ck.kind!r}{why}.\nMethod {spec.method!r} mixes whole models.")
            if base.kind == "state":
                continue  # `layout_of_states` has compared them
            refuse_other_dimensions(ck, layout)
            check_full_tensors(base, ck, layout, ck.info, spec.allow_extra or [])
        _refuse_state_beside_model(base, tuned)

    def changes(self, inputs: MergeInputs, spec: MergeSpec, layout: Layout) -> Changes:
        """One change per tensor that any of the tuned models has.

        A tensor that one of them lacks counts as the base's there; one that the base lacks (a `time_state`) counts as
        zeros. Layer 0's v0, v1 and v2, which RWKV-7 does not use, come from the base or not at all.
        """
        self.check_inputs(inputs, spec, layout)
        base, tuned, method = inputs.base, inputs.tuned, MIXING[spec.method]
        spec = _with_states_weighed(spec, base, tuned)
        there = dict.fromkeys(n for ck in tuned for n in ck.info if n in base.info or n not in UNUSED_IN_LAYER_0)
        names = [n for n in base.info if n in there] + [n for n in there if n not in base.info]
        settings = {"alpha": spec.alpha, "weights": spec.weights, **spec.parameters}
        settings = {name: settings[name] for name in method.signature.parameters}
        for what, setting in settings.items():
            check_setting(what, setting, names)
        tensors = []
        for name in names:
            values = _resolve(method.signature, settings, name, layout.n_layer, len(tuned))
            _try(method, values, len(tuned))
            if name in base.info or values.get("alpha") != 0:
                tensors.append(_mixed(method, name, base, tuned, values, spec.arithmetic))
        return Changes(tensors, layout, spec, describe=partial(_describe, inputs, layout, spec.weights))


def _refuse_state_beside_model(base: Checkpoint, tuned: Sequence[Checkpoint]) -> None:
    states = [ck for ck in tuned if ck.kind == "state"]
    if base.kind != "state" and 0 < len(states) < len(tuned):
        raise LayoutError(
            f"{states[0].path} is of kind 'state', other tuned files are models.\n"
            "Mix models with models and states with states; merge a state into the result."
        )


def _with_states_weighed(spec: MergeSpec, base: Checkpoint, tuned: Sequence[Checkpoint]) -> MergeSpec:
    """The spec; where states alone go into a model by "linear", with 0 for the model in weights that leave it out."""
    states = base.kind != "state" and all(ck.kind == "state" for ck in tuned)
    weights = spec.weights
    if states and spec.method == "linear" and isinstance(weights, list) and len(weights) == len(tuned):
        return spec.changed(weights=[0.0, *weights])
    return spec


def _given(spec: MergeSpec) -> dict[str, Any]:
    """The settings by parameter name.

    alpha and weights may stand in `parameters` too, as mappings of patterns; those beside it then hold for the tensors
    that no pattern matches.
    """
    values = dict(spec.parameters)
    for name, given in (("alpha", spec.alpha), ("weights", spec.weights)):
        if given is None:
            continue
        there = values.get(name)
        if isinstance(there, dict) and not {GRADIENT, REST} & set(there):
            given = there | {REST: given}
        elif there is not None:
            raise ParameterError(f"{name} is given twice: {given!r}, and {there!r} in parameters")
        values[name] = given
    return values


def _describe(inputs: MergeInputs, layout: Layout, weights: Any, applied: Sequence[ChangedTensor]) -> Description:
    mixed = [c.name for c in applied if c.action == "mix"]
    parts = [note for ck in inputs.tuned if ck.kind != "state" and (note := note_on_part(inputs.base, ck, layout))]
    same = [c.name for c in applied if c.action == "copy"]
    if same:
        parts.append(
            f"alpha is 0 for {len(same)} of {counted(len(applied), 'tensor')} (first {same[0]}): they are the base's."
        )
    shares = weights[-len(inputs.tuned) :] if isinstance(weights, list) else []
    parts += _notes_on_missing_states(inputs, [c.name for c in applied])
    idle = [ck.path.name for ck, share in zip(inputs.tuned, shares, strict=False) if share == 0]
    parts += [f"{name} has weight 0: nothing of it goes in." for name in idle]
    notes = (*parts, *notes_on_mixing(layout, mixed))
    return Description(after_changes(inputs.base, inputs.tuned, applied), notes)


def _notes_on_missing_states(inputs: MergeInputs, applied: Sequence[str]) -> list[str]:
    """Which files have no state for some layers, where states are mixed with states."""
    if inputs.base.kind != "state":
        return []
    notes, layers = [], list(dict.fromkeys([*inputs.base.info, *applied]))
    for role, ck in inputs.with_roles:
        lacking = [name for name in layers if name not in ck.info]
        if lacking:
            counts = "zeros" if role == "base" else "the base's"
            notes.append(
                f"{ck.path.name} has no state for {len(lacking)} of {len(layers)} layers (first {lacking[0]}): there "
                f"it counts as {counts}."
            )
    return notes


def _resolve(signature: Signature, settings: Mapping[str, Any], name: str, n_layer: int, tuned: int) -> dict[str, Any]:
    """The method's parameters for one tensor."""
    out = {}
    for p in signature.parameters.values():
        given = settings[p.name]
        where = f" for {name}" if isinstance(given, (Mapping, list)) else ""
        out[p.name] = check_values(p, value_for(given, name, n_layer), tuned, where)
    return out


def _try(method: MixingMethod, values: dict[str, Any], tuned: int) -> None:
    """Run a method on nothing: what it refuses, it refuses before anything is read."""
    nothing = torch.empty(0, device="cpu")
    found = _looked(method, lambda: iter([(nothing, [nothing] * tuned)]), values)
    if method.signature.draws:
        found["draws"] = lambda seed, model: torch.empty(0, dtype=torch.float64, device="cpu")
    method.function(nothing, [nothing] * tuned, **values, **found)


def _mixed(
    method: MixingMethod,
    name: str,
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    values: dict[str, Any],
    precision: torch.dtype,
) -> ChangedTensor:
    first, others = base.info.get(name), [ck.info.get(name) for ck in tuned]
    like = first or next(t for t in others if t is not None)
    if values.get("alpha") == 0:  # the base, bit for bit
        return ChangedTensor(name, "copy", "base", like.shape, like.dtype, copy=first)

    def blocks() -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        for together in in_step([t for t in (first, *others) if t is not None]):
            for pieces in zip(*(t.split(PIECE) for t in together), strict=True):
                wide = [p.to(precision) for p in pieces]
                b = wide.pop(0) if first else torch.zeros_like(wide[0])
                yield b, [wide.pop(0) if t is not None else b for t in others]

    def compute() -> Iterator[Computed]:
        found, start = _looked(method, blocks, values), 0
        for b, pieces in blocks():
            if method.signature.draws:
                found["draws"] = partial(draws, name=name, start=start, count=len(b))
            yield method.function(b, pieces, **values, **found), b
            start += len(b)

    return ChangedTensor(name, "mix", "base + tuned", like.shape, like.dtype, compute=compute)


def _looked(method: MixingMethod, blocks: Blocks, values: dict[str, Any]) -> dict[str, Any]:
    """What the method wants to know of the whole tensor."""
    return {name: look(blocks, **_parameters_of(look, values)) for name, look in method.signature.looks.items()}


def _parameters_of(look: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in look.__annotations__ if name in values}
