"""What modes.ipynb takes."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from rwkv_lab.dtypes import in_long
from rwkv_lab.workbench.parameters import Backends, ModelOrEmpty, ModelPath, Parameters, PathOrEmpty, check_models

_Dtype = Annotated[Literal["float64", "float32", "bfloat16", "float16"], BeforeValidator(in_long)]


class ModesParameters(Parameters):
    title: ClassVar[str] = "modes"
    takes_kinds: ClassVar[tuple[str, ...]] = ("model",)
    takes_output: ClassVar[str] = "model"
    purpose: ClassVar[str] = "Check that its parallel and its recurrent mode agree"
    basic: ClassVar[tuple[str, ...]] = ("model", "compare_with", "length", "batch", "dtypes", "backends")

    model: ModelPath = Field("demo:base", description="a whole model of any generation: .pth, .safetensors, a folder")
    compare_with: ModelOrEmpty = Field("", description="a second model of the same layout: where do the two differ?")
    length: Annotated[int, Field(ge=16)] = Field(512, description="tokens of each sequence")
    batch: Annotated[int, Field(ge=1)] = Field(2, description="sequences")
    dtypes: Annotated[list[_Dtype], Field(min_length=1)] = Field(
        ["float64", "float32", "bfloat16"], description="of float64, float32, bfloat16, float16"
    )
    backends: Backends = Field([], description="of the WKV operator; empty: all there are")
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/modes")

    def check_files(self) -> None:
        check_models(self.model, self.compare_with)


PARAMETERS = ModesParameters
