"""What train.ipynb takes."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rwkv_lab.spec import Number, Patterns, Text
from rwkv_lab.train import TrainSpec
from rwkv_lab.workbench.parameters import InputOrEmpty, Parameters, PathOrEmpty


class TrainParameters(Parameters):
    title: ClassVar[str] = "train"
    basic: ClassVar[tuple[str, ...]] = (
        "kind",
        "base",
        "data",
        "out",
        "steps",
        "ctx_len",
        "lr",
        "rank",
        "alpha",
        "overwrite",
    )

    kind: Literal["pretrain", "full", "state", "lora", "pissa", "miss"] = Field(
        "state", description="pretrain, full, state, lora, pissa or miss: what is trained"
    )
    base: InputOrEmpty = Field(
        "demo:base", description="the model to start from; empty: a fresh one, for pretrain only"
    )
    data: Text = Field("python", description="english, python, or the path of a text, a folder of texts or a .jsonl")
    out: PathOrEmpty = Field("", description="empty: trained.pth in the report folder, replaced by the next run")
    steps: Annotated[int, Field(ge=1)] | None = Field(None, description="updates; None: the kind's own number")
    batch_size: Annotated[int, Field(ge=1)] | None = Field(None, description="texts per batch; None: the kind's own")
    ctx_len: Annotated[int, Field(ge=1)] | None = Field(None, description="tokens per text; None: the kind's own")
    lr: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="highest learning rate; None: the kind's own, which suits the demo model"
    )
    rank: Annotated[int, Field(ge=1)] | None = Field(None, description="of adapters; None: 8")
    alpha: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="of a LoRA, scaled by alpha over rank; None: twice the rank"
    )
    targets: Patterns = Field([], description="layers to adapt, such as att.key, or patterns; empty: all of the blocks")
    train_parts: Patterns = Field([], description="trained beside adapters: emb, head, ln, time_state or patterns")
    quant: Literal["none", "int8", "nf4"] = Field("none", description="of frozen matrices: none, int8 or nf4")
    dtype: Literal["float32", "float64", "bfloat16"] = Field(
        "float32", description="of the model: float32, float64, bfloat16"
    )
    autocast: Literal["", "bfloat16", "float16"] = Field(
        "", description="compute in bfloat16, or on CUDA float16; empty: in dtype"
    )
    device: Text = Field("cpu", description="cpu or cuda")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="the same seed gives the same file")
    accumulate: Annotated[int, Field(ge=1)] = Field(1, description="batches per update")
    warmup: Annotated[int, Field(ge=0)] | None = Field(
        None, description="updates until the rate is highest; None: a twentieth"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more time")
    eval_every: Annotated[int, Field(ge=0)] = Field(0, description="updates between two measurements; 0: none")
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="measurements without a new best before it stops; 0: never stops"
    )
    checkpoint_every: Annotated[int, Field(ge=0)] = Field(0, description="updates between two checkpoints; 0: none")
    resume: bool = Field(False, description="continue from the checkpoint beside the output, if there is one")
    compare: bool = Field(False, description="then compare all methods at equal parameters: a minute more")
    overwrite: bool = Field(False, description="replace the output if it is there")
    dry_run: bool = Field(False, description="stop after the plan")
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/train")

    @classmethod
    def applies(cls, name: str, values: Mapping[str, Any]) -> bool:
        return TrainSpec.applies(name, values["kind"])

    def check(self) -> None:
        self.spec(self.base)

    def spec(self, base: str) -> TrainSpec:
        """What decides the result, with the path of the base in place of its name.

        Raises:
            ParameterError: values that do not go together.
        """
        own = {name: getattr(self, name) for name in TrainSpec.model_fields if name in type(self).model_fields}
        return TrainSpec.read(own | {"base": base})


PARAMETERS = TrainParameters
