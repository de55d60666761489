"""What was trained beside a frozen base is worked into its matrices: methods "lora", "pissa", "miss", and "adapters".

Which of them a file is, `rwkv_lab.peft` reads off it. Several adapters are taken in the order of the list, each on what
the ones before it left (it matters for MiSS's bats alone); a weight scales what its adapter adds. Where training kept
the base in fewer bits (`quant`), every matrix of the layers is quantised and restored first. A whole tensor in an
adapter takes the place of the base's. With `unmerge` the same is taken out again, in reverse.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint import Checkpoint, Layout
from rwkv_lab.checkpoint.layout import possible_versions
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.adapted_matrices import adapted_tensors, memory_for
from rwkv_lab.merge.adapter_set import (
    ANY,
    WEIGHTS,
    AdapterSet,
    check_weights,
    read_adapters,
    weights_of_each,
    with_computed_starts,
)
from rwkv_lab.merge.changed_tensors import ChangedTensor
from rwkv_lab.merge.contained_adapters import adapters_in, after_merging
from rwkv_lab.merge.families.adapters_proof import PROVED, AdaptersProof
from rwkv_lab.merge.family import Changes, Description, Family
from rwkv_lab.merge.input_checks import refuse_no_match
from rwkv_lab.merge.inputs import MergeInputs, init_paths
from rwkv_lab.merge.method import Method
from rwkv_lab.merge.method_parameters import Parameter, Takes, check_value
from rwkv_lab.merge.pissa_as_lora import notes_on_products
from rwkv_lab.merge.spec import MergeSpec
from rwkv_lab.names import split_block
from rwkv_lab.patterns import matches_any
from rwkv_lab.peft.adapter import Adapter
from rwkv_lab.peft.config import ADAPTER_KINDS
from rwkv_lab.peft.pissa_start import ComputedHalf
from rwkv_lab.peft.settings import QUANTS
from rwkv_lab.suggestions import did_you_mean
from rwkv_lab.text import counted

ALPHA = Parameter("alpha", float, Takes("of a LoRA, whose product is scaled by alpha / r", 0), None)
PARAMETERS = {
    p.name: p
    for p in (
        Parameter(
            "use_rslora",
            bool,
            Takes("whether a LoRA whose file does not say is scaled by alpha / sqrt(r)"),
            False,
        ),
        Parameter(
            "bat",
            str,
            Takes(
                "what a MiSS block of three dimensions means, where its file does not say", choices=("hf", "rwkv-peft")
            ),
            None,
        ),
        Parameter(
            "residual_base",
            bool,
            Takes("of PiSSA: the base given is what the SVD left over, so that no pissa_init is needed"),
            False,
        ),
        Parameter(
            "quant",
            str,
            Takes("how training stored the base; None: what the file says, else none", choices=QUANTS),
            None,
        ),
        Parameter(
            "adapter",
            str,
            Takes("which of several adapters, by name, of a file that holds them beside the model that they adapt"),
            None,
        ),
        Parameter("unmerge", bool, Takes("take the adapters out of a base that holds them"), False),
    )
}
_ONE_EACH = ("use_rslora", "bat", "residual_base", "adapter")  # may be a list with one value per adapter
_HELP = "what was trained beside a frozen base is worked into its matrices"
_KINDS = {method: kind for method, kind in ADAPTER_KINDS.items() if method in PROVED}  # others cannot be merged


def _method(name: str) -> Method:
    kind = _KINDS.get(name)
    title = kind.described.removeprefix("a ").removeprefix("an ") if kind else "adapters of several kinds"
    takes = {"weights", "parameters", "include", "exclude"}
    takes |= {"alpha"} if kind is None or kind.takes_alpha or name == "pissa" else set()
    takes |= {"pissa_init"} if name in ("pissa", ANY) else set()
    return Method(name, title, _HELP, AdaptersProof, frozenset(takes), (ALPHA, WEIGHTS, *PARAMETERS.values()))


class Adapters(Family):
    methods = {name: _method(name) for name in (*_KINDS, ANY)}
    # Folders of Hugging Face's peft are of the kind that their `peft_type` is called.
    kinds = {name: name for name in _KINDS} | {
        written.lower(): name for name, kind in _KINDS.items() for written in kind.peft_types
    }

    def check(self, spec: MergeSpec) -> MergeSpec:
        count = len(spec.tuned)
        if not count:
            raise ParameterError(f"tuned names no file; method {spec.method!r} takes one adapter or several")
        for name, given in spec.parameters.items():
            if name not in PARAMETERS:
                hint = did_you_mean(name, PARAMETERS) or "."
                takes = ", ".join(PARAMETERS)
                raise ParameterError(f"method {spec.method!r} takes no {name!r}{hint}\nIts parameters: {takes}")
            _check(PARAMETERS[name], given, count, name in _ONE_EACH)
        weights = None if spec.weights is None else weights_of_each(spec.weights, count)
        init_paths(spec.pissa_init, count)
        return spec.changed(alpha=_check(ALPHA, spec.alpha, count, True), weights=weights)

    def check_tuned(self, tuned: Sequence[Checkpoint], init: Sequence[Checkpoint | None], spec: MergeSpec) -> None:
        read_adapters(tuned, init, spec)

    def check_inputs(self, inputs: MergeInputs, spec: MergeSpec, layout: Layout) -> None:
        _fitting(inputs, spec, layout)

    def changes(self, inputs: MergeInputs, spec: MergeSpec, layout: Layout) -> Changes:
        """One change per adapted matrix, per matrix that is only quantised, and per whole tensor."""
        adapters = _fitting(inputs, spec, layout)
        adapters = with_computed_starts(adapters, spec, inputs.base)
        check_weights(adapters, layout.n_layer)
        resolved = _resolved(spec, adapters)
        return Changes(
            adapted_tensors(inputs.base, adapters, spec.arithmetic),
            layout,
            resolved,
            without_effect=spec.alpha == 0,
            worker_bytes=memory_for(inputs.base, adapters, spec.arithmetic),
            describe=partial(_describe, inputs, adapters, resolved),
            look=partial(_look, inputs, adapters, resolved, spec.method != "lora"),
        )


def _fitting(inputs: MergeInputs, spec: MergeSpec, layout: Layout) -> AdapterSet:
    """The adapters, all of which go with the base."""
    adapters = read_adapters(inputs.tuned, inputs.init, spec)
    shapes = {n: t.shape for n, t in inputs.base.info.items()}
    for ck, adapter in zip(inputs.tuned, adapters.adapters, strict=True):
        _refuse_unmatched(ck, adapter, inputs.base)
        extra = spec.allow_extra or []
        known = {n: v for n, v in adapter.full.items() if n in shapes or not matches_any(n, extra)}
        replace(adapter, full=known).check(shapes, layout)
    return adapters


def _check(parameter: Parameter, given: Any, count: int, each: bool) -> Any:
    """A value, or where there may be one for `each` adapter a list of them; None leaves it to the file."""
    if isinstance(given, list):
        if not each or len(given) != count:
            raise ParameterError(
                f"{parameter.name}={given!r}: one value is needed{f', or a list of {count}, one per adapter' * each}"
            )
        return [_check(parameter, one, count, False) for one in given]
    return None if given is None else check_value(parameter, given)


def _resolved(spec: MergeSpec, adapters: AdapterSet) -> MergeSpec:
    """With what the files decide; alpha stays as given: what a file states need not be given again."""
    given = {k: v for k, v in spec.parameters.items() if k not in ("quant", "unmerge") and v is not None}
    given |= {"quant": adapters.quant} if adapters.quant != "none" else {}
    given |= {"unmerge": True} if adapters.unmerge else {}
    several = len(adapters.weights) > 1 or adapters.weights != (1.0,)
    weights = list(adapters.weights) if several else None
    return spec.changed(method=adapters.method, weights=weights, parameters=given)


def _describe(
    inputs: MergeInputs, adapters: AdapterSet, spec: MergeSpec, applied: Sequence[ChangedTensor], look: bool = False
) -> Description:
    contains, notes = adapters_in(inputs.base), ()
    if applied:
        contains, notes = after_merging(inputs.base, inputs.tuned, adapters, spec, [c.name for c in applied], look)
    return Description(contains, (*notes, *_notes(inputs.base, adapters)))


def _look(
    inputs: MergeInputs, adapters: AdapterSet, spec: MergeSpec, ask: bool, applied: Sequence[ChangedTensor]
) -> Description:
    """As `_describe`, from values too. `ask`: a PiSSA that is given as a LoRA is refused."""
    described = _describe(inputs, adapters, spec, applied, look=True)
    notes = list(described.notes)
    for adapter, weight in zip(adapters.adapters, adapters.weights, strict=True):
        if weight and applied and not adapters.unmerge:
            notes += notes_on_products(adapter, inputs.base, ask)
    return Description(described.contains, notes)


def _notes(base: Checkpoint, adapters: AdapterSet) -> tuple[str, ...]:
    """Sentences for the plan and the report."""
    notes = []
    if base.part:
        notes.append(
            f"{base.path.name} holds the frozen model that its adapter belongs to; it goes into that one, no other."
        )
    if adapters.quant != "none" and not adapters.unmerge:
        notes.append(
            f"The base was quantised to {adapters.quant} in training, stored as in training: what rounding took away "
            "is lost."
        )
    for adapter in adapters.adapters:
        notes += [f"{Path(adapter.where).name}: {note}" for note in adapter.notes]
        touched = {inside[0] for x in adapter.targets if (inside := split_block(x))}
        n_layer = base.layout.n_layer if base.layout else 0
        if len(touched) < n_layer:
            notes.append(
                f"{Path(adapter.where).name} adapts {len(touched)} of {n_layer} layers: right if it was trained so, "
                "wrong if it is of a model with fewer layers."
            )
    if any(
        isinstance(t.tensors.get("init_lora_A"), ComputedHalf) for a in adapters.adapters for t in a.targets.values()
    ):
        notes.append(
            "What PiSSA started from is computed again by the exact SVD of the base: right if training began with that "
            "(peft's init_lora_weights='pissa'). A randomised start, RWKV-PEFT's svd_niter, cannot be had again."
        )
    if any(a.residual_base for a in adapters.adapters):
        notes.append("PiSSA without its start: right only if the base given is what the SVD left over of the original.")
    for adapter, weight in zip(adapters.adapters, adapters.weights, strict=True):
        if not weight:
            notes.append(f"{Path(adapter.where).name} adds nothing: its alpha or its weight is 0.")
        versions = possible_versions([f"{x}.weight" for x in adapter.targets])[0]
        others = sorted(v for v in versions if base.layout and v != base.layout.version)
        attention = all(".att." in x for x in adapter.targets)
        if attention and others and not adapter.full and adapter.origin is None:
            notes.append(
                f"{Path(adapter.where).name} adapts attention alone ({len(adapter.targets)} matrices), with names that "
                f"RWKV-{', '.join(others)} have too: nothing in it says that it is of this base's generation."
            )
    notes += _notes_on_weights(adapters, base.layout.n_layer if base.layout else 0)
    if len(adapters.adapters) > 1:
        given = [w if isinstance(w, dict) else f"{w:g}" for w in adapters.weights]
        order = ", ".join(f"{Path(a.where).name} × {w}" for a, w in zip(adapters.adapters, given, strict=True))
        notes.append(f"Order of the adapters: {order}{', taken out from the last to the first' * adapters.unmerge}.")
    return tuple(notes)


def _notes_on_weights(adapters: AdapterSet, n_layer: int) -> list[str]:
    """How many tensors get which weight, of adapters whose weights differ by tensor."""
    notes = []
    for i, (adapter, weight) in enumerate(zip(adapters.adapters, adapters.weights, strict=True)):
        if isinstance(weight, Mapping):
            names = [*(f"{x}.weight" for x in adapter.targets), *adapter.full]
            counts = Counter(adapters.weight(i, name, n_layer) for name in names).most_common()
            shown = ", ".join(f"× {w:g} into {count}" for w, count in counts[:6]) + (", …" if len(counts) > 6 else "")
            notes.append(f"{Path(adapter.where).name} goes in {shown} of its {counted(len(names), 'tensor')}.")
    return notes


def _refuse_unmatched(ck: Checkpoint, adapter: Adapter, base: Checkpoint) -> None:
    """A file which is of no model like the base."""
    if not any(n in base.info for n in (*(f"{x}.weight" for x in adapter.targets), *adapter.full)):
        refuse_no_match(list(ck.info), ck.info, base)
