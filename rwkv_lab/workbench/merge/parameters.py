"""What merge.ipynb takes."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.adapter import check_adapter_files
from rwkv_lab.merge.methods import ADAPTERS, INTO_BASE, METHODS
from rwkv_lab.merge.mixing import MIXING
from rwkv_lab.merge.recipe import read_recipe
from rwkv_lab.merge.refusals import DTYPES, check_alpha, check_method, method_of, mixing_values
from rwkv_lab.spec import Number, Patterns
from rwkv_lab.workbench.parameters import DEMO, InputOrEmpty, InputPath, InputPaths, Parameters, PathOrEmpty

_IN_RECIPES = ("base", "tuned", "method", "alpha", "weights", "pissa_init", "parameters", "dtype")


class MergeParameters(Parameters):
    title: ClassVar[str] = "merge"
    basic: ClassVar[tuple[str, ...]] = ("base", "tuned", "out", "method", "alpha", "weights", "parameters", "overwrite")

    base: InputPath = Field("demo:base", description="the model to merge into: .pth, .safetensors or a folder")
    tuned: InputPaths = Field(
        "demo:state", description="a state, a fine-tune, an adapter; a list of adapters, or of models to mix"
    )
    out: PathOrEmpty = Field("", description="empty: merged.pth in the report folder, replaced by the next run")
    method: Literal[("auto", *METHODS)] = Field(
        "auto",
        description="auto reads it off the file; or state, overlay, lora, pissa, miss; linear, slerp, … mix models",
    )
    alpha: Annotated[Number, Field(ge=0)] | None = Field(
        None, description="0 to 1: how far to go; for a LoRA: its alpha; where deltas are added: their factor"
    )
    weights: list[Number] = Field([], description="linear: base, then each tuned; where deltas are added: each tuned")
    pissa_init: InputOrEmpty = Field("", description="of a PiSSA adapter: the file or folder that it started from")
    parameters: dict[str, Any] = Field(
        {},
        examples=[{"density": 0.3}],
        description="what else a method takes: density, seed, layers; of adapters bat, quant, unmerge, …",
    )
    recipe: InputOrEmpty = Field("", description="a YAML recipe as of mergekit; it says all of the above but out")
    include: Patterns = Field([], description="shell patterns of tensors that may change; empty: all")
    exclude: Patterns = Field([], description="shell patterns of tensors that stay the base's")
    scan: Literal["all", "changed"] = Field("all", description="where to look for NaN and Inf: all or changed")
    dtype: Literal[("", *DTYPES)] = Field(
        "", description="bf16, fp16 or fp32 for every tensor; empty: each keeps its own"
    )
    allowed_dir: PathOrEmpty = Field("", description="the only folder that the output may go to; empty: any")
    overwrite: bool = Field(False, description="replace the output if it is there; never an input")
    dry_run: bool = Field(False, description="stop after the plan")
    allow_extra: Patterns = Field(
        [], description="patterns of tensors that the generation does not know but may be there"
    )
    allow_nonfinite: bool = Field(False, description="record NaN, Inf and overflow in the report instead of refusing")
    precision: Literal["float32", "float64"] = Field("float32", description="of the arithmetic: float32 or float64")
    hash: Literal["records", "sha256"] = Field("records", description="records: free; sha256: reads the inputs whole")
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
                    raise ParameterError(f"{name}={getattr(self, name)!r}: the recipe says it; leave one of them out")
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


PARAMETERS = MergeParameters
