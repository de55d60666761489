"""What a family of merge methods is: the one interface through which planning, writing and proving see all of them.

A family is a module of `rwkv_lab.merge.families`; it registers one object. Nothing else knows methods by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rwkv_lab.checkpoint import Checkpoint, Layout
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge.changed_tensors import ChangedTensor
from rwkv_lab.merge.contained_adapters import after_changes
from rwkv_lab.merge.inputs import MergeInputs
from rwkv_lab.merge.method import MERGE_METHODS, OF_SOME_METHODS, Method
from rwkv_lab.merge.spec import MergeSpec
from rwkv_lab.suggestions import did_you_mean


@dataclass(frozen=True)
class Changes:
    """What a method makes of its inputs, from headers alone."""

    tensors: Sequence[ChangedTensor]
    layout: Layout  # of the output
    spec: MergeSpec  # with everything filled in that decides the output's values: what the recipe is made from
    keeps_base: bool = True  # tensors of the base that do not change are in the output
    without_effect: bool = False  # the output is the base, whatever `tensors` are
    worker_bytes: int = 0  # memory that each thread of the writer needs beside its blocks
    describe: "Callable[[Sequence[ChangedTensor]], Description] | None" = None  # of the changes that are carried out
    look: "Callable[[Sequence[ChangedTensor]], Description] | None" = None  # the same right before writing, from values


@dataclass(frozen=True)
class Description:
    """What an output is, beside its tensors."""

    contains: Sequence[Mapping[str, Any]] = ()  # adapters, as of `contained_adapters`
    notes: Sequence[str] = field(default=())  # sentences for the plan and the report


class Family(ABC):
    """Methods that share their options, their streaming code and the way their proofs are set up."""

    methods: Mapping[str, Method]
    kinds: Mapping[str, str] = {}  # of a checkpoint -> the method that "auto" takes for it

    @abstractmethod
    def check(self, spec: MergeSpec) -> MergeSpec:
        """Refuse options that the method cannot use, and fill in those that were left open; no file is needed.

        Raises:
            ParameterError: states what the method takes.
        """

    def check_tuned(  # noqa: B027  # most families have nothing to refuse
        self, tuned: Sequence[Checkpoint], init: Sequence[Checkpoint | None], spec: MergeSpec
    ) -> None:
        """Refuse what the tuned files alone can tell, before a base is there.

        Raises:
            ParameterError, LayoutError: as `changes`.
        """

    def check_inputs(  # noqa: B027  # `changes` refuses the same, with torch there
        self, inputs: MergeInputs, spec: MergeSpec, layout: Layout
    ) -> None:
        """Refuse inputs that do not belong together; from headers, and without torch.

        Args:
            spec: as `check` returned it.
            layout: of the base.
        Raises:
            ParameterError, LayoutError: as `changes`.
        """

    @abstractmethod
    def changes(self, inputs: MergeInputs, spec: MergeSpec, layout: Layout) -> Changes:
        """What becomes of the inputs.

        Args:
            spec: as `check` returned it.
            layout: of the base.
        Raises:
            LayoutError: inputs that do not belong together.
            ParameterError: options that do not fit these inputs.
        """

    def describe(self, inputs: MergeInputs, changes: Changes, applied: Sequence[ChangedTensor]) -> Description:
        """What the output contains when `applied` of the changes are carried out."""
        if changes.describe is not None:
            return changes.describe(applied)
        return Description(after_changes(inputs.base, inputs.tuned, applied))


FAMILIES: list[Family] = []


def register(family: Family) -> None:
    """Make a family and its methods known.

    Raises:
        ParameterError: a method without a proof, or of a name that is taken.
    """
    for name, method in family.methods.items():
        if not callable(method.proof):
            raise ParameterError(
                f"The merge method {name!r} has no proof: nothing could tell whether its outputs are right.\n"
                "Give it one: rwkv_lab.merge.proof."
            )
        if name in MERGE_METHODS or name == "auto":
            raise ParameterError(f"There is a merge method {name!r} already; call this one something else.")
        if not method.takes <= set(OF_SOME_METHODS):
            raise ParameterError(f"{name} takes {sorted(method.takes)}; options of some methods: {OF_SOME_METHODS}")
    FAMILIES.append(family)
    MERGE_METHODS.update(family.methods)


def family_of(method: str) -> Family:
    """The family that a method belongs to.

    Raises:
        ParameterError: there is no such method.
    """
    for family in FAMILIES:
        if method in family.methods:
            return family
    hint = did_you_mean(str(method), MERGE_METHODS)
    raise ParameterError(f"method={method!r}: it must be 'auto' or one of {', '.join(MERGE_METHODS)}{hint}")


def method_of(tuned: Checkpoint) -> str:
    """The method that fits what a tuned file is.

    Raises:
        LayoutError: none does.
    """
    for family in FAMILIES:
        if tuned.kind in family.kinds:
            return family.kinds[tuned.kind]
    why = f": {tuned.reason}" if tuned.reason else ""
    raise LayoutError(
        f"{tuned.path} is of kind {tuned.kind!r}{why}.\nMerged can be: a state, a full or partial fine-tune, an "
        "adapter (LoRA, PiSSA, MiSS)."
    )


def refuse_option(spec: MergeSpec, name: str, why: str) -> None:
    """Refuse an option that the method does not take.

    Raises:
        ParameterError: it was given.
    """
    if getattr(spec, name) not in (None, {}):
        raise ParameterError(f"method {spec.method!r} takes no {name}: {why}")
