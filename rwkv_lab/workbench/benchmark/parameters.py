"""What benchmark.ipynb takes."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from rwkv_lab.bench.peers import parse_peers
from rwkv_lab.dtypes import in_short
from rwkv_lab.spec import Text
from rwkv_lab.workbench.parameters import Backends, ModelPath, Parameters, PathOrEmpty, check_models


def _peer(text: str) -> str:
    parse_peers([text])
    return text


_Dtype = Annotated[Literal["bf16", "fp32", "fp16", "int8", "int4"], BeforeValidator(in_short)]


class BenchmarkParameters(Parameters):
    title: ClassVar[str] = "benchmark"
    takes_kinds: ClassVar[tuple[str, ...]] = ("model",)
    takes_output: ClassVar[str] = "model"
    purpose: ClassVar[str] = "Measure how fast it is on this machine"
    basic: ClassVar[tuple[str, ...]] = ("model", "lengths", "batches", "dtypes", "device")

    model: ModelPath = Field("demo:base", description="a whole model of any generation: .pth, .safetensors, a folder")
    lengths: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(
        [64, 256], description="tokens of the prompts that are read at once"
    )
    batches: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(
        [1, 8], description="sequences that are decoded at once"
    )
    dtypes: Annotated[list[_Dtype], Field(min_length=1)] = Field(
        ["bf16", "fp32"], description="of bf16, fp32, fp16, int8, int4; the last two are of the weights alone"
    )
    backends: Backends = Field([], description="of the WKV operator; empty: all there are")
    device: Text = Field("cpu", description="cpu or cuda")
    peers: list[Annotated[str, AfterValidator(_peer)]] = Field(
        ["auto"],
        description="auto: the package rwkv where it is installed; others by a command, see docs/benchmarks.md",
    )
    rounds: Annotated[int, Field(ge=1)] = Field(3, description="samples of everything, taken in turn")
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/benchmark")

    def check_files(self) -> None:
        check_models(self.model)


PARAMETERS = BenchmarkParameters
