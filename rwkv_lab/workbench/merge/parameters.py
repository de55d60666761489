"""What merge.ipynb takes."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.adapter import check_adapter_files
from rwkv_lab.merge.methods import ADAPTERS, INTO_BASE, METHODS
from rwkv_lab.merge.mixing import MIXING
from rwkv_lab.merge.recipe import read_recipe
from rwkv_lab.merge.refusals import check_alpha, check_method, method_of, mixing_values
from rwkv_lab.merge.spec import MergeOptions, MergeSpec
from rwkv_lab.spec import Number, OneOf
from rwkv_lab.workbench.options import takes, values_for
from rwkv_lab.workbench.parameters import (
    DEMO,
    InputOrEmpty,
    InputPath,
    InputPaths,
    Parameters,
    PathOrEmpty,
    input_path,
)

_IN_RECIPES = ("base", "tuned", "method", "alpha", "weights", "pissa_init", "parameters", "dtype")


@takes(MergeSpec, MergeOptions)
class MergeParameters(Parameters):
    title: ClassVar[str] = "merge"
    basic: ClassVar[tuple[str, ...]] = ("base", "tuned", "out", "method", "alpha", "weights", "parameters", "overwrite")

    base: InputPath = "demo:base"
    tuned: InputPaths = "demo:state"
    out: PathOrEmpty = Field("", description="empty: merged.pth in the report folder, replaced by the next run")
    method: Annotated[str, OneOf(lambda: ("auto", *METHODS))] = "auto"
    alpha: Number | None = None  # one that differs by tensor goes into parameters
    weights: list[Number] = []
    pissa_init: InputOrEmpty = ""
    parameters: dict[str, Any] = Field({}, examples=[{"density": 0.3}])
    recipe: InputOrEmpty = Field("", description="a mergekit recipe (YAML), in place of files, method and its options")
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/merge")

    @classmethod
    def applies(cls, name: str, values: Mapping[str, Any]) -> bool:
        method = values["method"]
        if values["recipe"]:
            return name not in _IN_RECIPES
        return {
            "alpha": method not in ("miss", "linear", "model_stock", "passthrough"),
            "weights": method not in (*INTO_BASE, "slerp", "model_stock", "passthrough"),
            "pissa_init": method in ("auto", "pissa", "adapters"),
            "parameters": method not in INTO_BASE,
            "include": method != "passthrough",
            "exclude": method != "passthrough",
        }.get(name, True)

    def check(self) -> None:
        if self.recipe:
            for name in _IN_RECIPES:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ParameterError(f"{name}={getattr(self, name)!r}: the recipe states it; leave one of them out")
        elif (self.base in DEMO) != (self.tuned in DEMO):
            given, missing = ("base", "tuned") if self.tuned in DEMO else ("tuned", "base")
            raise ParameterError(
                f"{missing} is missing: {given} is {getattr(self, given)}, {missing} is still the demo's.\n"
                f"Give both, or neither for the demo."
            )

    def check_files(self) -> None:
        if self.recipe:
            read_recipe(self.recipe)
        elif self.method in MIXING:
            mixing_values(self.method, self.alpha, self.weights or None, self.parameters)
        elif self.method in ("auto", *ADAPTERS) and self.tuned not in DEMO:
            self._check_tuned()
        elif self.method in ("auto", *INTO_BASE):
            check_alpha("state" if self.method == "auto" else self.method, self.alpha)

    def _check_tuned(self) -> None:
        tuned = self.tuned if isinstance(self.tuned, list) else [self.tuned]
        method = self.method
        if method == "auto":
            with open_checkpoint(tuned[0]) as ck:
                method = method_of(ck)
        given = (self.alpha, self.weights or None, self.parameters, self.pissa_init or None)
        check_method(method, *given)
        if method in ADAPTERS:
            alpha, weights, parameters, init = given
            check_adapter_files(tuned, self.method, alpha, weights, init, parameters)

    def demo_files(self) -> list[str]:
        return [] if self.recipe else super().demo_files()

    def spec(self) -> MergeSpec:
        """What decides the output's bytes; the demo files are trained now if they are meant and not there.

        Raises:
            RwkvLabError: of the recipe, or values that no merge takes.
        """
        if self.recipe:
            return MergeSpec.read(values_for(MergeSpec, self) | read_recipe(self.recipe))
        tuned = self.tuned if isinstance(self.tuned, list) else [self.tuned]
        files = {"base": input_path(self.base), "tuned": [input_path(path) for path in tuned]}
        return MergeSpec.read(values_for(MergeSpec, self) | files)

    def options(self) -> MergeOptions:
        """How the merge runs."""
        return MergeOptions.read(values_for(MergeOptions, self))


PARAMETERS = MergeParameters
