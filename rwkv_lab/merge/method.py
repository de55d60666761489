"""What a merge method is, and which there are."""

from collections.abc import Callable
from dataclasses import dataclass

from rwkv_lab.merge.method_parameters import Parameter
from rwkv_lab.merge.proof import Proof, ProofInputs

# Options that only some methods take.
OF_SOME_METHODS = ("alpha", "weights", "pissa_init", "parameters", "include", "exclude")


@dataclass(frozen=True)
class Method:
    name: str
    title: str  # a few words
    help: str  # what it does, a sentence
    proof: Callable[[ProofInputs], Proof]  # recomputes the output, without the family's code
    takes: frozenset[str]  # fields of `MergeSpec` that only some methods take, and this one does
    parameters: tuple[Parameter, ...] = ()  # alpha, weights, and the names that `MergeSpec.parameters` may hold


MERGE_METHODS: dict[str, Method] = {}  # by name, filled by the families of `rwkv_lab.merge.families`
