"""One tuned file into its base: method "state" for a tuned initial state, "overlay" for a full or partial fine-tune."""

from collections.abc import Mapping, Sequence
from functools import partial

from rwkv_lab.checkpoint import Checkpoint, Layout, TensorInfo
from rwkv_lab.checkpoint.layout import same_shape
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge.changed_tensors import ChangedTensor, from_tuned
from rwkv_lab.merge.contained_adapters import after_changes
from rwkv_lab.merge.families.into_base_proof import IntoBaseProof
from rwkv_lab.merge.family import Changes, Description, Family, refuse_option
from rwkv_lab.merge.input_checks import check_full_tensors, refuse_other_dimensions
from rwkv_lab.merge.inputs import MergeInputs
from rwkv_lab.merge.method import Method
from rwkv_lab.merge.method_parameters import Parameter, Takes, check_value
from rwkv_lab.merge.parts import note_on_part
from rwkv_lab.merge.spec import MergeSpec
from rwkv_lab.text import counted

ALPHA = Parameter("alpha", float, Takes("share of the way from the base to tuned; 1 copies, bit for bit", 0, 1), 1.0)
_TAKES = frozenset({"alpha", "include", "exclude"})
STATE = Method(
    "state",
    "tuned state",
    "a tuned initial state goes into the base as `blocks.i.att.time_state`, `[H, V, K]`",
    IntoBaseProof,
    _TAKES,
    (ALPHA,),
)
OVERLAY = Method(
    "overlay",
    "fine-tune",
    "the tensors of a full or partial fine-tune take the place of the base's",
    IntoBaseProof,
    _TAKES,
    (ALPHA,),
)


class IntoBase(Family):
    methods = {"state": STATE, "overlay": OVERLAY}
    kinds = {"state": "state", "model": "overlay", "partial": "overlay"}

    def check(self, spec: MergeSpec) -> MergeSpec:
        if len(spec.tuned) != 1:
            raise ParameterError(
                f"tuned names {counted(len(spec.tuned), 'file')}; method {spec.method!r} takes one.\n"
                "Pass a method that mixes models."
            )
        refuse_option(spec, "pissa_init", "it is for PiSSA adapters")
        refuse_option(spec, "weights", "they are for mixing several models")
        refuse_option(spec, "parameters", f"it takes alpha; given: {', '.join(spec.parameters)}")
        # Of one type: the recipe is a part of the output.
        return spec.changed(alpha=1.0 if spec.alpha is None else check_value(ALPHA, spec.alpha))

    def check_inputs(self, inputs: MergeInputs, spec: MergeSpec, layout: Layout) -> None:
        _taken(inputs, spec, layout)

    def changes(self, inputs: MergeInputs, spec: MergeSpec, layout: Layout) -> Changes:
        """One change per layer, or one per tensor of the fine-tune."""
        taken = _taken(inputs, spec, layout)
        tensors = [
            from_tuned(name, inputs.base.info.get(name), info, spec.alpha, spec.arithmetic)
            for name, info in taken.items()
        ]
        describe = partial(_describe, inputs, spec, layout)
        return Changes(tensors, layout, spec, without_effect=spec.alpha == 0, describe=describe)


def _taken(inputs: MergeInputs, spec: MergeSpec, layout: Layout) -> Mapping[str, TensorInfo]:
    """The tensors of the tuned file that go in."""
    (tuned,) = inputs.tuned
    if spec.method == "state":
        return check_states(tuned, layout)
    check_fine_tune(inputs.base, tuned, layout, spec.allow_extra or [])
    return tuned.info


def _describe(inputs: MergeInputs, spec: MergeSpec, layout: Layout, applied: Sequence[ChangedTensor]) -> Description:
    (tuned,) = inputs.tuned
    part = note_on_part(inputs.base, tuned, layout) if spec.method == "overlay" else ""
    return Description(after_changes(inputs.base, inputs.tuned, applied), [part] if part else [])


def check_states(tuned: Checkpoint, layout: Layout) -> dict[str, TensorInfo]:
    """The states by name, of all layers or some. A whole checkpoint may hold them: only its `time_state` is taken.

    Raises:
        LayoutError: the base's generation has no such state, or layers, heads or head sizes do not fit.
    """
    if not layout.n_head:
        raise LayoutError(f"the base is RWKV-{layout.version}, which has no time_state; states exist from RWKV-5 on")
    refuse_other_dimensions(tuned, layout)
    states = {n: t for n, t in tuned.info.items() if n.endswith(".time_state")}
    if not states:
        raise LayoutError(f"{tuned.path} has no tensor named *.time_state; it is of kind {tuned.kind!r}")
    expected = [f"blocks.{i}.att.time_state" for i in range(layout.n_layer)]
    extra = [n for n in states if n not in expected]
    if extra:
        raise LayoutError(
            f"{tuned.path} holds states for {counted(len(states), 'layer')}, the base has "
            f"{counted(layout.n_layer, 'layer')}.\n"
            f"Not in the base: {', '.join(extra[:3])}."
        )
    wanted = (layout.n_head, layout.head_size, layout.head_size)
    for name, info in states.items():
        if not same_shape(info.shape, wanted):
            raise LayoutError(
                f"{name} in {tuned.path} has shape {list(info.shape)}; the base has {layout.n_head} heads of "
                f"{layout.head_size}, so {list(wanted)} is needed"
            )
    return {name: states[name] for name in expected if name in states}


def check_fine_tune(base: Checkpoint, tuned: Checkpoint, layout: Layout, allow_extra: Sequence[str]) -> None:
    """Refuse a fine-tune of another model.

    Args:
        allow_extra: patterns of names that may be in `tuned` and not in the base.
    Raises:
        LayoutError: another generation or other dimensions, no name in common, or names that the base does not have.
    """
    refuse_other_dimensions(tuned, layout)
    whole: Mapping[str, TensorInfo] = dict(tuned.info)
    check_full_tensors(base, tuned, layout, whole, allow_extra)
